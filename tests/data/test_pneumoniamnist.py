"""PneumoniaMNIST in its real format, a few images of it written by the test."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ssat_probe.data import pneumoniamnist
from ssat_probe.data.pneumoniamnist import Dataset
from ssat_probe.images import split

COUNTS = {"train": 19, "val": 5, "test": 7}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the npz file, of whose counts the loader has been told."""
    write(tmp_path / "pneumoniamnist.npz")
    for name, count in COUNTS.items():
        monkeypatch.setitem(pneumoniamnist.NUM_IMAGES, name, count)
    return tmp_path


def write(path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {}
    for name, count in COUNTS.items():
        arrays[f"{name}_images"] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{name}_labels"] = generator.integers(0, 2, (count, 1), dtype=np.uint8)
    np.savez_compressed(path, **arrays)


def test_images_and_labels_are_those_on_disk(root: Path) -> None:
    data, stored = Dataset(root), np.load(root / "pneumoniamnist.npz")
    for name, count in COUNTS.items():
        images = data.images(name)
        assert len(images) == count
        assert images.labels.tolist() == stored[f"{name}_labels"][:, 0].tolist()
        assert torch.equal(images.read([3])[0, 0], torch.from_numpy(stored[f"{name}_images"][3]))


def test_validation_is_the_official_one_and_train_keeps_all_its_images(root: Path) -> None:
    data = Dataset(root)
    assert (len(split(data, "train")), len(split(data, "val")), len(split(data, "test"))) == (19, 5, 7)


def test_facts_need_no_files() -> None:
    facts = Dataset(img_size=(64, 64)).facts
    assert (facts.classes, facts.img_size, facts.channels) == (("normal", "pneumonia"), (64, 64), 1)
    assert not facts.flip


def test_another_size_is_made_when_asked_for(root: Path) -> None:
    assert Dataset(root, img_size=(32, 40)).images("val").read([0, 4]).shape == (2, 1, 32, 40)


def test_a_wrong_count_names_both_numbers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pneumoniamnist.NUM_IMAGES, "train", 4708)
    with pytest.raises(ValueError, match=re.escape(f"pneumoniamnist must have 4708 train images, got 19 in {root};")):
        Dataset(root).images("train")


def test_a_file_that_is_missing_cut_short_or_without_a_split_is_named(root: Path) -> None:
    path = root / "pneumoniamnist.npz"
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    with pytest.raises(ValueError, match=re.escape(f"{path} must be the npz file of PneumoniaMNIST at 28x28, got Bad")):
        Dataset(root).images("train")
    np.savez(path, train_images=np.zeros((1, 28, 28), np.uint8), train_labels=np.zeros((1, 1), np.uint8))
    with pytest.raises(ValueError, match="test_images is not a file in the archive"):
        Dataset(root).images("test")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{path} must be the npz file of") + ".*, got no such file"):
        Dataset(root).images("train")
