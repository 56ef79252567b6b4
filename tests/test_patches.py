"""Parity by value with the definitions, computed here by loops or by hand."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssat_probe import patches

BATCH, CHANNELS = 2, 3
PATCH, GRID = (5, 7), (3, 2)


def test_patches_are_rows_then_columns_with_channels_innermost(generator: Callable[[str], torch.Generator]) -> None:
    (p, q), (rows, columns) = PATCH, GRID
    images = torch.rand(BATCH, CHANNELS, rows * p, columns * q, generator=generator("patches"))
    got = patches.patchify(images, PATCH).numpy()
    assert got.shape == (BATCH, rows * columns, p * q * CHANNELS)
    pixels = images.numpy()
    for n, h, w, i, j, c in np.ndindex(BATCH, rows, columns, p, q, CHANNELS):
        assert got[n, h * columns + w, (i * q + j) * CHANNELS + c] == pixels[n, c, h * p + i, w * q + j]


def test_unpatchify_undoes_patchify(generator: Callable[[str], torch.Generator]) -> None:
    images = torch.rand(BATCH, CHANNELS, GRID[0] * PATCH[0], GRID[1] * PATCH[1], generator=generator("inverse"))
    assert torch.equal(patches.unpatchify(patches.patchify(images, PATCH), PATCH, GRID), images)


def test_a_grid_is_the_image_over_the_patch() -> None:
    assert patches.grid_of((224, 224), (16, 16)) == (14, 14)
    assert patches.grid_of((15, 14), (5, 7)) == (3, 2)


@pytest.mark.parametrize(("img_size", "patch_size"), [((15, 14), (7, 7)), ((14, 15), (7, 7)), ((8, 8), (16, 16))])
def test_a_patch_that_does_not_divide_the_image_is_named(
    img_size: tuple[int, int], patch_size: tuple[int, int]
) -> None:
    sentence = f"image of {img_size[0]}x{img_size[1]} pixels, got {patch_size[0]}x{patch_size[1]}; choose another"
    with pytest.raises(ValueError, match=sentence):
        patches.grid_of(img_size, patch_size)


@pytest.mark.parametrize(
    ("num_tokens", "mask_ratio", "visible"),
    [
        (196, 0.75, 49),
        (64, 0.75, 16),
        (16, 0.75, 4),
        (100, 0.9, 10),  # truncation of 100 * (1 - 0.9) gives 9
        (100, 0.8, 20),  # and of 100 * (1 - 0.8) 19
        (10, 0.9, 1),  # and of 10 * (1 - 0.9) none
        (16, 0.95, 1),  # and of 16 * (1 - 0.95) none
        (16, 0.9375, 1),
        (16, 0.0625, 15),
        (7, 0.5, 3),
    ],
)
def test_visible_patches_are_counted_exactly(num_tokens: int, mask_ratio: float, visible: int) -> None:
    assert num_tokens - patches.num_masked(num_tokens, mask_ratio) == visible
    noise = torch.rand(5, num_tokens, generator=torch.Generator().manual_seed(3))
    assert (~patches.random_mask(noise, mask_ratio)).sum(dim=1).tolist() == [visible] * 5


@pytest.mark.parametrize(
    ("num_tokens", "mask_ratio", "state"),
    [(16, 0.99, "visible"), (16, 0.97, "visible"), (16, 0.03, "masked"), (4, 0.1, "masked"), (4, 0.9, "visible")],
)
def test_a_ratio_that_leaves_no_token_of_a_kind_is_refused(num_tokens: int, mask_ratio: float, state: str) -> None:
    low, high = f"{1 / num_tokens:.3g}", f"{1 - 1 / num_tokens:.3g}"
    sentence = (
        f"mask_ratio must leave at least one visible and one masked token of {num_tokens}, got {mask_ratio}, which "
        f"leaves no {state} one; choose one between {low} and {high} or a smaller patch_size."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        patches.num_masked(num_tokens, mask_ratio)


def test_of_one_token_no_ratio_leaves_both_kinds() -> None:
    with pytest.raises(ValueError, match=r"token of 1, got 0\.75, which leaves no visible one; choose a smaller patch"):
        patches.num_masked(1, 0.75)


@given(num_tokens=st.integers(2, 300), masked=st.integers(1, 299))
def test_the_share_of_a_count_gives_that_count_back(num_tokens: int, masked: int) -> None:
    masked = min(masked, num_tokens - 1)
    assert patches.num_masked(num_tokens, masked / num_tokens) == masked


def test_the_largest_numbers_are_hidden_and_ids_ascend() -> None:
    noise = torch.tensor([[0.1, 0.9, 0.3, 0.7, 0.2], [0.5, 0.4, 0.3, 0.2, 0.1]])
    mask = patches.random_mask(noise, 0.6)
    assert mask.tolist() == [[False, True, True, True, False], [True, True, True, False, False]]
    assert patches.visible_ids_of(mask).tolist() == [[0, 4], [3, 4]]


def test_every_patch_is_hidden_as_often_as_any_other(generator: Callable[[str], torch.Generator]) -> None:
    num_images, num_tokens, mask_ratio = 4001, 7, 3 / 7
    mask = patches.random_mask(torch.rand(num_images, num_tokens, generator=generator("fair")), mask_ratio)
    share = mask.double().mean(dim=0)
    five_sigma = 5 * math.sqrt(mask_ratio * (1 - mask_ratio) / num_images)
    assert (share - mask_ratio).abs().max() < five_sigma


@pytest.mark.parametrize("with_class_token", [True, False])
def test_positions_are_sines_then_cosines_of_the_column_then_of_the_row(*, with_class_token: bool) -> None:
    dim, (rows, columns) = 12, (3, 5)
    table = patches.sincos_positions(dim, (rows, columns), with_class_token).numpy()
    assert table.shape == (rows * columns + with_class_token, dim)
    assert table.dtype == np.float32
    if with_class_token:
        assert not table[0].any()
    for row, column, k in np.ndindex(rows, columns, dim // 4):
        got = table[with_class_token + row * columns + column]
        rate = 1 / 10000 ** (k / (dim / 4))
        expected = [math.sin(column * rate), math.cos(column * rate), math.sin(row * rate), math.cos(row * rate)]
        np.testing.assert_allclose(got[k :: dim // 4], expected, rtol=0, atol=6e-8)


def test_positions_at_hand_computed_places() -> None:
    # dim 8: frequencies 1 and 1/100; raster order on a 2x3 grid, so token 1 is column 1 and token 3 is row 1.
    table = patches.sincos_positions(8, (2, 3), with_class_token=False)
    one, hundredth = (math.sin(1), math.cos(1)), (math.sin(0.01), math.cos(0.01))
    column_one = torch.tensor([one[0], hundredth[0], one[1], hundredth[1], 0, 0, 1, 1])
    row_one = torch.tensor([0, 0, 1, 1, one[0], hundredth[0], one[1], hundredth[1]])
    torch.testing.assert_close(table[1], column_one, rtol=0, atol=6e-8)
    torch.testing.assert_close(table[3], row_one, rtol=0, atol=6e-8)


def test_positions_need_a_width_that_is_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match=r"must be a multiple of 4, got 10; choose another width"):
        patches.sincos_positions(10, (2, 2), with_class_token=False)


def test_hidden_ids_are_those_that_are_not_visible_and_ascend() -> None:
    tokens, visible = torch.zeros(2, 2, 1), torch.tensor([[4, 0], [3, 5]])
    features = patches.Features(tokens, None, GRID, visible)
    assert features.hidden_ids.tolist() == [[1, 2, 3, 5], [0, 1, 2, 4]]
    assert patches.Features(torch.zeros(2, 6, 1), None, GRID, None).hidden_ids.shape == (2, 0)


def test_seen_tokens_are_those_of_visible_patches(generator: Callable[[str], torch.Generator]) -> None:
    tokens = torch.randn(2, 3, 4, generator=generator("seen"))
    whole = patches.Features(tokens, None, (1, 3), None)
    assert whole.seen is tokens
    assert torch.equal(whole.summary, tokens.mean(dim=1))
    parts = patches.Features(tokens, None, (1, 3), None, torch.tensor([[True, False, False], [False, False, True]]))
    assert torch.equal(parts.seen, torch.stack([tokens[0, 1:], tokens[1, :2]]))
    assert torch.equal(parts.summary, parts.seen.mean(dim=1))


def test_taken_rows_are_those_of_their_own_image(generator: Callable[[str], torch.Generator]) -> None:
    rows = torch.randn(2, 6, 3, generator=generator("taken"))
    got = patches.taken(rows, torch.tensor([[5, 0, 5], [2, 1, 3]]))
    assert torch.equal(got, torch.stack([rows[0, [5, 0, 5]], rows[1, [2, 1, 3]]]))
