"""ImageNet-1K in its real layout, one tiny image per class written by the test."""

import io
import re
from pathlib import Path

import pytest
from PIL import Image

from ssat_probe.data import imagenet
from ssat_probe.data.imagenet import FACTS, Dataset


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders train and val with all 1,000 classes, of whose counts the loader has been told."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (200, 0, 0)).save(buffer, "JPEG")
    for split in ("train", "val"):
        for wnid in FACTS.classes:
            folder = tmp_path / split / wnid
            folder.mkdir(parents=True)
            (folder / f"{wnid}_10026.JPEG").write_bytes(buffer.getvalue())
    (tmp_path / "train" / FACTS.classes[3] / "extra.JPEG").write_bytes(buffer.getvalue())
    monkeypatch.setitem(imagenet.NUM_IMAGES, "train", 1001)
    monkeypatch.setitem(imagenet.NUM_IMAGES, "test", 1000)
    return tmp_path


def test_train_and_val_are_read_in_the_order_of_the_wordnet_numbers(root: Path) -> None:
    data = Dataset(root, img_size=(16, 16))
    assert data.images("test").labels.tolist() == list(range(1000))
    assert data.images("train").labels.tolist() == sorted([*range(1000), 3])
    assert data.images("test").read([999]).shape == (1, 3, 16, 16)
    assert data.official == ("train", "test")


def test_facts_need_no_files() -> None:
    facts = Dataset().facts
    assert (facts.num_classes, facts.classes[0], facts.classes[-1]) == (1000, "n01440764", "n15075141")
    assert list(facts.classes) == sorted(facts.classes)


def test_other_layouts_are_answered_with_what_is_there(root: Path) -> None:
    (root / "val").rename(root / "valid")
    sentence = f"{root} must hold the folders train and val of imagenet, got train, valid; unpack or rename"
    with pytest.raises(FileNotFoundError, match=re.escape(sentence)):
        Dataset(root).images("test")
    (root / "val").mkdir()
    (root / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    sentence = f"{root / 'val'} must hold a folder for each of the 1000 classes, got 1000 missing, the first n01440764"
    with pytest.raises(FileNotFoundError, match=re.escape(sentence)):
        Dataset(root).images("test")


def test_a_wrong_count_names_both_numbers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(imagenet.NUM_IMAGES, "test", 50_000)
    with pytest.raises(ValueError, match=re.escape(f"imagenet must have 50000 test images, got 1000 in {root};")):
        Dataset(root).images("test")
