"""Augmentation: shape, randomness, and each change by what it must leave alone."""

import dataclasses
import re

import pytest
import torch
from torch import Tensor

from ssat_probe import augmentation
from ssat_probe.augmentation import NAMES, augment, augment_and_keep
from ssat_probe.images import Facts
from ssat_probe.sharing import Share

FACTS = Facts(
    classes=("a", "b"),
    img_size=(13, 17),
    channels=3,
    mean=(0.2, 0.4, 0.6),
    std=(0.25, 0.25, 0.25),
    flip=True,
    splits="",
    licence="",
    citation="",
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(num_images: int = 7, channels: int = 3, height: int = 13, width: int = 17) -> Tensor:
    return torch.randint(0, 256, (num_images, channels, height, width), generator=generator(1), dtype=torch.uint8)


def facts(channels: int = 3, flip: bool = True) -> Facts:
    return dataclasses.replace(
        FACTS, channels=channels, mean=FACTS.mean[:channels], std=FACTS.std[:channels], flip=flip
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_size_and_type_stay_and_the_input_is_untouched(name: str, channels: int) -> None:
    images = pixels(channels=channels)
    before = images.clone()
    got = augment(images, name, facts(channels), generator())
    assert got.shape == images.shape
    assert got.dtype == torch.uint8
    assert torch.equal(images, before)
    assert torch.equal(got, images) == (name == "none")


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_alone_decides(name: str) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = augment(pixels(), name, FACTS, generator(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(11)
    assert torch.equal(augment(pixels(), name, FACTS, generator(5)), first)
    assert torch.equal(augment(pixels(), name, FACTS, generator(6)), first) == (name == "none")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("processes", [2, 3, 11])
def test_images_are_changed_as_in_the_whole_batch_however_many_share_it(name: str, processes: int) -> None:
    images = pixels(num_images=7, channels=3)
    whole = augment(images, name, FACTS, generator(5))
    for first in range(processes):
        share = Share(first, processes, len(images))
        got = augment(share.of(images), name, FACTS, generator(5), share)
        assert torch.equal(got, share.of(whole))


@pytest.mark.parametrize("name", NAMES[1:])
def test_each_image_is_changed_in_its_own_way(name: str) -> None:
    images = pixels(1).expand(61, -1, -1, -1)
    assert len(augment(images, name, FACTS, generator()).flatten(1).unique(dim=0)) > 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8)])
def test_tiny_images_and_empty_batches_go_through(name: str, size: tuple[int, int]) -> None:
    for num_images in (0, 97):
        images = pixels(num_images, 1, *size)
        assert augment(images, name, facts(1), generator()).shape == images.shape


def test_a_crop_is_a_shift_with_the_mean_colour_around() -> None:
    images = pixels(97, height=8, width=16)
    colour = (torch.tensor(FACTS.mean) * 255).round().to(torch.uint8)
    padded = colour.view(1, 3, 1, 1).repeat(97, 1, 10, 20)
    padded[..., 1:-1, 2:-2] = images
    found = set()
    for image, got in zip(padded, augment(images, "crop", FACTS, generator()), strict=True):
        places = [(y, x) for y in range(3) for x in range(5) if torch.equal(image[:, y : y + 8, x : x + 16], got)]
        assert len(places) == 1
        found.update(places)
    assert len(found) == 15  # every place occurs


def test_standard_mirrors_about_half_where_that_keeps_the_class() -> None:
    ramp = torch.linspace(0, 240, 9).to(torch.uint8).expand(997, 1, 9, 9).contiguous()
    mirrored = {}
    for flip in (True, False):
        got = augment(ramp, "standard", facts(1, flip), generator()).int()
        mirrored[flip] = (got[:, 0, 4, 2] > got[:, 0, 4, 6]).float().mean().item()
    assert mirrored[False] == 0
    assert mirrored[True] == pytest.approx(0.5, abs=4 * (0.25 / 997) ** 0.5)


def test_strong_without_operations_and_noise_is_a_part_of_the_image_scaled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "CHANCE", 0.0)
    monkeypatch.setattr(augmentation, "ERASE_CHANCE", 0.0)
    ramp = torch.linspace(0, 250, 32).to(torch.uint8).expand(499, 1, 32, 32).contiguous()
    got = augment(ramp, "strong", facts(1, flip=False), generator()).float()
    assert (got.diff(dim=-1) >= 0).all()  # never mirrored, never turned
    assert (got.diff(dim=-2).abs() <= 1).all()  # rounding
    share = (got[..., -1] - got[..., 0]).mean((1, 2)) / 250  # of the width
    assert 0.2 < share.min() < 0.35
    assert share.max() > 0.95
    assert share.mean() == pytest.approx(0.71, abs=0.04)  # E[sqrt(U(0.08, 1))] = 0.709, aspect ratios averaged out


