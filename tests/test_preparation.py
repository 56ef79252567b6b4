"""Images are prepared as timm's own evaluation prepares them."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from ssat_probe.images import ArrayImages
from ssat_probe.preparation import Preparation, Prepared


def smooth(height: int, width: int) -> np.ndarray:
    """Pixels without the finest detail, on which two interpolations may differ."""
    rng = np.random.default_rng(5)
    small = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(31, 31), (53, 37), (97, 211)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_timms_up_to_rounding(size: tuple[int, int], interpolation: str) -> None:
    pixels = smooth(*size)
    theirs = create_transform((3, 43, 43), interpolation=interpolation, crop_pct=0.9, mean=(0,) * 3, std=(1,) * 3)
    expected = theirs(Image.fromarray(pixels)) * 255
    ours = Preparation((43, 43), 3, 0.9, interpolation).apply(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])[0]
    assert ours.shape == (3, 43, 43)
    assert float((ours - expected).abs().mean()) < 0.5
    assert float((ours - expected).abs().max()) <= 4


def test_grey_images_are_repeated_and_the_fingerprint_tells_preparations_apart() -> None:
    images = ArrayImages(torch.arange(2 * 35, dtype=torch.uint8).view(2, 1, 5, 7), np.array([1, 0]))
    prepared = Prepared(images, Preparation((5, 7), 3))
    assert torch.equal(prepared.read([1]), images.read([1]).expand(-1, 3, -1, -1))
    assert (len(prepared), prepared.labels.tolist(), prepared.in_memory) == (2, [1, 0], False)
    prints = {Prepared(images, Preparation((5, 7), 3, crop)).fingerprint() for crop in (1.0, 0.9, 0.9)}
    assert len(prints) == 2


def test_other_shapes_than_squares() -> None:
    prepared = Preparation((20, 10), 3, 1.0).apply(torch.zeros(2, 3, 10, 10, dtype=torch.uint8))
    assert prepared.shape == (2, 3, 20, 10)
