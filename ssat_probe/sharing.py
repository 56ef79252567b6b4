"""Sharing: a batch divided over processes, in which each image is treated as if one process had them all."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from timm.layers.drop import DropPath, drop_path
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Share:
    """Which images of a batch a process holds: image ``first`` and every ``step``-th after it, of ``total``."""

    first: int
    step: int
    "As many processes share the batch."
    total: int

    def __len__(self) -> int:
        """Images of the share."""
        return len(range(self.first, self.total, self.step))

    @property
    def weight(self) -> float:
        """Of the share in a mean over the batch; the weights of all processes sum to 1."""
        return len(self) / self.total

    def of(self, values: Shaped[Tensor, "image ..."]) -> Shaped[Tensor, "own ..."]:
        """This process's rows of what is known of the whole batch.

        Args:
            values: A row per image of the whole batch.

        Returns:
            A row per image of the share.
        """
        return values[self.first :: self.step]

    def parts(self, num: int) -> "list[tuple[Tensor, Share]]":
        """The share of each part of the batch, which is cut as one process would cut it.

        Args:
            num: Parts, in the order of the batch, of which the last ones may be smaller.

        Returns:
            Of each part the rows of this process's images that are in it, and the share that they are of it.
        """
        own, found = self.of(torch.arange(self.total)), []
        for part in torch.arange(self.total).chunk(num):
            rows = ((own >= part[0]) & (own <= part[-1])).nonzero().flatten()
            first = int(own[rows[0]] - part[0]) if len(rows) else len(part)
            found.append((rows, Share(first, self.step, len(part))))
        return found


_current: Share | None = None


@contextmanager
def shared(share: Share) -> Iterator[None]:
    """While it lasts, what networks and losses see is this process's share of a batch.

    Args:
        share: The same batch in all processes, which run the same computation.

    Yields:
        Nothing; afterwards what they see is whole again.
    """
    global _current
    before, _current = _current, share if share.step > 1 else None
    try:
        yield
    finally:
        _current = before


def share_of(num_images: int) -> Share:
    """Which images of the batch these are.

    Args:
        num_images: That there are in this process.

    Returns:
        The share that is current, or all of them.
    """
    assert _current is None or len(_current) == num_images
    return _current or Share(0, 1, num_images)


def whole(values: Shaped[Tensor, "own ..."]) -> Shaped[Tensor, "image ..."]:
    """Rows of the whole batch, in its order, from those of all processes.

    Each process holds all of them for a while; the gradient of what all processes make of them goes back to the rows.

    Args:
        values: A row per image of this process.

    Returns:
        A row per image of the batch.
    """
    share = share_of(len(values))
    if share.step == 1:
        return values
    rows = values.new_zeros(share.total, *values.shape[1:])
    rows[share.first :: share.step] = values
    return summed(rows)


def summed(values: Tensor) -> Tensor:
    """Sum over the processes that share a batch.

    Args:
        values: Of the same shape everywhere.

    Returns:
        The same numbers in every process; their gradient is that of what all processes make of them.
    """
    return values if _current is None else _Sum.apply(values)


def mean(values: Tensor) -> Tensor:
    """Mean over the images of a batch, from the means over the shares.

    Args:
        values: Mean over the images of this process.

    Returns:
        The same numbers in every process.
    """
    return values if _current is None else summed(values * _current.weight)


def share_network(network: nn.Module) -> None:
    """Let a network treat shares as one process would treat the batch: drop paths, and statistics of batch norms.

    Args:
        network: Keeps its names and parameters, and does as before where nothing is shared.
    """
    for module in network.modules():
        if isinstance(module, DropPath):
            module.forward = partial(_dropped, module)  # type: ignore[method-assign]
        elif isinstance(module, _BatchNorm):
            module.forward = partial(_normed, module)  # type: ignore[method-assign]


class _Sum(torch.autograd.Function):
    """Sum over all processes, and of the gradients over all processes."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        values = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(values)
        return values

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        return _Sum.apply(gradients[0])


def _dropped(module: DropPath, values: Tensor) -> Tensor:
    """Branches skipped in the images in which one process would skip them: drawn for the batch, kept for the share."""
    if _current is None or not module.training:
        return DropPath.forward(module, values)
    share = share_of(len(values))
    ones = values.new_ones(share.total, *[1] * (values.ndim - 1))
    return values * share.of(drop_path(ones, module.drop_prob, training=True, scale_by_keep=module.scale_by_keep))


def _normed(module: Any, values: Float[Tensor, "own channel ..."]) -> Float[Tensor, "own channel ..."]:
    """Batch norm with the statistics of the whole batch, as torch's; its own SyncBatchNorm needs a graphics card."""
    if _current is None or not module.training:
        return type(module).forward(module, values)
    share, exact = share_of(len(values)), values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    axes = [0, *range(2, values.ndim)]
    along = [1, -1, *[1] * (values.ndim - 2)]
    count = share.total * values[0, 0].numel()
    average = summed(exact.sum(axes)) / count
    centred = exact - average.view(along)
    variance = summed(centred.square().sum(axes)) / count
    if module.track_running_stats and module.running_mean is not None:
        module.num_batches_tracked.add_(1)
        factor = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
        module.running_mean.lerp_(average.detach(), factor)
        module.running_var.lerp_(variance.detach() * count / (count - 1), factor)
    normal = centred * (variance + module.eps).rsqrt().view(along)
    if module.affine:
        normal = normal * module.weight.view(along) + module.bias.view(along)
    return normal.to(values.dtype)
