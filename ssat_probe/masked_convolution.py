"""Convolutions of which hidden places are no part: they carry nothing in, and no query looks at them (ConvMAE)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Visible = Bool[Tensor, "batch 1 row column"]


def shown(
    maps: Float[Tensor, "batch channel row column"], visible: Visible | None
) -> Float[Tensor, "batch channel row column"]:
    """What a convolution is given: zeros at hidden places.

    Args:
        maps: Tokens as a map.
        visible: True at visible places; none where nothing is hidden.

    Returns:
        The same at visible places, whatever the hidden ones hold.

    References:
        Gao et al. (2022), https://arxiv.org/abs/2205.03892, Sec. 3.2.
    """
    return maps if visible is None else torch.where(visible, maps, 0.0)


def keys_seen(visible: Visible | None, num_prefix: int) -> Bool[Tensor, "batch 1 1 key"] | None:
    """Which keys may be looked at: those whose 3x3 window, on every second place, holds anything visible.

    Args:
        visible: True at visible places; none where nothing is hidden.
        num_prefix: Keys in front of those of the map, which always may.

    Returns:
        A mask for attention; none where nothing is hidden.
    """
    if visible is None:
        return None
    seen = F.max_pool2d(visible.float(), 3, 2, 1).flatten(2)[:, None] > 0
    return torch.cat([seen.new_ones(len(seen), 1, 1, num_prefix), seen], dim=3)


def at_stage(visible: Visible, factor: int) -> Bool[Tensor, "batch 1 finer_row finer_column"]:
    """Places of a finer map, of which each hidden unit has ``factor`` in a row and as many in a column.

    Args:
        visible: By unit.
        factor: At least 1.

    Returns:
        By place.
    """
    return visible.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
