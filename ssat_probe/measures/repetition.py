"""How much blocks repeat each other: similarity of their rows of attention, query by query."""

import torch
from jaxtyping import Float
from torch import Tensor

# A row is degenerate if its standard deviation is below this many roundings of its mean, 1/n.
_DEGENERATE_ROUNDINGS = 8


def cosine_of_maps(
    weights: Float[Tensor, "block batch head query key"],
) -> Float[Tensor, "batch block block2 head query"]:
    """Cosine between the rows of attention of every two blocks, of heads with the same number.

    Rows have no negative entries, so that two that are nearly uniform have a cosine near 1 whatever they attend to:
    `correlation_of_maps` is free of that.

    Args:
        weights: Attention after softmax over the same keys in every block; 0 for keys that do not count.

    Returns:
        Between 0 (no key in common) and 1, float64; 1 between a block and itself.

    References:
        Zhou et al. (2021), "DeepViT", Eq. 2, https://arxiv.org/abs/2103.11886
    """
    return _products(weights.double())


def correlation_of_maps(
    weights: Float[Tensor, "block batch head query key"],
) -> Float[Tensor, "batch block block2 head query"]:
    """Correlation over the keys between the rows of attention of every two blocks, of heads with the same number.

    Args:
        weights: Attention after softmax over the same keys in every block; NaN for keys that do not count.

    Returns:
        Between -1 and 1, float64: 0 where one says nothing about the other. NaN where the weights of a row are equal
        up to rounding.
    """
    wide = weights.double()
    centred = (wide - wide.nanmean(-1, keepdim=True)).nan_to_num(nan=0.0)
    num_keys = (~wide.isnan()).sum(-1)
    rounding = _DEGENERATE_ROUNDINGS * torch.finfo(weights.dtype).eps / num_keys
    is_degenerate = (centred.square().sum(-1) / num_keys).sqrt() <= rounding
    return _products(centred.masked_fill(is_degenerate[..., None], torch.nan))


def _products(rows: Tensor) -> Tensor:
    """(block, batch, head, query, key) to products of unit rows (batch, block, block, head, query)."""
    units = (rows / rows.norm(dim=-1, keepdim=True)).permute(1, 2, 3, 0, 4)
    return (units @ units.mT).permute(0, 3, 4, 1, 2)
