"""CIFAR-10, 60,000 colour photographs of 32x32 in 10 classes; on disk as torchvision lays it out, or downloaded."""

import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.exceptions import VisibleDeprecationWarning
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from ssat_probe.images import ArrayImages, Facts, Source
from ssat_probe.published import Published

NUM_IMAGES = {"train": 50_000, "test": 10_000}

FACTS = Facts(
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    img_size=(32, 32),
    channels=3,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),  # the one often seen, .2023 .1994 .2010, is the mean of each image's own
    flip=True,
    splits="The official split: 50,000 images for training, 10,000 for testing.",
    licence="none stated by the authors",
    citation="A. Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images, "
    "https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf",
)


def read_pickles(stored_as: type[CIFAR10], root: Path, split: str, img_size: tuple[int, int]) -> ArrayImages:
    """Images of one split of CIFAR-10 or CIFAR-100, whose files are pickles.

    Args:
        stored_as: torchvision's class, which knows the names and checksums of the files.
        root: Folder that holds the folder of the pickles.
        split: ``train`` or ``test``.
        img_size: Unused: the images have one size.

    Returns:
        The images, in memory.
    """
    _check_files(stored_as, root / stored_as.base_folder)
    with warnings.catch_warnings():  # numpy 2.4.0 to 2.4.4 of files this old: https://github.com/numpy/numpy/pull/29301
        warnings.simplefilter("ignore", VisibleDeprecationWarning)
        stored = stored_as(root, train=split == "train")
    return ArrayImages(torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous(), np.array(stored.targets))


def fetch_pickles(stored_as: type[CIFAR10], root: Path) -> None:
    """Download and unpack CIFAR-10 or CIFAR-100, unless its files are there with their checksums.

    Args:
        stored_as: torchvision's class.
        root: Folder to put the folder of the pickles in.
    """
    stored_as(root, download=True)


def _check_files(stored_as: type[CIFAR10], folder: Path) -> None:
    """Every file is there with its checksum, before any of these pickles is opened."""
    meta = [stored_as.meta["filename"], stored_as.meta["md5"]]
    files = [*stored_as.train_list, *stored_as.test_list, meta]
    for name, checksum in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} must hold {', '.join(name for name, _ in files)}, got no {name}; add --download, or unpack "
                f"{stored_as.url} there by hand."
            )
        if not check_integrity(folder / name, checksum):
            raise ValueError(
                f"{folder / name} must have the md5 checksum {checksum}, got another; remove it and run again with "
                "--download."
            )


Dataset = partial(
    Published,
    name="cifar10",
    source=Source(
        tree="""
cifar-10-batches-py/
  batches.meta
  data_batch_1 ... data_batch_5
  test_batch
""".strip(),
        address=CIFAR10.url,
        how="--download fetches and unpacks the archive (170 MB).",
    ),
    own=FACTS,
    num_images=NUM_IMAGES,
    read=partial(read_pickles, CIFAR10),
    fetch=partial(fetch_pickles, CIFAR10),
)