def test_the_whole_image_as_the_part_is_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "CHANCE", 0.0)
    monkeypatch.setattr(augmentation, "ERASE_CHANCE", 0.0)
    monkeypatch.setattr(augmentation, "CROP_AREA", (1.0, 1.0))
    monkeypatch.setattr(augmentation, "CROP_ASPECT", (1.0, 1.0))
    images = pixels(height=11, width=11)
    assert torch.equal(augment(images, "strong", facts(flip=False), generator()), images)


def test_erasing_leaves_rectangles_of_noise_in_a_quarter_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "CHANCE", 0.0)
    black = torch.zeros(997, 1, 24, 24, dtype=torch.uint8)
    changed = augment(black, "strong", dataclasses.replace(facts(1), mean=(0.9,), std=(0.001,)), generator())[:, 0] > 0
    touched = changed.flatten(1).any(1)
    assert touched.float().mean().item() == pytest.approx(0.25, abs=4 * (0.1875 / 997) ** 0.5)
    rows, columns = changed[touched].any(2), changed[touched].any(1)
    assert torch.equal(rows[:, :, None] & columns[:, None, :], changed[touched])  # rows times columns ...
    assert (rows.int().diff(dim=1).abs().sum(1) <= 2).all()  # ... without a gap
    area = changed[touched].float().mean((1, 2))
    assert 0.01 < area.min() < area.max() <= 0.4


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_cut_and_mirrored_alike_but_has_its_colours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pixels()
    changed, clean = augment_and_keep(images, name, FACTS, generator(5))
    assert torch.equal(changed, augment(images, name, FACTS, generator(5)))
    assert torch.equal(changed, clean) == (name != "strong")
    monkeypatch.setattr(augmentation, "NUM_OPERATIONS", 0)  # the same draws up to there
    monkeypatch.setattr(augmentation, "ERASE_CHANCE", 0.0)
    assert torch.equal(augment(images, name, FACTS, generator(5)), clean)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    sentence = "No 'stron' in augmentations: none, crop, standard, strong. Did you mean 'strong'?"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        augment(pixels(), "stron", FACTS, generator())


def applied(name: str, images: Tensor, level: float = 1.0, sign: float = 1.0) -> Tensor:
    """One operation on float images, by its name."""
    shape = (len(images), 1, 1, 1)
    draw = augmentation._Draw(torch.full(shape, level), torch.full(shape, sign), torch.full((1, 1, 1, 1), 7.0))
    return augmentation.OPERATIONS[name](images.float(), draw)


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y", "colour", "contrast",
                                  "brightness", "sharpness"])  # fmt: skip
def test_an_operation_at_level_zero_changes_nothing(name: str) -> None:
    torch.testing.assert_close(applied(name, pixels(), level=0.0), pixels().float(), atol=1e-2, rtol=0)


def test_translation_moves_by_a_share_of_the_image_and_fills_with_the_colour() -> None:
    images = pixels(2, 1, 20, 20)
    got = applied("translate_x", images, level=1.0)
    torch.testing.assert_close(got[..., :11], images[..., 9:].float(), atol=1e-2, rtol=0)
    torch.testing.assert_close(got[..., 13:], torch.full((2, 1, 20, 7), 7.0), atol=1e-2, rtol=0)
    torch.testing.assert_close(
        applied("translate_y", images, level=1.0, sign=-1.0)[..., 9:, :], images[..., :11, :].float(), atol=1e-2, rtol=0
    )


