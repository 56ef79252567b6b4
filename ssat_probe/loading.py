"""Batches of images in a given order, read by worker processes where that helps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssat_probe.images import Images

LoadedBatch = tuple[
    UInt8[Tensor, "batch channel height width"],
    Int64[Tensor, " batch"],
    Int64[Tensor, " batch"],
]
"Pixels, labels, positions in the set."


def epoch_order(num_images: int, seed: int, epoch: int, repeats: int = 1) -> Int64[np.ndarray, " image"]:
    """Order in which one epoch visits the images.

    Depends on nothing but the arguments, so that a resumed run continues in the same order.

    Args:
        num_images: How many there are.
        seed: Of the run; at least 0.
        epoch: From 0.
        repeats: Times that each image comes, one after another; the epoch stays as long, so it has fewer of them.

    Returns:
        As many positions as there are images: a permutation, or the beginning of one with each position repeated.

    References:
        Hoffer et al. (2020), https://arxiv.org/abs/1901.09335, Sec. 3, for repeats within a batch.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_images)
    return order.repeat(repeats)[:num_images]


def batches(images: Images, id_lists: Sequence[Sequence[int] | np.ndarray], workers: int = 0) -> Iterator[LoadedBatch]:
    """Batches of the images at the given positions, in the given order.

    Files are decoded by worker processes ahead of their use, a few batches at a time; images in memory are looked up
    in this process, since sending them between processes costs more. No global random state is touched.

    Args:
        images: The set.
        id_lists: Positions of each batch.
        workers: Processes that read; 0 reads in this one.

    Yields:
        Pixels, labels and positions of each batch.

    Raises:
        ValueError: If an image cannot be read; one sentence that names its file.
    """
    loader = DataLoader(
        _Batches(images),
        batch_size=None,
        sampler=id_lists,
        collate_fn=_unchanged,
        num_workers=0 if images.in_memory else workers,
        generator=torch.Generator(),  # its own: the loader draws a seed for its workers
    )
    for batch in loader:
        if isinstance(batch, str):
            raise ValueError(batch)
        yield batch


@dataclass(frozen=True)
class _Batches(Dataset[LoadedBatch | str]):
    """A batch per list of positions, or the sentence that says why there is none."""

    images: Images

    def __getitem__(self, ids: Sequence[int] | np.ndarray) -> LoadedBatch | str:
        # A sentence travels between processes unharmed; an exception arrives wrapped in a traceback of the worker.
        ids = np.asarray(ids, dtype=np.int64)
        try:
            pixels = self.images.read(ids)
        except ValueError as error:
            return str(error)
        return pixels, torch.from_numpy(self.images.labels[ids]), torch.from_numpy(ids)


def _unchanged(batch: Any) -> Any:
    return batch
