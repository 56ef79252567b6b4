"""Fashion-MNIST in its real format, a few images of it written by the test."""

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import FashionMNIST

from ssat_probe.data import fashion_mnist
from ssat_probe.data.fashion_mnist import Dataset

COUNTS = {"train": 13, "test": 5}
PREFIX = {"train": "train", "test": "t10k"}


def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
    generator, count = np.random.default_rng(len(split)), COUNTS[split]
    return generator.integers(0, 256, (count, 28, 28), dtype=np.uint8), generator.integers(0, 10, count, dtype=np.uint8)


def write(folder: Path, is_packed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix in PREFIX.items():
        images, labels = arrays(split)
        for name, values in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
            if is_packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.fixture(autouse=True)
def _counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in COUNTS.items():
        monkeypatch.setitem(fashion_mnist.NUM_IMAGES, split, count)


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
def test_images_and_labels_are_those_on_disk_in_every_layout(tmp_path: Path, folder: str, is_packed: bool) -> None:
    write(tmp_path / folder, is_packed)
    for split in COUNTS:
        images, (pixels, labels) = Dataset(tmp_path).images(split), arrays(split)
        assert images.labels.tolist() == labels.tolist()
        assert torch.equal(images.read(range(len(images)))[:, 0], torch.from_numpy(pixels))


def test_against_torchvision(tmp_path: Path) -> None:
    write(tmp_path / "FashionMNIST" / "raw", is_packed=False)
    theirs, ours = FashionMNIST(tmp_path, train=False), Dataset(tmp_path).images("test")
    assert torch.equal(ours.read(range(5))[:, 0], theirs.data)
    assert ours.labels.tolist() == theirs.targets.tolist()
    assert [name.lower() for name in Dataset().facts.classes] == [name.lower() for name in FashionMNIST.classes]


def test_missing_files_are_named(tmp_path: Path) -> None:
    sentence = f"{tmp_path} must hold train-images-idx3-ubyte or train-images-idx3-ubyte.gz, there or in FashionMNIST"
    with pytest.raises(FileNotFoundError, match=re.escape(sentence)):
        Dataset(tmp_path).images("train")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\0\0\x09\x03" + bytes(12), "ValueError: it begins with 00 00 09 03"),
        (struct.pack(">HBB3I", 0, 8, 3, 5, 28, 28) + bytes(100), "ValueError: cannot reshape array of size 100"),
    ],
)
def test_a_file_of_another_kind_or_cut_short_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    write(tmp_path, is_packed=False)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path} must be an IDX file of bytes with 3 axes, got {reason}")):
        Dataset(tmp_path).images("test")


def test_a_wrong_count_names_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, is_packed=True)
    monkeypatch.setitem(fashion_mnist.NUM_IMAGES, "train", 60_000)
    with pytest.raises(ValueError, match=re.escape(f"must have 60000 train images, got 13 in {tmp_path};")):
        Dataset(tmp_path).images("train")
