"""How much memory the graphs of a loss take, and how many images at a time fit into what is there."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssat_probe.measures.basis import BLOCK_BYTES
from ssat_probe.measures.batching import pieces
from ssat_probe.measures.hessian import HessianOperator

VECTORS = 8  # float64 vectors alive at once in a product and a Lanczos step, counted in the code, with one to spare
MARGIN = 1.5  # what operations need inside and allocators waste, over the tensors counted; tuned, no source


class Meter(TorchDispatchMode):
    """Counts bytes of the tensors that come to life inside its ``with`` block, now and at their peak."""

    def __init__(self) -> None:
        """Nothing is counted yet."""
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count the storages of its results."""
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else (result,):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        num = storage.nbytes()
        self._seen.add(key)
        self.now += num
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, num)

    def _forget(self, key: int, num: int) -> None:
        self._seen.discard(key)
        self.now -= num


@dataclass(frozen=True)
class Need:
    """Bytes that a Hessian-vector product takes beside model, images and float64 vectors, straight in the images."""

    fixed: int
    per_image: int

    def of(self, num_images: int) -> int:
        """For a micro-batch, with a margin.

        Args:
            num_images: That share one graph.

        Returns:
            Bytes.
        """
        return int(MARGIN * max(self.per_image, self.fixed + num_images * self.per_image))


def need(
    parameters: Mapping[str, Tensor],
    loss: Callable[[Any], Tensor],
    batches: Iterable[tuple[Any, int]],
    max_bytes: int,
) -> Need:
    """Memory of products, measured on 1, 2, 4, 8, ... images, until a quarter of the budget or a batch is reached.

    The peak is the largest of several sums that are straight in the number of images, so that the last of the slopes is
    the steepest.

    Args:
        parameters: As for `HessianOperator`.
        loss: As for `HessianOperator`.
        batches: As for `HessianOperator`; the first is cut.
        max_bytes: The budget.

    Returns:
        The straight line through the last two; a first batch of one image counts all as its own.
    """
    batch, num = next(iter(batches))
    peaks = [(0, 0)]
    for size in (2**power for power in range(num.bit_length())):
        operator = HessianOperator(parameters, loss, [(next(pieces(batch, num, size))[0], size)])
        vector = torch.ones(operator.size, dtype=torch.float64, device=operator.device)
        with Meter() as meter:
            operator.product(vector)
        peaks.append((size, max(0, meter.peak - 3 * vector.nbytes)))  # three of the vectors are counted in VECTORS
        if meter.peak > max_bytes // 4 and size > 1:
            break
    (before, less), (last, most) = peaks[-2:]
    per_image = max(1, (most - less) // (last - before))
    return Need(most - last * per_image, per_image)


@dataclass(frozen=True)
class Room:
    """How a budget of memory is used."""

    micro_batch: int
    "Images that share one graph."
    is_cached: bool
    "Whether the graphs of all images fit at once."
    home: str
    "Where the Lanczos basis lies: device, cpu (main memory, where the device has its own) or disk."
    num_bytes: int
    "What all of it will take on the device."
    max_chunk: int = 1
    "Vectors per product that fit."


def room(
    max_bytes: int,
    size: int,
    num_vectors: int,
    needs: Need,
    num_images: int,
    batch_size: int,
    *,
    taken: int = 0,
    has_own_memory: bool = False,
) -> Room:
    """Divide a budget between vectors, Lanczos basis and graphs.

    Args:
        max_bytes: The budget, beside model, images and libraries.
        size: Of the space.
        num_vectors: Of the Lanczos bases that live at once.
        needs: Of the graphs.
        num_images: In all.
        batch_size: Images that share a graph at most.
        taken: Bytes for dense matrices and other vectors.
        has_own_memory: Whether the device is none of the CPU, whose memory then has the same budget once more.

    Returns:
        The largest micro-batch that fits, the basis on the device if it takes at most half the budget, else in main
        memory if that is another one and has room for it, else on disk.

    Raises:
        ValueError: If not even one image fits; says what would.
    """
    vectors, basis = 8 * VECTORS * size, 8 * num_vectors * size
    is_here = basis <= max_bytes // 2
    home = "device" if is_here else "cpu" if has_own_memory and basis <= max_bytes else "disk"
    fixed = taken + vectors + (basis if is_here else min(BLOCK_BYTES + 8 * size, basis))
    batch_size = min(batch_size, num_images)
    fitting = [num for num in range(1, batch_size + 1) if fixed + needs.of(num) <= max_bytes]
    if not fitting:
        held = f", {taken / 2**30:.3g} of it for dense matrices or the jackknife (--jackknife=false)" if taken else ""
        raise ValueError(
            f"memory must be at least {(fixed + needs.of(1)) / 2**30:.3g} GiB for products of {size} parameters with "
            f"one image at a time{held}, got {max_bytes / 2**30:.3g}. Raise --memory, or select fewer --params."
        )
    micro_batch = fitting[-1]
    num_graphs = -(-num_images // micro_batch)
    all_graphs = int(MARGIN * (num_graphs * max(needs.fixed, 0) + num_images * needs.per_image))
    is_cached = fixed + all_graphs <= max_bytes
    num_bytes = fixed + (all_graphs if is_cached else needs.of(micro_batch))
    per_vector = vectors + (basis if is_here else 0) + needs.of(micro_batch)
    max_chunk = 1 + (max_bytes - num_bytes) // per_vector
    max_chunk = min(max_chunk, max_bytes // basis) if home == "cpu" else max_chunk
    return Room(micro_batch, is_cached, home, num_bytes, max_chunk)
