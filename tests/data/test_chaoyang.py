"""Chaoyang in its real format, a few images of it written by the test."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from ssat_probe.data import chaoyang
from ssat_probe.data.chaoyang import Dataset

LABELS = {"train": [2, 0, 3, 1, 2], "test": [1, 0, 3]}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with lists and images, of whose counts the loader has been told."""
    for split, labels in LABELS.items():
        (tmp_path / split).mkdir()
        rows = [{"name": f"{split}/{535 - i}-IMG00{i}x005.JPG", "label": label} for i, label in enumerate(labels)]
        for place, row in enumerate(rows):
            row |= {"label_A": 0, "label_B": 1, "label_C": row["label"]}
            Image.new("RGB", (64, 64), (40 * place, 0, 0)).save(tmp_path / str(row["name"]), quality=100)
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
        monkeypatch.setitem(chaoyang.NUM_IMAGES, split, len(labels))
    return tmp_path


def test_images_and_labels_are_those_of_the_lists(root: Path) -> None:
    data = Dataset(root, img_size=(16, 16))
    for split, labels in LABELS.items():
        images = data.images(split)
        assert images.labels.tolist() == labels
        red = images.read(range(len(labels))).float().mean((2, 3))[:, 0]
        assert (red / 40).round().tolist() == list(range(len(labels)))


def test_facts_need_no_files() -> None:
    facts = Dataset().facts
    assert facts.classes == ("normal", "serrated", "adenocarcinoma", "adenoma")
    assert (facts.img_size, facts.flip) == ((224, 224), True)


def test_a_list_that_is_missing_or_of_another_kind_is_named(root: Path) -> None:
    path = root / "train.json"
    path.write_text('[{"file": "a.JPG"}]')
    sentence = f"{path} must be the train list of Chaoyang: objects with name and label, got "
    with pytest.raises(ValueError, match=re.escape(sentence + "KeyError: 'name' on reading it")):
        Dataset(root).images("train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(sentence + "no such file")):
        Dataset(root).images("train")


def test_a_missing_image_is_named(root: Path) -> None:
    (root / "test" / "534-IMG001x005.JPG").unlink()
    with pytest.raises(FileNotFoundError, match=r"3 images of its list, got 1 missing, the first \S+IMG001x005\.JPG;"):
        Dataset(root).images("test")


def test_a_wrong_count_names_both_numbers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chaoyang.NUM_IMAGES, "train", 4021)
    with pytest.raises(ValueError, match=re.escape(f"chaoyang must have 4021 train images, got 5 in {root};")):
        Dataset(root).images("train")


def test_a_label_beyond_the_classes_is_refused(root: Path) -> None:
    rows = json.loads((root / "test.json").read_text())
    rows[1]["label"] = 4
    (root / "test.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="The labels of chaoyang must be from 0 to 3, got 1 to 4 in "):
        Dataset(root).images("test")
