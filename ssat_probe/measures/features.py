"""How features differ over the positions of an image."""

from jaxtyping import Float
from torch import Tensor


def feature_map_variance(tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, " batch"]:
    """Variance of the features over the positions of each image, mean over channels.

    Conventions differ: ours is over positions within an image, unbiased (n - 1), as in the code of Park & Kim; the
    variance over images is another quantity.

    Args:
        tokens: Patch tokens of the residual stream, at least two per image, without class and register tokens.

    Returns:
        Unit of the features squared, not negative, float64.

    Raises:
        ValueError: If there are fewer than two tokens.

    Example:
        >>> import torch
        >>> feature_map_variance(torch.tensor([[[1.0], [-1.0], [1.0], [-1.0]]]))
        tensor([1.3333], dtype=torch.float64)

    References:
        Park & Kim (2022), "How do vision transformers work?", Fig. 9, https://arxiv.org/abs/2202.06709
    """
    if tokens.shape[1] < 2:
        raise ValueError(
            f"The variance over positions needs at least 2 tokens per image, got {tokens.shape[1]}. "
            "Use smaller patches."
        )
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


def gain(before: Float[Tensor, "*entry"], after: Float[Tensor, "*entry"]) -> Float[Tensor, "*entry"]:
    """By how many doublings a variance grows over a step.

    Args:
        before: Variance before the step, not negative.
        after: Variance after it.

    Returns:
        log2(after / before): 1 for doubled, negative where the step averages features. NaN where both are 0.
    """
    return (after / before).log2()
