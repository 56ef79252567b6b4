"""Execution: how a training is carried out, which is no matter for what it computes but for rounding."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"Names of glibc's malloc.h for what mallopt(3) sets."


@dataclass(frozen=True)
class Execution:
    """How a training is carried out; the recipe says what it computes."""

    deterministic: bool = False
    "Use only operations that give the same bits in every run on a graphics card, at some cost of time."

    compile: bool = False
    "Compile the blocks with torch.compile, which takes a while at first and needs a C++ compiler on a CPU."

    channels_last: bool = False
    "Keep images and convolutions with the channels last, which is faster for convolutions on most hardware."

    checkpointing: bool = False
    "Compute the inside of each block again in the backward pass instead of keeping it: a third slower, less memory."

    attention: Literal["auto", "fused", "math", "plain"] = "auto"
    "Kernel of attention: fused is torch's own choice; auto measures which is fastest, and needs it to be so by far."

    def kernel(self, num_processes: int = 1) -> str:
        """Kernel of attention, as far as it is known without a measurement.

        Where equal runs must be equal bit by bit, or what is timed is not what is run, it is torch's own.

        Args:
            num_processes: That share a training, and would not find the same.

        Returns:
            fused, math, plain or auto.
        """
        fixed = self.deterministic or self.compile or self.checkpointing or num_processes > 1
        return "fused" if self.attention == "auto" and fixed else self.attention


def blocks_of(network: "nn.Module") -> "list[nn.Module]":
    """Transformer blocks of encoder and decoder.

    Args:
        network: Encoder and decoder, of any architecture.

    Returns:
        Members of every list of modules that is called ``blocks``, in order.
    """
    return [
        block
        for name, module in network.named_modules()
        if name.split(".")[-1] == "blocks"
        for block in module.children()
    ]


def prepare(network: "nn.Module", execution: Execution, device: "torch.device | str" = "cpu") -> None:
    """Make a network ready for how it is carried out; names and values of its parameters stay.

    Args:
        network: Encoder and decoder.
        execution: What is asked for.
        device: Where it will be.

    Raises:
        ValueError: If it cannot be done with this network.
    """
    import torch

    blocks = blocks_of(network)
    for option in ("compile", "checkpointing"):
        if getattr(execution, option) and not blocks:
            raise ValueError(f"{option} must be left out for a model whose blocks are not known, got {option}.")
    if execution.checkpointing and any(_has_batch_norm(block) for block in blocks):
        raise ValueError(
            "checkpointing must be left out for a model with batch norms in its blocks, whose statistics it would "
            "count twice, got checkpointing."
        )
    if execution.compile and execution.checkpointing:
        raise ValueError("checkpointing must be left out with compile, which decides itself what to keep, got both.")
    if execution.attention in ("math", "plain") and (execution.compile or execution.checkpointing):
        raise ValueError(
            f"attention must be auto or fused with compile or checkpointing, got {execution.attention!r}; leave it out."
        )
    if execution.channels_last:
        network.to(memory_format=torch.channels_last)
    if execution.compile:
        # On a CPU, products that the compiler sees take no longer than a kernel it does not, and in bfloat16 half.
        if execution.attention == "auto" and torch.device(device).type == "cpu":
            for module in network.modules():
                if hasattr(module, "fused_attn"):  # timm's
                    module.fused_attn = False  # type: ignore[assignment]
        for block in blocks:
            block.compile(dynamic=False)


@contextmanager
def recomputing(network: "nn.Module", is_on: bool) -> Iterator[None]:
    """A forward and backward pass in which each block keeps its input alone, and is computed again when it is needed.

    Args:
        network: Encoder and decoder.
        is_on: Whether to do so.

    Yields:
        Nothing; the blocks are as before afterwards.
    """
    from torch.utils.checkpoint import checkpoint

    blocks = blocks_of(network) if is_on else []
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def reproducible(is_on: bool) -> Iterator[None]:
    """Deterministic operations alone; an operation that has no such form is an error of torch's that names it.

    Args:
        is_on: Whether to do so.

    Yields:
        Nothing; torch's settings are as before afterwards.
    """
    import torch

    if not is_on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Memory that is freed stays with the process, so that each step of a training takes the pages of the last one.

    glibc gives every block of 32 MiB and more back to the system at once, and smaller ones where they end the heap; a
    page that is taken again must be cleared and mapped again, which is a tenth and more of a step on a CPU. Without
    glibc nothing is changed.

    Yields:
        Nothing; afterwards free memory is given back, and the limits are those that glibc adjusts itself to at most.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        yield
        return
    set_option(_MMAP_MAX, 0)
    set_option(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        set_option(_MMAP_MAX, 65536)
        set_option(_MMAP_THRESHOLD, 32 * 2**20)
        set_option(_TRIM_THRESHOLD, 64 * 2**20)
        give_back_memory()


def give_back_memory() -> None:
    """Give the system what is freed but still with the process; without glibc nothing is kept that could be given."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _has_batch_norm(module: "nn.Module") -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(part, _BatchNorm) for part in module.modules())
