"""Flowers 102 in its real format, a few images of it written by the test."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102

from ssat_probe.data import flowers102
from ssat_probe.data.flowers102 import Dataset

LISTS = {"trnid": [3, 7], "valid": [2, 5, 11], "tstid": [1, 4, 6, 8, 9, 10, 12]}
LABELS = [77, 1, 102, 5, 5, 31, 2, 9, 101, 3, 60, 17]
"From 1, as stored."


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with flowers-102, of whose counts the loader has been told."""
    jpg = tmp_path / "flowers-102" / "jpg"
    jpg.mkdir(parents=True)
    for number in range(1, 13):
        Image.new("RGB", (20 + number, 30), (10 * number, 0, 0)).save(jpg / f"image_{number:05d}.jpg", quality=100)
    savemat(tmp_path / "flowers-102" / "imagelabels.mat", {"labels": np.array([LABELS], dtype=np.uint8)})
    savemat(
        tmp_path / "flowers-102" / "setid.mat", {key: np.array([ids], dtype=np.uint16) for key, ids in LISTS.items()}
    )
    monkeypatch.setitem(flowers102.NUM_IMAGES, "train", 5)
    monkeypatch.setitem(flowers102.NUM_IMAGES, "test", 7)
    return tmp_path


def test_train_is_the_official_train_and_validation(root: Path) -> None:
    train, test = (Dataset(root, img_size=(8, 8)).images(name) for name in ("train", "test"))
    assert train.labels.tolist() == [LABELS[number - 1] - 1 for number in (3, 7, 2, 5, 11)]
    assert test.labels.tolist() == [LABELS[number - 1] - 1 for number in LISTS["tstid"]]
    red = train.read(range(5)).float().mean((2, 3))[:, 0]
    assert (red / 10).round().tolist() == [3, 7, 2, 5, 11]


def test_against_torchvision(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    theirs = Flowers102(root, split="test")
    assert Dataset(root).images("test").labels.tolist() == [int(label) for label in theirs._labels]


def test_photographs_of_many_sizes_become_224_unless_said_otherwise(root: Path) -> None:
    assert Dataset(root).images("train").read([0]).shape == (1, 3, 224, 224)
    facts = Dataset().facts
    assert (facts.num_classes, len(set(facts.classes)), facts.img_size) == (102, 102, (224, 224))
    assert (facts.classes[0], facts.classes[76], facts.classes[101]) == (
        "pink primrose",
        "passion flower",
        "blackberry lily",
    )


def test_a_missing_image_is_named(root: Path) -> None:
    (root / "flowers-102" / "jpg" / "image_00005.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"5 images of its list, got 1 missing, the first \S+image_00005\.jpg;"):
        Dataset(root).images("train")


def test_a_missing_or_foreign_list_is_named(root: Path) -> None:
    path = root / "flowers-102" / "setid.mat"
    savemat(path, {"other": np.arange(3)})
    with pytest.raises(ValueError, match=re.escape(f"{path} must be the lists of the official split of Flowers 102, ")):
        Dataset(root).images("train")
    (root / "flowers-102" / "imagelabels.mat").unlink()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"setid\.mat must be the lists .*, got no such file"):
        Dataset(root).images("train")


def test_a_wrong_count_names_both_numbers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flowers102.NUM_IMAGES, "train", 2040)
    with pytest.raises(ValueError, match=re.escape(f"flowers102 must have 2040 train images, got 5 in {root};")):
        Dataset(root).images("train")
