import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssat_probe import probe
from ssat_probe.data import description
from ssat_probe.data.unlabelled import Dataset

Paths = dict[str, Path]


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path, pixels: np.ndarray) -> Path:
    for number, image in enumerate(pixels):
        path = tmp_path / "pictures" / f"trip{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "pictures"


def test_a_folder_is_read_in_the_order_of_its_paths(folder: Path, pixels: np.ndarray) -> None:
    images = Dataset(folder).images("test")
    assert len(images) == 5
    np.testing.assert_array_equal(images.read(range(5))[:, 0], pixels[[0, 2, 4, 1, 3]])
    assert not images.labels.any()
    assert Dataset(folder).facts.classes == ()


def test_several_sizes_become_one(folder: Path) -> None:
    Image.new("RGB", (20, 10)).save(folder / "wide.jpg")
    assert Dataset(folder).images("test").read([0]).shape == (1, 3, 224, 224)
    assert Dataset(folder, img_size=(6, 7)).images("train").read([5]).shape == (1, 3, 6, 7)


@pytest.mark.parametrize("place", ["no channel", "last", "first"])
def test_an_array_may_have_its_channels_anywhere(tmp_path: Path, pixels: np.ndarray, place: str) -> None:
    coloured = np.stack([pixels, pixels // 2, pixels // 3], 1)
    stored = {"no channel": pixels, "last": coloured.transpose(0, 2, 3, 1), "first": coloured}[place]
    np.savez(tmp_path / "a.npz", stored)
    read = Dataset(tmp_path / "a.npz").images("val").read([3])
    np.testing.assert_array_equal(read[0], (pixels[3:4] if place == "no channel" else coloured[3]))
    assert Dataset(tmp_path / "a.npz", img_size=(4, 4)).images("val").read([3]).shape[2:] == (4, 4)


def test_a_folder_and_an_array_of_the_same_images_give_the_same_numbers(
    checkpoints: Paths, folder: Path, tmp_path: Path, pixels: np.ndarray
) -> None:
    np.savez(tmp_path / "a.npz", images=pixels[[0, 2, 4, 1, 3]], other=np.zeros(3))
    options = {"data": "unlabelled", "device": "cpu", "untrained_twin": False, "num_images": 0}
    one, other = (
        probe.measure("variance", [checkpoints["ssat"]], data_dir=root, **options)
        for root in (folder, tmp_path / "a.npz")
    )
    np.testing.assert_allclose(one["variance"], other["variance"])
    assert set(one["num_images"]) == {5}
    with pytest.raises(ValueError, match="must have the 10 classes"):
        probe.measure("accuracy", [checkpoints["ssat"]], data="unlabelled", data_dir=folder, device="cpu")


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a folder of images or an \.npz file, got none; name one"):
        Dataset().images("test")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} must hold images, got none")):
        Dataset(tmp_path).images("test")
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match=r"must be 8-bit, .* got float64 of shape \(2, 4, 4\)"):
        Dataset(tmp_path / "floats.npz").images("test")
    np.savez(tmp_path / "five.npz", images=np.zeros((2, 4, 4, 5), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"1 or 3 channels, got shape \(2, 5, 4, 4\)"):
        Dataset(tmp_path / "five.npz").images("test")
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    with pytest.raises(ValueError, match="'images', or one array alone, got a, b; rename it"):
        Dataset(tmp_path / "two.npz").images("test")
    (tmp_path / "text.npz").write_text("no array")
    with pytest.raises(ValueError, match=r"text\.npz"):
        Dataset(tmp_path / "text.npz").images("test")
    np.savez(tmp_path / "code.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"code\.npz"):
        Dataset(tmp_path / "code.npz").images("test")


def test_the_layout_is_described(folder: Path) -> None:
    lines = list(description("unlabelled", folder))
    assert lines[-1] == "Check of test: 5 images, read at 8x8; as it should be."
    assert torch.equal(Dataset(folder).images("test").read([0]), Dataset(folder).images("train").read([0]))
