"""CIFAR-100 in its real format, a few images of it written by the test."""

import hashlib
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

from ssat_probe.data import cifar100
from ssat_probe.data.cifar100 import FACTS, Dataset

COUNTS = {"train": 13, "test": 7}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with cifar-100-python, whose checksums and counts the loader has been told."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in COUNTS.items():
        fine, data = (
            generator.integers(0, 100, count).tolist(),
            generator.integers(0, 256, (count, 3072), dtype=np.uint8),
        )
        content = {"data": data, "fine_labels": fine, "coarse_labels": [label // 5 for label in fine]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        monkeypatch.setitem(cifar100.NUM_IMAGES, name, count)
    names = {"fine_label_names": list(FACTS.classes), "coarse_label_names": ["animal"] * 20}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    checksums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", checksums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", checksums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": checksums["meta"]})
    return tmp_path


def test_images_and_fine_labels_are_those_on_disk(root: Path) -> None:
    for name, count in COUNTS.items():
        images, stored = Dataset(root).images(name), pickle.loads((root / "cifar-100-python" / name).read_bytes())
        assert len(images) == count
        assert images.labels.tolist() == stored["fine_labels"]
        assert torch.equal(images.read([5]), torch.from_numpy(stored["data"][5].reshape(1, 3, 32, 32)))


def test_facts_need_no_files() -> None:
    facts = Dataset().facts
    assert (facts.num_classes, len(set(facts.classes)), facts.img_size, facts.flip) == (100, 100, (32, 32), True)
    assert facts.classes == tuple(sorted(facts.classes))  # the order of the labels in the original


def test_missing_files_are_named_with_the_way_to_get_them(root: Path) -> None:
    (root / "cifar-100-python" / "meta").unlink()
    sentence = f"{root / 'cifar-100-python'} must hold train, test, meta, got no meta; add --download, or unpack"
    with pytest.raises(FileNotFoundError, match=re.escape(sentence)):
        Dataset(root).images("test")


def test_a_wrong_count_names_both_numbers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cifar100.NUM_IMAGES, "test", 10_000)
    with pytest.raises(ValueError, match=re.escape(f"cifar100 must have 10000 test images, got 7 in {root};")):
        Dataset(root).images("test")
