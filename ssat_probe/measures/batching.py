"""Batches of any kind cut into micro-batches, or turned round."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def pieces(batch: Any, num: int, size: int) -> Iterator[tuple[Any, int]]:
    """A batch cut into micro-batches.

    Args:
        batch: A tensor, or a tuple, list, dictionary or dataclass of tensors and other things.
        num: Images in it; every tensor whose first axis is as long is cut.
        size: Images per piece.

    Yields:
        Pieces of the same kind, and how many images each holds; the last may hold fewer.
    """
    if num <= size:
        yield batch, num
        return
    for start in range(0, num, size):
        yield _cut(batch, num, slice(start, min(start + size, num))), min(size, num - start)


def turned(batch: Any, num: int) -> Any:
    """A batch with its images from the last to the first.

    Args:
        batch: As for `pieces`.
        num: Images in it.

    Returns:
        Of the same kind.
    """
    return _cut(batch, num, torch.arange(num - 1, -1, -1)) if num > 1 else batch


def _cut(part: Any, num: int, place: slice | Tensor) -> Any:
    if isinstance(part, Tensor):
        return part[place] if part.ndim and len(part) == num else part
    if isinstance(part, tuple | list):
        return type(part)(_cut(entry, num, place) for entry in part)
    if isinstance(part, dict):
        return {name: _cut(entry, num, place) for name, entry in part.items()}
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {field.name: _cut(getattr(part, field.name), num, place) for field in dataclasses.fields(part)}
        return dataclasses.replace(part, **fields)
    return part
