"""Loss terms, and the masked reconstruction error that every objective and probe shares."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ssat_probe.patches import Features, patchify, taken, unpatchify


class Losses(NamedTuple):
    """What an objective returns for a batch: the total to minimise, and its unweighted terms."""

    total: Float[Tensor, ""]
    cross_entropy: Float[Tensor, ""] | None = None
    reconstruction: Float[Tensor, ""] | None = None
    logits: Float[Tensor, "batch class"] | None = None
    auxiliary: Float[Tensor, ""] | None = None
    "Of a self-supervised task that reconstructs nothing."


def reconstruction_error(
    encoder: Any,
    decoder: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    mask: Bool[Tensor, "batch token"],
    norm_pix: bool,
    distance: str = "mse",
    features: Features | None = None,
    target: Float[Tensor, "batch channel height width"] | None = None,
) -> Float[Tensor, " batch"]:
    """Mean squared (or absolute) error of the predicted pixels over the hidden patches, per image.

    Args:
        encoder: Encodes the visible patches; its ``encode`` gives ``Features``, whose grid says how large a patch is.
        decoder: Predicts every patch from them.
        images: Normalised images.
        mask: True at hidden patches; the same count in every row.
        norm_pix: Normalise the target within each patch first.
        distance: ``mse``, or ``l1`` for absolute errors (Xie et al., 2022, Sec. 3.4).
        features: What the encoder made of the masked images, where that is known already.
        target: Images whose pixels are to be predicted, where these are not ``images``.

    Returns:
        In units of the normalised pixels squared; of the normalised pixels for ``l1``.

    References:
        He et al. (2022), Sec. 3: mean over the pixels of a patch, then over the hidden patches.
    """
    features = encoder.encode(images, mask) if features is None else features
    patch_size = tuple(size // count for size, count in zip(images.shape[2:], features.grid, strict=True))
    predicted = predicted_patches(decoder, features, hidden_only=True)
    pixels = target_of(images if target is None else target, patch_size, norm_pix)
    distance_of = F.l1_loss if distance == "l1" else F.mse_loss
    if predicted.shape[1] < pixels.shape[1]:
        return distance_of(predicted, taken(pixels, features.hidden_ids), reduction="none").mean(dim=(1, 2))
    per_patch = distance_of(predicted, pixels, reduction="none").mean(dim=2)
    mask = mask.to(images.device)
    return (per_patch * mask).sum(dim=1) / mask.sum(dim=1)


def predicted_patches(
    decoder: nn.Module, features: Features, *, hidden_only: bool = False
) -> Float[Tensor, "batch chosen value"]:
    """What the decoder makes of the patches.

    Args:
        decoder: Predicts every patch.
        features: Of the visible ones.
        hidden_only: Leave out the visible ones where the encoder has left out the others.

    Returns:
        One row of pixels per patch, to be compared with `target_of`, or per patch of ``features.hidden_ids``.
    """
    return _at_least_float32(decoder(features, hidden_only=hidden_only))


def target_of(
    images: Float[Tensor, "batch channel height width"], patch_size: tuple[int, ...], norm_pix: bool
) -> Float[Tensor, "batch token value"]:
    """Pixels to predict.

    Args:
        images: Normalised images.
        patch_size: Height and width of a patch in pixels.
        norm_pix: Give each patch mean 0 and (unbiased) variance 1, with 1e-6 added to the variance.

    Returns:
        One row of pixels per patch.
    """
    target = _at_least_float32(patchify(images, patch_size))
    if not norm_pix:
        return target
    mean, variance = target.mean(dim=2, keepdim=True), target.var(dim=2, keepdim=True)
    return (target - mean) / (variance + 1e-6).sqrt()


def reconstructed(
    encoder: Any,
    decoder: nn.Module,
    images: Float[Tensor, "batch channel height width"],
    mask: Bool[Tensor, "batch token"],
    norm_pix: bool,
) -> Float[Tensor, "batch channel height width"]:
    """Images whose hidden patches are what the decoder makes of the visible ones.

    Args:
        encoder: Encodes the visible patches.
        decoder: Predicts every patch from them.
        images: Normalised images.
        mask: True at hidden patches.
        norm_pix: The decoder predicts pixels normalised within each patch, whose own mean and deviation are put back.

    Returns:
        Normalised images; visible patches as they are.
    """
    features = encoder.encode(images, mask)
    patch_size = tuple(size // count for size, count in zip(images.shape[2:], features.grid, strict=True))
    patches = patchify(images, patch_size)
    decoded = decoder(features).to(patches.dtype)
    if norm_pix:
        mean, variance = patches.mean(dim=2, keepdim=True), patches.var(dim=2, keepdim=True)
        decoded = decoded * (variance + 1e-6).sqrt() + mean
    return unpatchify(torch.where(mask.to(images.device)[:, :, None], decoded, patches), patch_size, features.grid)


def _at_least_float32(values: Tensor) -> Tensor:
    """Losses are taken in float32 under mixed precision, in float64 where the model is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
