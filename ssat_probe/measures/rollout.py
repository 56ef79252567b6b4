"""Attention rollout: attention followed through all blocks down to the input."""

import torch
from jaxtyping import Float
from torch import Tensor


def rollout(blocks: Float[Tensor, "block batch head query key"]) -> Float[Tensor, "batch query key"]:
    """How much each token after the last block draws on each token of the input, by attention and skip connections.

    Heads are averaged, half of every row is the token itself (the skip connection), and the blocks' matrices are
    multiplied, the last one leftmost. Values, MLPs and the sizes of the branches are ignored.

    Args:
        blocks: Attention over all tokens, first block first; rows sum to 1.

    Returns:
        Rows that sum to 1, float64.

    References:
        Abnar & Zuidema (2020), "Quantifying attention flow in transformers", Sec. 3, https://arxiv.org/abs/2005.00928
    """
    found = torch.eye(blocks.shape[-1], dtype=torch.float64, device=blocks.device).expand(blocks.shape[1], -1, -1)
    for weights in blocks:
        found = with_block(found, weights)
    return found


def with_block(
    below: Float[Tensor, "batch query key"], weights: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch query key"]:
    """Rollout one block further.

    Args:
        below: Rollout of the blocks before.
        weights: Attention of the block over all tokens; rows sum to 1.

    Returns:
        Rows that sum to 1, float64.
    """
    own = torch.eye(weights.shape[-1], dtype=torch.float64, device=weights.device)
    return (weights.double().mean(1) + own) / 2 @ below
