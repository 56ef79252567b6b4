"""Choose parameters by the pattern of their names; the fused qkv of attention also as q, k and v."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from jaxtyping import Int
from torch import Tensor

_PARTS = "qkv"


def selected(
    parameters: Mapping[str, Tensor], patterns: Sequence[str]
) -> tuple[dict[str, Tensor], Int[Tensor, " coordinate"] | None]:
    """Parameters whose name one of the patterns matches.

    Each ``NAME.qkv.weight`` (and bias) whose rows are query, key and value in this order, as timm has them, can also be
    asked for in parts: ``NAME.q.weight``, ``NAME.k.weight``, ``NAME.v.weight``.

    Args:
        parameters: Tensors by name.
        patterns: Shell patterns, ``*`` and ``?`` as in file names: ``blocks.5.*``, ``*.attn.v.*``; none means all.

    Returns:
        The tensors in their order, and which coordinates of their flat concatenation are meant: None means all.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    if not patterns:
        return dict(parameters), None
    pieces = {name: [(name, 0, 1), *_pieces(name, tensor)] for name, tensor in parameters.items()}
    labels = [label for places in pieces.values() for label, _, _ in places]
    for pattern in patterns:
        if not any(fnmatchcase(label, pattern) for label in labels):
            shown = ", ".join(parameters if len(parameters) <= 5 else [*list(parameters)[:4], "...", labels[-1]])
            raise ValueError(
                f"A pattern must match the name of a parameter, got {pattern!r} that matches none of {shown}. "
                "Quote it against the shell, as in 'blocks.0.*' or '*.attn.q.*'."
            )
    chosen: dict[str, Tensor] = {}
    masks = []
    for name, tensor in parameters.items():
        mask = torch.zeros(tensor.numel(), dtype=torch.bool)
        for label, part, num in pieces[name]:
            if any(fnmatchcase(label, pattern) for pattern in patterns):
                length = tensor.numel() // num
                mask[part * length : (part + 1) * length] = True
        if mask.any():
            chosen[name] = tensor
            masks.append(mask)
    whole = torch.cat(masks)
    return chosen, None if bool(whole.all()) else whole.nonzero()[:, 0]


def _pieces(name: str, tensor: Tensor) -> list[tuple[str, int, int]]:
    """Names of the three parts of a fused projection, with their place."""
    head, dot, last = name.rpartition(".")
    if not (dot and (head == "qkv" or head.endswith(".qkv")) and tensor.shape[0] % 3 == 0):
        return []
    return [(f"{head.removesuffix('qkv')}{part}.{last}", i, 3) for i, part in enumerate(_PARTS)]
