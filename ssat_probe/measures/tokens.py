"""How alike the tokens of an image are: cosine similarity, three ranks, and the residual of rank collapse."""

import torch
from jaxtyping import Float
from torch import Tensor

# Centred tokens are all equal if their norm is below this many roundings of the norm before centring.
_DEGENERATE_ROUNDINGS = 8


def cosine_similarity(tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, " batch"]:
    """Mean cosine between two different tokens of an image: over-smoothing as it nears 1.

    Signed, without the diagonal, from the norm of the sum of the unit vectors, without a token × token matrix. For the
    convention of the code of Anti-Oversmoothing see `absolute_cosine_similarity`.

    Args:
        tokens: Patch tokens, at least two per image; a ValueError otherwise.

    Returns:
        Between -1/(tokens - 1) and 1, float64. NaN where a token is 0.

    Example:
        >>> cosine_similarity(torch.eye(3)[None])
        tensor([0.], dtype=torch.float64)

    References:
        Gong et al. (2021), "Vision transformers with patch diversification", https://arxiv.org/abs/2104.12753
    """
    count = _count(tokens)
    units = _units(tokens)
    return (units.sum(1).square().sum(-1) - count) / (count * (count - 1))


def absolute_cosine_similarity(tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, " batch"]:
    """Mean |cosine| over all pairs of tokens, each with itself included: parity ``anti_oversmoothing``.

    Args:
        tokens: Patch tokens, at least two per image; a ValueError otherwise.

    Returns:
        Between 1/tokens and 1, float64. NaN where a token is 0.

    References:
        Wang et al. (2022), "Anti-oversmoothing in deep vision transformers", Fig. 4, https://arxiv.org/abs/2203.05962
    """
    _count(tokens)
    units = _units(tokens)
    return (units @ units.mT).abs().mean((1, 2))


def singular_values(tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch value"]:
    """Singular values of each image's tokens, centred over the tokens.

    Args:
        tokens: Patch tokens, at least two per image; a ValueError otherwise.

    Returns:
        Descending, not negative, float64: `rank_ceiling` of them, since centring makes the last of min(token, dim) 0
        where there are not more tokens than channels. NaN where all tokens are equal up to rounding.
    """
    count, dim = _count(tokens), tokens.shape[2]
    wide = tokens.double()
    centred = wide - wide.mean(1, keepdim=True)
    values = torch.linalg.svdvals(centred)[:, : rank_ceiling(count, dim)]
    rounding = _DEGENERATE_ROUNDINGS * torch.finfo(tokens.dtype).eps
    is_degenerate = centred.square().sum((1, 2)).sqrt() <= rounding * wide.square().sum((1, 2)).sqrt()
    return values.masked_fill(is_degenerate[:, None], torch.nan)


def standardized(tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
    """Tokens with mean 0 and deviation 1 per channel over the positions of each image.

    So that few channels of very large activations do not decide cosines and ranks.

    Args:
        tokens: Patch tokens, at least two per image; a ValueError otherwise.

    Returns:
        Float64; channels that are constant up to rounding are 0.
    """
    _count(tokens)
    wide = tokens.double()
    centred = wide - wide.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    rounding = _DEGENERATE_ROUNDINGS * torch.finfo(tokens.dtype).eps
    is_constant = deviation <= rounding * wide.abs().amax(1, keepdim=True)
    return torch.where(is_constant, 0.0, centred / deviation)


def rank_ceiling(num_tokens: int, dim: int) -> int:
    """Largest rank that centred tokens can have.

    Args:
        num_tokens: Tokens of an image.
        dim: Channels of a token.

    Returns:
        min(num_tokens - 1, dim).
    """
    return min(num_tokens - 1, dim)


def effective_rank(values: Float[Tensor, "*entry value"]) -> Float[Tensor, "*entry"]:
    """Effective rank: the exponential of the entropy of the shares s / Σs.

    Args:
        values: Singular values, not negative.

    Returns:
        Between 1 and the number of values. NaN where all are 0.

    References:
        Roy & Vetterli (2007), "The effective rank"; Garrido et al. (2023), https://arxiv.org/abs/2210.02885 (RankMe)
    """
    return torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()


def energy_rank(values: Float[Tensor, "*entry value"]) -> Float[Tensor, "*entry"]:
    """Energy rank: the exponential of the entropy of the shares s² / Σs².

    Args:
        values: Singular values, not negative.

    Returns:
        Between 1 and the effective rank. NaN where all are 0.
    """
    return effective_rank(values.square())


def stable_rank(values: Float[Tensor, "*entry value"]) -> Float[Tensor, "*entry"]:
    """Stable rank: Σs² / max s², the inverse of the energy share of the first direction.

    Args:
        values: Singular values, not negative.

    Returns:
        Between 1 and the energy rank. NaN where all are 0.
    """
    squares = values.square()
    return squares.sum(-1) / squares.amax(-1)


def rank_collapse_residual(relative_variance: Float[Tensor, "*entry"]) -> Float[Tensor, "*entry"]:
    """Residual of rank collapse: ‖X - 1 x̄ᵀ‖ / ‖X‖ in the Frobenius norm, the root of the relative variance.

    Args:
        relative_variance: From `ssat_probe.measures.features.relative_variance`.

    Returns:
        Between 0 (all tokens equal) and 1.

    References:
        Dong et al. (2021), "Attention is not all you need", https://arxiv.org/abs/2103.03404 (there in another norm)
    """
    return relative_variance.sqrt()


def _units(tokens: Tensor) -> Tensor:
    wide = tokens.double()
    return wide / wide.norm(dim=-1, keepdim=True)


def _count(tokens: Tensor) -> int:
    count = tokens.shape[1]
    if count < 2:
        raise ValueError(f"Similarity of tokens needs at least 2 tokens per image, got {count}. Use smaller patches.")
    return count
