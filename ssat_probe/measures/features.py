"""How features differ over the positions of an image."""

from jaxtyping import Float
from torch import Tensor


def feature_map_variance(tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, " batch"]:
    """Variance of the features over the positions of each image, mean over channels.

    Conventions differ: ours is over positions within an image, unbiased (n - 1), as in the code of Park & Kim; the
    variance over images is another quantity.

    Args:
        tokens: Patch tokens of the residual stream, at least two per image (else a ValueError), without class and
            register tokens.

    Returns:
        Unit of the features squared, not negative, float64.

    Example:
        >>> import torch
        >>> feature_map_variance(torch.tensor([[[1.0], [-1.0], [1.0], [-1.0]]]))
        tensor([1.3333], dtype=torch.float64)

    References:
        Park & Kim (2022), "How do vision transformers work?", Fig. 9, https://arxiv.org/abs/2202.06709
    """
    _checked(tokens)
    return tokens.double().var(dim=1, correction=1).mean(-1)


def relative_variance(tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, " batch"]:
    """Share of each image's feature energy that differs over the positions: Σ‖x - mean‖² / Σ‖x‖².

    The scale-free form of `feature_map_variance`: comparable between blocks, widths and models, because the residual
    stream grows with depth. Its square root is the residual of rank collapse.

    Args:
        tokens: Patch tokens of the residual stream, without class and register tokens.

    Returns:
        Between 0 (all positions equal) and 1 (mean over positions is 0), float64. NaN where all features are 0.

    References:
        Dong et al. (2021), "Attention is not all you need", https://arxiv.org/abs/2103.03404 (the residual)
    """
    tokens = tokens.double()
    centred = tokens - tokens.mean(1, keepdim=True)
    return centred.square().sum((1, 2)) / tokens.square().sum((1, 2))


def both_variances(
    tokens: Float[Tensor, "batch token dim"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """`feature_map_variance` and `relative_variance` from one pass: Σ‖x‖² = Σ‖x - mean‖² + tokens · ‖mean‖².

    Args:
        tokens: Patch tokens of the residual stream, at least two per image, without class and register tokens.

    Returns:
        Sums over the tokens in their own precision, everything else in float64.
    """
    count, dim = _checked(tokens), tokens.shape[2]
    mean = tokens.mean(1, keepdim=True)
    varying = (tokens - mean).square_().sum(1).double().sum(1)
    everything = varying + count * mean.double().square().sum((1, 2))
    return varying / ((count - 1) * dim), varying / everything


def park_kim_variance(tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, " batch"]:
    """Parity with the code of Park & Kim: variance over height and width, mean over channels, in the tokens' precision.

    `feature_map_variance` is the same up to rounding.

    Args:
        tokens: Patch tokens of the residual stream, without class and register tokens.

    Returns:
        Unit of the features squared.
    """
    return tokens.var(dim=1).mean(-1)


def gain(before: Float[Tensor, "*entry"], after: Float[Tensor, "*entry"]) -> Float[Tensor, "*entry"]:
    """By how many doublings a variance grows over a step.

    Args:
        before: Variance before the step, not negative.
        after: Variance after it.

    Returns:
        log2(after / before): 1 for doubled, negative where the step averages features. NaN where both are 0.
    """
    return (after / before).log2()


def _checked(tokens: Tensor) -> int:
    count = tokens.shape[1]
    if count < 2:
        raise ValueError(
            f"The variance over positions needs at least 2 tokens per image, got {count}. Use smaller patches."
        )
    return count
