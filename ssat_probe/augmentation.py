"""Random changes to training images, in batches of uint8; all randomness comes from the generator passed in."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from ssat_probe.images import Facts
from ssat_probe.registry import known
from ssat_probe.sharing import Share

NAMES = ("none", "crop", "standard", "strong")

Pixels = UInt8[Tensor, "batch channel height width"]

NUM_OPERATIONS, MAGNITUDE, MAGNITUDE_STD, CHANCE = 2, 9.0, 0.5, 0.5
"RandAugment as MAE fine-tunes with it, `rand-m9-mstd0.5-inc1`: He et al. (2021), Table 9, in the notation of timm."

CROP_AREA, CROP_ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
"Szegedy et al. (2014), Sec. 6, https://arxiv.org/abs/1409.4842."

ERASE_CHANCE, ERASE_AREA, ERASE_ASPECT = 0.25, (0.02, 1 / 3), (0.3, 1 / 0.3)
"He et al. (2021), Table 9, and Zhong et al. (2017), Sec. 3.2, https://arxiv.org/abs/1708.04896."


def augment(pixels: Pixels, name: str, facts: Facts, generator: torch.Generator, share: Share | None = None) -> Pixels:
    """Images changed at random, each in its own way.

    ``none``: unchanged. ``crop``: the border is widened by an eighth of the image (at least one pixel) in the mean
    colour and an image is cut out anywhere. ``standard``: crop, and every second image mirrored where that keeps the
    class. ``strong``: the recipe of MAE fine-tuning, which is also the paper's: a random part of the image scaled up,
    mirrored where that keeps the class, RandAugment, and in a quarter of the images a rectangle of noise. The part is
    cut from the image at its training size, not from a larger original.

    Args:
        pixels: 0 to 255, on the CPU.
        name: One of ``NAMES``.
        facts: Of the data set: mean colour, and whether mirroring keeps the class.
        generator: On the CPU; the only source of randomness.
        share: Which part of a larger batch these images are; they are changed as they would be in the whole of it,
            so that the number of processes that share a batch is no matter.

    Returns:
        As ``pixels``, which stay as they are.

    References:
        He et al. (2021), https://arxiv.org/abs/2111.06377; Cubuk et al. (2019), https://arxiv.org/abs/1909.13719.
    """
    return augment_and_keep(pixels, name, facts, generator, share)[0]


def augment_and_keep(
    pixels: Pixels, name: str, facts: Facts, generator: torch.Generator, share: Share | None = None
) -> tuple[Pixels, Pixels]:
    """Images changed as ``augment`` does, and what they were before their colours changed.

    Args:
        pixels: 0 to 255, on the CPU.
        name: One of ``NAMES``.
        facts: Of the data set: mean colour, and whether mirroring keeps the class.
        generator: On the CPU; the only source of randomness.
        share: Which part of a larger batch these images are.

    Returns:
        The changed images; and the same, cut out and mirrored alike, before RandAugment and erasing, if there are any.
    """
    known(name, NAMES, "augmentations")
    if name == "none" or not len(pixels):
        return pixels, pixels
    draws = _Draws(generator, share or Share(0, 1, len(pixels)))
    changed = _crop(pixels, facts, draws) if name != "strong" else _resized_crop(pixels, draws)
    if name != "crop" and facts.flip:
        changed = _flip(changed, draws)
    clean = changed
    if name == "strong":
        for _ in range(NUM_OPERATIONS):
            changed = _random_operation(changed, facts, draws)
        changed = _erase(changed, facts, draws)
    return changed, clean


@dataclass(frozen=True)
class _Draws:
    """Random numbers, a row per image: drawn for the whole batch, of which a process keeps its share."""

    generator: torch.Generator
    share: Share

    def rand(self) -> Tensor:
        return self.share.of(torch.rand(self.share.total, generator=self.generator))

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        return self.share.of(torch.randn((self.share.total, *shape), generator=self.generator))

    def randint(self, low: int, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        return self.share.of(torch.randint(low, high, (self.share.total, *shape), generator=self.generator))


def _crop(pixels: Pixels, facts: Facts, draws: _Draws) -> Pixels:
    num_images, channels, height, width = pixels.shape
    down, right = max(1, height // 8), max(1, width // 8)
    padded = _bytes(_colour(facts) * 255).repeat(num_images, 1, height + 2 * down, width + 2 * right)
    padded[..., down:-down, right:-right] = pixels
    tops = draws.randint(0, 2 * down + 1, (1,))
    lefts = draws.randint(0, 2 * right + 1, (1,))
    rows, columns = tops + torch.arange(height), lefts + torch.arange(width)
    return padded[
        torch.arange(num_images)[:, None, None, None],
        torch.arange(channels)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def _flip(pixels: Pixels, draws: _Draws) -> Pixels:
    mirrored = draws.rand() < 0.5
    return torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)


def _resized_crop(pixels: Pixels, draws: _Draws) -> Pixels:
    height, width = _box(pixels, CROP_AREA, CROP_ASPECT, draws)
    # Both in [-1, 1], where the image reaches from -1 to 1: the centre of the box.
    down = (1 - height) * (2 * draws.rand() - 1)
    right = (1 - width) * (2 * draws.rand() - 1)
    none = torch.zeros_like(down)
    return _bytes(_warped(pixels.float(), (width, none, right, none, height, down), "border"))


def _erase(pixels: Pixels, facts: Facts, draws: _Draws) -> Pixels:
    inside = _random_boxes(pixels, draws)
    inside &= (draws.rand() < ERASE_CHANCE)[:, None, None, None]
    noise = draws.randn(tuple(pixels.shape[1:])) * torch.tensor(facts.std).view(-1, 1, 1) + _colour(facts)
    return torch.where(inside, _bytes(noise * 255), pixels)


def _random_boxes(pixels: Pixels, draws: _Draws) -> Bool[Tensor, "batch one height width"]:
    """Where a pixel's centre lies in the random rectangle of its image."""
    inside = torch.ones(len(pixels), 1, 1, 1, dtype=torch.bool)
    for share, size, axis in zip(_box(pixels, ERASE_AREA, ERASE_ASPECT, draws), pixels.shape[-2:], (2, 3), strict=True):
        length = (share * size).round().clamp(min=1)
        start = (draws.rand() * (size - length + 1)).floor()
        position = torch.arange(size)
        along = (position >= start[:, None]) & (position < (start + length)[:, None])
        inside = inside & along.view(len(pixels), 1, *((size, 1) if axis == 2 else (1, size)))
    return inside


