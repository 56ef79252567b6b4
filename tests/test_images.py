"""Facts, sets of images, splits and normalisation."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from ssat_probe import images as images_module
from ssat_probe.images import (
    ArrayImages,
    Facts,
    Fitted,
    Images,
    Selection,
    denormalise,
    fit,
    fitted,
    in_memory,
    normalise,
    split,
)

FACTS = Facts(
    classes=("a", "b", "c"),
    img_size=(5, 7),
    channels=3,
    mean=(0.5, 0.25, 0.125),
    std=(0.5, 0.25, 2.0),
    flip=True,
    splits="Drawn by a test.",
    licence="none",
    citation="none",
)


def pixels(num_images: int, channels: int = 3, height: int = 5, width: int = 7, seed: int = 0) -> Tensor:
    shape = (num_images, channels, height, width)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def arrays(num_images: int, seed: int = 0) -> ArrayImages:
    return ArrayImages(pixels(num_images, seed=seed), np.arange(num_images) % 3)


@dataclasses.dataclass(frozen=True)
class Made:
    """A data set of which the test decides what splits there are."""

    official: tuple[str, ...] = ("train", "test")
    facts: Facts = FACTS

    def images(self, name: str) -> Images:
        return {"train": arrays(60), "val": arrays(13, seed=1), "test": arrays(17, seed=2)}[name]


def test_facts_survive_a_trip_through_json() -> None:
    assert Facts(**json.loads(json.dumps(dataclasses.asdict(FACTS)))) == FACTS
    assert FACTS.num_classes == 3


def test_arrays_are_read_in_the_order_asked_for() -> None:
    images = arrays(11)
    assert torch.equal(images.read([7, 2, 7]), images.pixels[[7, 2, 7]])
    assert torch.equal(images.read(np.array([3])), images.pixels[3:4])
    assert images.labels.dtype == np.int64
    assert len(images) == 11


def test_what_was_read_is_a_copy() -> None:
    images = arrays(2)
    images.read([0, 1]).zero_()
    assert torch.equal(images.pixels, pixels(2))


def test_pixels_and_labels_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="one label, got 5 images and 3 labels; check"):
        ArrayImages(pixels(5), np.zeros(3))


def test_the_fingerprint_of_arrays_depends_on_pixels_labels_and_shape() -> None:
    images = arrays(11)
    changed = images.pixels.clone()
    changed[10, 2, 4, 6] ^= 1
    others = [
        ArrayImages(changed, images.labels),
        ArrayImages(images.pixels, images.labels[::-1]),
        ArrayImages(images.pixels.reshape(11, 3, 7, 5), images.labels),
    ]
    assert images.fingerprint() == ArrayImages(images.pixels.clone(), images.labels.copy()).fingerprint()
    assert len({images.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_a_selection_is_a_view_in_the_order_given() -> None:
    images = arrays(11)
    some = Selection(images, np.array([7, 2, 5]))
    assert torch.equal(some.read([2, 0]), images.pixels[[5, 7]])
    assert some.labels.tolist() == [1, 2, 2]
    assert len(some) == 3
    assert some.in_memory


def test_a_selection_of_a_selection_is_one_of_the_set() -> None:
    images = arrays(11)
    nested = Selection(Selection(images, np.array([7, 2, 5])), np.array([2, 1]))
    flat = Selection(images, np.array([5, 2]))
    assert nested.images is images
    assert nested.fingerprint() == flat.fingerprint() != Selection(images, np.array([2, 5])).fingerprint()


def test_fitted_images_have_the_size_and_another_fingerprint() -> None:
    images = arrays(11)
    view = Fitted(images, (10, 14))
    assert view.read([3, 1]).shape == (2, 3, 10, 14)
    assert view.fingerprint() != images.fingerprint()
    assert (len(view), view.in_memory, view.labels.tolist()) == (11, False, images.labels.tolist())


def test_fitted_keeps_small_sets_in_memory_and_leaves_large_ones_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    images = arrays(11)
    assert fitted(images, None, channels=3) is images
    made = fitted(images, (10, 14), channels=3)
    assert made.in_memory
    monkeypatch.setattr(images_module, "IN_MEMORY_BYTES", 11 * 3 * 10 * 14 - 1)
    streamed = fitted(images, (10, 14), channels=3)
    assert not streamed.in_memory
    assert torch.equal(made.read([5, 2]), streamed.read([5, 2]))
    assert in_memory(images, (5, 7), 3) is images


def test_fit_keeps_what_has_the_size() -> None:
    images = pixels(2)
    assert fit(images, (5, 7)) is images


def test_fit_keeps_a_constant_image_constant() -> None:
    assert (fit(torch.full((1, 1, 5, 7), 131, dtype=torch.uint8), (11, 3)) == 131).all()


def test_fit_crops_around_the_centre() -> None:
    stripes = torch.tensor([0, 50, 100, 150, 200, 250, 255], dtype=torch.uint8).expand(1, 1, 3, 7)
    assert torch.equal(fit(stripes, (3, 3)), stripes[..., 2:5])


def test_fit_down_to_one_pixel_is_near_the_mean() -> None:
    image = pixels(1, 1, 8, 8)
    assert abs(fit(image, (1, 1)).item() - image.float().mean().item()) < 30


def test_normalise_by_hand() -> None:
    image = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    got = normalise(image, FACTS, torch.float64).flatten()
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0, 0.0375], dtype=torch.float64), atol=1e-9, rtol=0)


def test_denormalise_undoes_normalise() -> None:
    images = pixels(2)
    torch.testing.assert_close(denormalise(normalise(images, FACTS), FACTS), images / 255)


def test_validation_is_carved_from_train_and_disjoint_from_it() -> None:
    train, val = split(Made(), "train"), split(Made(), "val")
    assert isinstance(train, Selection)
    assert isinstance(val, Selection)
    assert (len(train), len(val)) == (54, 6)
    assert sorted([*train.ids, *val.ids]) == list(range(60))
    assert np.bincount(val.labels).tolist() == [2, 2, 2]


def test_an_official_validation_split_is_used_and_train_left_whole() -> None:
    made = Made(official=("train", "val", "test"))
    assert split(made, "val").fingerprint() == made.images("val").fingerprint()
    assert len(split(made, "train")) == 60


def test_test_is_the_official_split() -> None:
    assert split(Made(), "test").fingerprint() == Made().images("test").fingerprint()


def test_a_subset_is_drawn_after_validation_is_set_aside() -> None:
    val, some = split(Made(), "val"), split(Made(), "train", subset=30, subset_seed=7)
    assert isinstance(val, Selection)
    assert isinstance(some, Selection)
    assert len(some) == 30
    assert not set(some.ids) & set(val.ids)
    assert split(Made(), "val", subset=30, subset_seed=7).fingerprint() == val.fingerprint()
    assert len(split(Made(), "train", subset=0.5)) == 27


def test_a_subset_larger_than_what_validation_leaves_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"count from 1 to the 54 images there are, .* got 55"):
        split(Made(), "train", subset=55)


def test_no_share_for_validation_leaves_train_whole() -> None:
    assert len(split(Made(), "train", val_fraction=0.0)) == 60
    with pytest.raises(ValueError, match=r"got a share of 0\.0 of the 60 training images; give a larger share"):
        split(Made(), "val", val_fraction=0.0)


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match=re.escape("No 'tset' in splits: train, val, test. Did you mean 'test'?")):
        split(Made(), "tset")
