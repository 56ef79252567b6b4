"""Similarity of representations: centred kernel alignment (CKA) from Gram matrices of groups of images."""

import torch
from jaxtyping import Float
from torch import Tensor


def centred_gram(features: Float[Tensor, "image dim"]) -> Float[Tensor, "image image2"]:
    """Gram matrix of the features of a group of images, U-centred: all that CKA needs to know of them.

    The features are divided by their Frobenius norm, which CKA does not depend on; diagonal terms are left out, which
    makes sums of products of two such matrices unbiased.

    Args:
        features: One row per image, at least four.

    Returns:
        Symmetric, zero diagonal, rows that sum to 0, float64. 0 for features that are all 0.

    Raises:
        ValueError: If there are fewer than four rows.

    References:
        Székely & Rizzo (2014), "Partial distance correlation with methods for dissimilarities" (U-centring); Song et
        al. (2012), "Feature selection via dependence maximization", Eq. 5 (the same estimator of HSIC)
    """
    count = len(features)
    if count < 4:
        raise ValueError(f"Unbiased CKA needs groups of at least 4 images, got {count}. Look at more images.")
    wide = features.double()
    norm = wide.norm()
    wide = wide / torch.where(norm > 0, norm, 1)
    gram = (wide @ wide.mT).fill_diagonal_(0)
    rows = gram.sum(1) / (count - 2)
    centred = gram - rows[:, None] - rows[None] + gram.sum() / ((count - 1) * (count - 2))
    return centred.fill_diagonal_(0)


def hsic(
    first: Float[Tensor, "layer group image image2"], second: Float[Tensor, "layer2 group image image2"]
) -> Float[Tensor, "layer layer2"]:
    """Hilbert-Schmidt independence criterion between layers, unbiased, summed over groups of images.

    Args:
        first: `centred_gram` of every layer and group.
        second: Those of the same groups in other layers or another model.

    Returns:
        Float64; around 0, on either side, for independent features.
    """
    count = first.shape[-1]
    return torch.einsum("lgij,mgij->lm", first, second) / (count * (count - 3))


def cka(
    first: Float[Tensor, "layer group image image2"], second: Float[Tensor, "layer2 group image image2"]
) -> Float[Tensor, "layer layer2"]:
    """Centred kernel alignment between layers, linear kernel, unbiased, over groups ("mini-batches") of images.

    Conventions differ: the biased estimator, which some libraries ship, is nearly 1 for *independent* features of many
    channels.

    Args:
        first: `centred_gram` of every layer and group.
        second: Those of the same groups in other layers or another model.

    Returns:
        1 for features that differ by rotation, shift and scale, around 0 for independent ones; may lie slightly outside
        [0, 1], and is not clamped. NaN where a layer's own HSIC is not positive, as for constant features.

    References:
        Kornblith et al. (2019), https://arxiv.org/abs/1905.00414; Nguyen et al. (2021), https://arxiv.org/abs/2010.15327
        (groups, unbiased)
    """
    own, other = (_own(one) for one in (first, second))
    return hsic(first, second) / (own[:, None] * other[None]).sqrt()


def shuffled(grams: Float[Tensor, "layer group image image2"]) -> Float[Tensor, "layer group image image2"]:
    """The Grams as if every image had been taken for another of its group: a reference for unrelated features.

    Args:
        grams: `centred_gram` of every layer and group.

    Returns:
        Images moved by half a group.
    """
    half = grams.shape[-1] // 2
    return grams.roll((half, half), dims=(-2, -1))


def _own(grams: Tensor) -> Tensor:
    """HSIC of every layer with itself; NaN where it is not positive beyond rounding."""
    count = grams.shape[-1]
    found = grams.square().sum((1, 2, 3)) / (count * (count - 3))
    return torch.where(found > torch.finfo(torch.float64).eps ** 2, found, torch.nan)
