"""The masked reconstruction error by value, against numpy and closed forms."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ssat_probe.losses import reconstruction_error, target_of
from ssat_probe.network import build_decoder, build_encoder
from ssat_probe.patches import random_mask

Make = Callable[..., tuple]
BATCH, CHANNELS, PATCH, GRID = 5, 3, (2, 3), (3, 5)
IMG_SIZE = (GRID[0] * PATCH[0], GRID[1] * PATCH[1])
VALUES = PATCH[0] * PATCH[1] * CHANNELS


@pytest.fixture
def parts(make_recipe: Make, generator: Callable[[str], torch.Generator]) -> tuple:
    """Encoder, decoder, images, mask; float64."""
    recipe, facts = make_recipe(IMG_SIZE, CHANNELS, patch_size=PATCH, mask_ratio=0.6)
    images = torch.randn(BATCH, CHANNELS, *IMG_SIZE, generator=generator("images"), dtype=torch.float64)
    mask = random_mask(torch.rand(BATCH, GRID[0] * GRID[1], generator=generator("mask")), recipe.mask_ratio)
    return build_encoder(recipe, facts).double(), build_decoder(recipe, facts).double(), images, mask


def by_hand(images: Tensor) -> np.ndarray:
    """Patches (image, patch, value), cut out one by one."""
    pixels = images.numpy()
    cut = [
        pixels[:, :, row * PATCH[0] : (row + 1) * PATCH[0], column * PATCH[1] : (column + 1) * PATCH[1]]
        for row in range(GRID[0])
        for column in range(GRID[1])
    ]
    return np.stack([patch.transpose(0, 2, 3, 1).reshape(len(pixels), -1) for patch in cut], axis=1)


def predicts(decoder: torch.nn.Module, patch: Tensor) -> None:
    """Make the decoder predict the same patch everywhere."""
    with torch.no_grad():
        decoder.pred.weight.zero_()
        decoder.pred.bias.copy_(patch)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_zero_prediction_costs_the_mean_square_of_the_hidden_pixels(parts: tuple, *, norm_pix: bool) -> None:
    encoder, decoder, images, mask = parts
    predicts(decoder, torch.zeros(VALUES))
    target = by_hand(images)
    if norm_pix:
        target = target - target.mean(axis=2, keepdims=True)
        target /= np.sqrt((target**2).sum(axis=2, keepdims=True) / (VALUES - 1) + 1e-6)
    expected = [(target[n][mask[n].numpy()] ** 2).mean() for n in range(BATCH)]
    got = reconstruction_error(encoder, decoder, images, mask, norm_pix)
    np.testing.assert_allclose(got.detach(), expected, rtol=1e-12)


def test_perfect_prediction_costs_nothing(parts: tuple, generator: Callable[[str], torch.Generator]) -> None:
    encoder, decoder, _, mask = parts
    patch = torch.randn(PATCH[0], PATCH[1], CHANNELS, generator=generator("patch"), dtype=torch.float64)
    predicts(decoder, patch.flatten())
    images = patch.permute(2, 0, 1).repeat(BATCH, 1, GRID[0], GRID[1])
    assert reconstruction_error(encoder, decoder, images, mask, norm_pix=False).abs().max() == 0


def test_any_prediction_is_averaged_over_a_patch_and_then_over_the_hidden_patches(parts: tuple) -> None:
    encoder, decoder, images, mask = parts
    with torch.no_grad():
        predicted = decoder(encoder.encode(images, mask)).numpy()
    per_patch = ((predicted - by_hand(images)) ** 2).sum(axis=2) / VALUES
    expected = [per_patch[n][mask[n].numpy()].sum() / int(mask[n].sum()) for n in range(BATCH)]
    got = reconstruction_error(encoder, decoder, images, mask, norm_pix=False)
    np.testing.assert_allclose(got.detach(), expected, rtol=1e-12)


def test_visible_pixels_have_no_part_in_the_error_but_through_the_encoder(parts: tuple) -> None:
    encoder, decoder, images, mask = parts
    predicts(decoder, torch.zeros(VALUES))
    before = reconstruction_error(encoder, decoder, images, mask, norm_pix=False)
    pixels = mask.view(BATCH, 1, *GRID).repeat_interleave(PATCH[0], 2).repeat_interleave(PATCH[1], 3)
    after = reconstruction_error(encoder, decoder, torch.where(pixels, images, 7.0), mask, norm_pix=False)
    torch.testing.assert_close(after, before, rtol=1e-14, atol=0)


def test_normalised_pixels_have_unbiased_variance_and_a_flat_patch_is_zero() -> None:
    images = torch.arange(12, dtype=torch.float64).view(1, 1, 2, 6) * 3
    images[..., 3:] = 5.0
    target = target_of(images, (2, 3), norm_pix=True)
    torch.testing.assert_close(
        target[0, 0].var(correction=1), torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0
    )
    first = images[0, 0, :, :3].flatten().numpy()
    np.testing.assert_allclose(target[0, 0], (first - first.mean()) / np.sqrt(first.var(ddof=1) + 1e-6), rtol=1e-13)
    assert not target[0, 1].any()


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_losses_are_taken_in_at_least_float32(given: torch.dtype, taken: torch.dtype) -> None:
    assert target_of(torch.ones(1, 1, 2, 2, dtype=given), (2, 2), norm_pix=True).dtype == taken