def test_rotation_keeps_the_centre_and_length_also_when_the_image_is_not_square() -> None:
    bar = torch.zeros(1, 1, 31, 61)
    bar[..., 15, 20:41] = 200.0  # 21 pixels long, around the centre
    got = applied("rotate", bar.to(torch.uint8), level=1.0)
    y, x = torch.meshgrid(torch.arange(31.0) - 15, torch.arange(61.0) - 30, indexing="ij")
    mass = (got[0, 0] - 7).clamp(min=0) * (got[0, 0] > 50)
    angle = 0.5 * torch.atan2(2 * (mass * x * y).sum(), (mass * (x**2 - y**2)).sum())  # of the principal axis
    assert abs(angle.rad2deg().item()) == pytest.approx(30, abs=1.5)
    assert (mass * x).sum().item() == pytest.approx(0, abs=mass.sum().item() * 0.1)


def test_shear_is_a_share_of_a_pixel_per_pixel_also_when_the_image_is_not_square() -> None:
    ramp = torch.arange(61.0).expand(1, 1, 31, 61)
    got = applied("shear_x", ramp.to(torch.uint8), level=1.0)
    slope = (got[0, 0, 20, 30] - got[0, 0, 10, 30]) / 10
    assert slope.item() == pytest.approx(0.3, abs=0.01)


def test_point_operations_by_hand() -> None:
    values = torch.tensor([0, 25, 26, 100, 127, 128, 200, 255], dtype=torch.uint8).view(1, 1, 2, 4)

    def row(name: str, **options: float) -> list[float]:
        return applied(name, values, **options).flatten().tolist()

    assert row("invert") == [255, 230, 229, 155, 128, 127, 55, 0]
    assert row("solarise", level=0.9) == [0, 25, 229, 155, 128, 127, 55, 0]  # 256 - 230 = 26 and above
    assert row("solarise_add", level=0.9) == [99, 124, 125, 199, 226, 128, 200, 255]
    assert row("posterise", level=0.9) == [0, 0, 0, 0, 0, 128, 128, 128]  # one bit is kept
    assert row("posterise", level=0.0) == [0, 16, 16, 96, 112, 128, 192, 240]  # four are
    assert row("brightness", level=1.0, sign=-1.0) == pytest.approx([0, 2.5, 2.6, 10, 12.7, 12.8, 20, 25.5])
    assert row("contrast", level=1.0, sign=-1.0) == pytest.approx(
        [107.625 + 0.1 * (value - 107.625) for value in values.flatten().tolist()], abs=1e-3
    )
    assert row("auto_contrast") == values.flatten().tolist()


def test_colour_moves_towards_grey_and_leaves_grey_alone() -> None:
    red = torch.tensor([200, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    grey = 0.299 * 200
    expected = [grey + 0.1 * (value - grey) for value in (200, 0, 0)]
    assert applied("colour", red, sign=-1.0).flatten().tolist() == pytest.approx(expected, abs=1e-3)
    assert torch.equal(applied("colour", pixels(channels=1)), pixels(channels=1).float())


def test_smoothing_and_equalising_match_pillow() -> None:
    import numpy as np
    from PIL import Image, ImageEnhance, ImageOps

    image = pixels(1)
    pillow = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    for name, expected in (
        ("equalise", ImageOps.equalize(pillow)),
        ("sharpness", ImageEnhance.Sharpness(pillow).enhance(1.9)),
        ("colour", ImageEnhance.Color(pillow).enhance(1.9)),
        ("brightness", ImageEnhance.Brightness(pillow).enhance(1.9)),
    ):
        got = augmentation._bytes(applied(name, image, level=1.0))[0].permute(1, 2, 0).numpy().astype(int)
        difference = np.abs(got - np.asarray(expected).astype(int))[1:-1, 1:-1]  # Pillow does not smooth the border
        assert difference.max() <= 2, name
