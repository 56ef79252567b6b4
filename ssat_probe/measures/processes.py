"""Several processes that share the work: sums and lists over all of them, or over the one there is."""

import os
from typing import Any

import torch
from torch import Tensor, distributed


def join(device: str = "") -> None:
    """From here on, all processes that ``torchrun`` or ``accelerate launch`` started know each other.

    Nothing happens in a process that was started alone, or that is in a group already. The group lives as long as the
    process: taking it down by hand was seen to leave processes hanging at their exit (gloo, torch 2.14).

    Args:
        device: ``cpu``, or empty for a GPU per process where there are some.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or place()[1] > 1:
        return
    has_gpu = device != "cpu" and torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")


def place() -> tuple[int, int]:
    """Which process this is.

    Returns:
        Its number from 0, and how many there are; (0, 1) without a process group.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def summed(tensor: Tensor) -> Tensor:
    """Sum over all processes.

    Args:
        tensor: Of the same shape everywhere; may be changed in place.

    Returns:
        The same numbers in every process.
    """
    if place()[1] > 1:
        distributed.all_reduce(tensor)
    return tensor


def gathered(entries: list[Any]) -> list[Any]:
    """The lists of all processes, one after another.

    Args:
        entries: Plain values.

    Returns:
        The same list in every process.
    """
    num = place()[1]
    if num == 1:
        return entries
    lists: list[list[Any]] = [[] for _ in range(num)]
    distributed.all_gather_object(lists, entries)
    return [entry for one in lists for entry in one]


def woven(entries: list[Any]) -> list[Any]:
    """The whole list of which each process has every n-th entry, as they share batches.

    Args:
        entries: Plain values; those of process 0 begin with the first of all.

    Returns:
        The same list in every process.
    """
    num = place()[1]
    numbered = gathered([(place()[0] + num * number, entry) for number, entry in enumerate(entries)])
    return [entry for _, entry in sorted(numbered, key=lambda pair: pair[0])]


def first(value: Any) -> Any:
    """What the first process has.

    Args:
        value: Plain value; that of the other processes is not looked at.

    Returns:
        The same value in every process.
    """
    if place()[1] == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]
