"""Mixup and CutMix: each image of a batch mixed with another, and its class with the other's."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssat_probe.sharing import share_of, whole

Images = Float[Tensor, "batch channel height width"]


def mix(
    images: Images, labels: Int[Tensor, " batch"], *, mixup: float, cutmix: float
) -> tuple[Images, Int[Tensor, " batch"], float]:
    """Images mixed pairwise, at random, by one of the two ways; where both are asked for, each in half of the calls.

    The share λ of the image itself is drawn once per call from Beta(α, α). Mixup blends, λ·x + (1-λ)·x'; CutMix puts
    in a box of the area 1-λ, centred anywhere and cut off at the border; λ is then the area that is left. Randomness
    comes from torch's global generator. Partners are sought in the whole batch where processes share one.

    Args:
        images: Normalised.
        labels: Class of each.
        mixup: α of mixup; 0 switches it off.
        cutmix: α of CutMix; 0 switches it off.

    Returns:
        Mixed images, the class of each one's partner, and λ: the loss is λ times that of the own class plus 1-λ times
        that of the partner's.

    References:
        Zhang et al. (2018), https://arxiv.org/abs/1710.09412, Eq. 1; Yun et al. (2019),
        https://arxiv.org/abs/1905.04899, Eqs. 1 and 2.
    """
    is_cut = cutmix > 0 and (mixup == 0 or float(torch.rand(())) < 0.5)
    alpha = cutmix if is_cut else mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    own = share_of(len(images))
    partners = own.of(torch.randperm(own.total)).to(images.device)
    others, classes = whole(images)[partners], whole(labels)[partners]
    if not is_cut:
        return share * images + (1 - share) * others, classes, share
    top, bottom, left, right = _box(images.shape[2], images.shape[3], 1 - share)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed, classes, 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])


def _box(height: int, width: int, area: float) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a box of this share of an image, centred anywhere and cut off at the border."""
    tall, wide = round(height * area**0.5), round(width * area**0.5)
    down, across = int(torch.randint(height, ())), int(torch.randint(width, ()))
    top, left = down - tall // 2, across - wide // 2
    return max(top, 0), min(top + tall, height), max(left, 0), min(left + wide, width)
