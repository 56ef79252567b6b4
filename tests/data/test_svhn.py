"""SVHN in its real format, a few images of it written by the test."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from ssat_probe.data import svhn
from ssat_probe.data.svhn import Dataset

LABELS = {"train": [10, 1, 9, 2, 10, 3, 5], "test": [7, 10, 1]}


def pixels(split: str) -> np.ndarray:
    """Height, width, channel, image: as Matlab stores them."""
    shape = (32, 32, 3, len(LABELS[split]))
    return np.random.default_rng(len(split)).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both files, of whose counts the loader has been told."""
    for split, labels in LABELS.items():
        content = {"X": pixels(split), "y": np.array(labels, dtype=np.uint8)[:, None]}
        savemat(tmp_path / f"{split}_32x32.mat", content, do_compression=True)
        monkeypatch.setitem(svhn.NUM_IMAGES, split, len(labels))
    return tmp_path


def test_images_and_labels_are_those_on_disk_and_10_means_0(root: Path) -> None:
    train, test = (Dataset(root).images(name) for name in ("train", "test"))
    assert train.labels.tolist() == [0, 1, 9, 2, 0, 3, 5]
    assert test.labels.tolist() == [7, 0, 1]
    assert torch.equal(train.read([3])[0], torch.from_numpy(pixels("train")[..., 3]).permute(2, 0, 1))


def test_a_mirrored_digit_is_no_digit() -> None:
    facts = Dataset().facts
    assert (facts.flip, facts.num_classes, facts.img_size, facts.channels) == (False, 10, (32, 32), 3)


def test_a_wrong_count_names_both_numbers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(svhn.NUM_IMAGES, "test", 26_032)
    with pytest.raises(ValueError, match=re.escape(f"svhn must have 26032 test images, got 3 in {root};")):
        Dataset(root).images("test")


def test_a_file_that_is_missing_or_cut_short_is_named(root: Path) -> None:
    path = root / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:5000])
    sentence = f"{path} must be the train images of SVHN in format 2 (cropped digits), got "
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Dataset(root).images("train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(sentence + "no such file; check --data-dir")):
        Dataset(root).images("train")
