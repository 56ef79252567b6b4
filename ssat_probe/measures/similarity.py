"""Similarity of representations: centred kernel alignment (CKA) from Gram matrices of groups of images."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssat_probe.measures.bootstrap import NUM_RESAMPLES, ends, resample_counts

# Bounds the memory of the resamples' counts: 2 MB. Tuned, no source.
_IMAGES_AT_A_TIME = 256


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


def contributions(
    first: Float[Tensor, "layer group image image2"], second: Float[Tensor, "layer2 group image image2"]
) -> Float[Tensor, "layer layer2 group image"]:
    """What each image contributes to the HSIC of its group: n U - (n - 1) U without the image, U being unbiased.

    Leaving an image out of a U-centred pair of Grams needs nothing but the products in its row, so that no Gram is
    centred anew: (2 (n - 2) Σⱼ KᵢⱼLᵢⱼ - Σᵢⱼ KᵢⱼLᵢⱼ) / ((n - 3)(n - 4)).

    Args:
        first: `centred_gram` of every layer and group.
        second: Those of the same groups in other layers or another model.

    Returns:
        Float64; their mean is the unbiased HSIC, as a U-statistic's pseudo-values are. NaN in groups of four.

    References:
        Arvesen (1969), "Jackknifing U-statistics", https://doi.org/10.1214/aoms/1177697287
    """
    count = first.shape[-1]
    rows = torch.einsum("lgij,mgij->lmgi", first, second)
    if count == 4:
        return torch.full_like(rows, torch.nan)
    return (2 * (count - 2) * rows - rows.sum(-1, keepdim=True)) / ((count - 3) * (count - 4))


def cka_spread(
    first: Float[Tensor, "layer group image image2"],
    second: Float[Tensor, "layer2 group image image2"],
    ids: Int[Tensor, "group image"],
) -> dict[str, Float[Tensor, "... layer layer2"]]:
    """How sure a `cka` is: bootstrap over the images of what each of them contributes to the three HSIC.

    Drawing rows of the Grams with repetition would pair an image with itself, which no unbiased estimator may see, and
    drawing whole groups needs many of them; so the contributions are drawn, in each resample the ratio is taken anew.
    Where two layers are independent the contributions overstate the spread: then the interval is too wide.

    Args:
        first: `centred_gram` of every layer and group.
        second: Those of the same groups in other layers or another model.
        ids: Number of each image within the sample; an image may be in several groups.

    Returns:
        ``sd`` over images of the linearised contributions to the ratio (over √images the jackknife's standard error),
        ``low`` and ``high`` ends of the 95 % interval, and ``replicates``, the ratio in each resample: two models that
        saw the same images are resampled alike. Float64; NaN where `cka` is, and in groups of four.
    """
    images, places = ids.flatten().unique(return_inverse=True)
    pairs, own, other = (
        _by_image(one, places, len(images))
        for one in (contributions(first, second), _own_contributions(first), _own_contributions(second))
    )
    sums = [torch.zeros(*one.shape[:-1], NUM_RESAMPLES, dtype=torch.float64) for one in (pairs, own, other)]
    for start in range(0, len(images), _IMAGES_AT_A_TIME):
        chunk = slice(start, start + _IMAGES_AT_A_TIME)
        counts = resample_counts(images[chunk])
        for total, one in zip(sums, (pairs, own, other), strict=True):
            total += one[..., chunk] @ counts
    squares = sums[1][:, None] * sums[2][None]
    is_defined = (sums[1][:, None] > 0) & (sums[2][None] > 0) & ~cka(first, second).isnan()[..., None]
    replicates = (sums[0] / squares.where(is_defined, torch.nan).sqrt()).movedim(-1, 0)
    low, high = ends(replicates)
    mine, theirs = _own(first) / len(ids), _own(second) / len(ids)
    scale = (mine[:, None] * theirs[None]).sqrt()
    shares = (own / mine[:, None])[:, None] + (other / theirs[:, None])[None]
    parts = pairs / scale[..., None] + cka(first, second)[..., None] * (1 - shares / 2)
    return {"sd": parts.std(-1), "low": low, "high": high, "replicates": replicates}


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


def _own_contributions(grams: Tensor) -> Tensor:
    """(layer, group, image): `contributions` of every layer with itself."""
    return torch.cat([contributions(one[None], one[None])[0] for one in grams])


def _by_image(parts: Tensor, places: Tensor, num_images: int) -> Tensor:
    """(*layer, group, image) to (*layer, image of the sample): mean over the groups that an image is in."""
    sums = parts.new_zeros(*parts.shape[:-2], num_images).index_add_(-1, places, parts.flatten(-2))
    return sums / places.bincount(minlength=num_images)