def _box(
    pixels: Pixels, area: tuple[float, float], aspect: tuple[float, float], draws: _Draws
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Height and width of a random box as shares of the image's; one that sticks out is cut off."""
    height, width = pixels.shape[-2:]
    areas = _uniform(area[0], area[1], draws)
    ratios = _uniform(math.log(aspect[0]), math.log(aspect[1]), draws).exp()
    return (
        (areas / ratios * width / height).sqrt().clamp(max=1),
        (areas * ratios * height / width).sqrt().clamp(max=1),
    )


class _Draw(NamedTuple):
    """What was drawn for the images that undergo one operation."""

    level: Float[Tensor, "batch 1 1 1"]
    "Strength from 0 to 1."
    sign: Float[Tensor, "batch 1 1 1"]
    "-1 or 1."
    colour: Float[Tensor, "1 channel 1 1"]
    "Of what lies outside the image, 0 to 255."


def _random_operation(pixels: Pixels, facts: Facts, draws: _Draws) -> Pixels:
    """One operation on about half of the images, images with the same operation together."""
    chosen = draws.randint(0, len(OPERATIONS))
    chosen[draws.rand() >= CHANCE] = -1
    level = (draws.randn((1, 1, 1)) * MAGNITUDE_STD + MAGNITUDE).clamp(0, 10) / 10
    sign = draws.randint(0, 2, (1, 1, 1)) * 2.0 - 1
    changed = pixels.clone()
    for number, operation in enumerate(OPERATIONS.values()):
        members = (chosen == number).nonzero().flatten()
        if len(members):
            draw = _Draw(level[members], sign[members], _colour(facts) * 255)
            changed[members] = _bytes(operation(pixels[members].float(), draw))
    return changed


Values = Float[Tensor, "batch channel height width"]


def _rotated(values: Values, draw: _Draw) -> Values:
    angle = (draw.sign * draw.level * math.radians(30)).flatten()
    height, width = values.shape[-2:]
    none = torch.zeros_like(angle)
    sine, cosine = angle.sin(), angle.cos()
    return _moved(values, draw, (cosine, -sine * height / width, none, sine * width / height, cosine, none))


def _sheared(values: Values, draw: _Draw, *, along_x: bool) -> Values:
    shear = (draw.sign * draw.level * 0.3).flatten()
    height, width = values.shape[-2:]
    one, none = torch.ones_like(shear), torch.zeros_like(shear)
    if along_x:
        return _moved(values, draw, (one, shear * height / width, none, none, one, none))
    return _moved(values, draw, (one, none, none, shear * width / height, one, none))


def _translated(values: Values, draw: _Draw, *, along_x: bool) -> Values:
    shift = (draw.sign * draw.level * 0.45 * 2).flatten()  # the image is 2 wide in these coordinates
    one, none = torch.ones_like(shift), torch.zeros_like(shift)
    return _moved(values, draw, (one, none, shift * along_x, none, one, shift * (not along_x)))


def _moved(values: Values, draw: _Draw, entries: tuple[Tensor, ...]) -> Values:
    return _warped(values - draw.colour, entries, "zeros") + draw.colour


def _warped(values: Values, entries: tuple[Tensor, ...], outside: str) -> Values:
    # The entries are the two rows of the map from a position in the result to the one sampled, x first, from -1 to 1.
    theta = torch.stack(entries, dim=-1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(values.shape), align_corners=False)
    return F.grid_sample(values, grid, mode="bicubic", padding_mode=outside, align_corners=False)


def _blended(values: Values, draw: _Draw, other: Tensor) -> Values:
    """Away from the other image or towards it, by up to 90 %."""
    factor = (1 + draw.sign * draw.level * 0.9).clamp(min=0.1)
    return other + factor * (values - other)


def _grey(values: Values) -> Float[Tensor, "batch 1 height width"]:
    """Luma of ITU-R BT.601."""
    if values.shape[1] == 1:
        return values
    return (values * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def _smooth(values: Values) -> Values:
    """Mean over 3x3 with weight 5 in the middle, as Pillow's SMOOTH."""
    neighbours = F.avg_pool2d(F.pad(values, (1, 1, 1, 1), mode="replicate"), 3, stride=1) * 9
    return (neighbours + 4 * values) / 13


def _posterised(values: Values, draw: _Draw) -> Values:
    step = 2.0 ** (4 + (draw.level * 4).floor())  # 4 bits are kept at level 0, none at level 1
    return (values / step).floor() * step


def _solarised(values: Values, draw: _Draw) -> Values:
    return torch.where(values < 256 - (draw.level * 256).floor(), values, 255 - values)


def _brightened_in_the_dark(values: Values, draw: _Draw) -> Values:
    return torch.where(values < 128, values + (draw.level * 110).floor(), values)


OPERATIONS: dict[str, Callable[[Tensor, _Draw], Tensor]] = {
    "auto_contrast": lambda values, draw: transforms.autocontrast(_bytes(values)).float(),
    "equalise": lambda values, draw: transforms.equalize(_bytes(values)).float(),
    "invert": lambda values, draw: 255 - values,
    "rotate": _rotated,
    "posterise": _posterised,
    "solarise": _solarised,
    "solarise_add": _brightened_in_the_dark,
    "colour": lambda values, draw: _blended(values, draw, _grey(values)),
    "contrast": lambda values, draw: _blended(values, draw, _grey(values).mean((1, 2, 3), keepdim=True)),
    "brightness": lambda values, draw: _blended(values, draw, torch.zeros(())),
    "sharpness": lambda values, draw: _blended(values, draw, _smooth(values)),
    "shear_x": lambda values, draw: _sheared(values, draw, along_x=True),
    "shear_y": lambda values, draw: _sheared(values, draw, along_x=False),
    "translate_x": lambda values, draw: _translated(values, draw, along_x=True),
    "translate_y": lambda values, draw: _translated(values, draw, along_x=False),
}
"The fifteen of timm's RandAugment in its `inc1` form, where every level means more change."


def _uniform(low: float, high: float, draws: _Draws) -> Float[Tensor, " batch"]:
    return draws.rand() * (high - low) + low


def _colour(facts: Facts) -> Float[Tensor, "1 channel 1 1"]:
    return torch.tensor(facts.mean).view(1, -1, 1, 1)


def _bytes(values: Tensor) -> UInt8[Tensor, "..."]:
    return values.round().clamp(0, 255).to(torch.uint8)
