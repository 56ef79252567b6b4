"""DomainNet in its real format, a few images of it written by the test."""

import re
from pathlib import Path

import pytest
from PIL import Image

from ssat_probe.domainnet import CLASSES, domain

ROWS = {
    "train": [("The_Mona_Lisa", 310), ("aircraft_carrier", 0), ("zigzag", 344), ("cell_phone", 67)],
    "test": [("t-shirt", 327), ("airplane", 1), ("cello", 66)],
}
Dataset = domain("quickpaint", num_train=4, num_test=3, archive="quickpaint.zip")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the lists and images of a domain."""
    for split, rows in ROWS.items():
        lines = [f"quickpaint/{name}/quickpaint_001_{split}.jpg {label}" for name, label in rows]
        (tmp_path / f"quickpaint_{split}.txt").write_text("\n".join(lines) + "\n")
        for place, line in enumerate(lines):
            path = tmp_path / line.rpartition(" ")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30 + place, 20), (0, 50 * place, 0)).save(path, quality=100)
    return tmp_path


def test_labels_come_from_the_lists_and_not_from_sorted_folders(root: Path) -> None:
    data = Dataset(root, img_size=(8, 8))
    for split, rows in ROWS.items():
        images = data.images(split)
        assert images.labels.tolist() == [label for _, label in rows]
        assert [data.facts.classes[label] for label in images.labels] == [name for name, _ in rows]
        green = images.read(range(len(rows))).float().mean((2, 3))[:, 1]
        assert (green / 50).round().tolist() == list(range(len(rows)))


def test_there_are_345_classes() -> None:
    assert len(set(CLASSES.split())) == len(CLASSES.split()) == 345


def test_a_list_that_is_missing_or_of_another_kind_is_named(root: Path) -> None:
    path = root / "quickpaint_train.txt"
    path.write_text("quickpaint/zigzag/a.jpg\n")
    sentence = f"{path} must be the train list of quickpaint, a path and a label per line, got "
    with pytest.raises(ValueError, match=re.escape(sentence + "ValueError: invalid literal for int()")):
        Dataset(root).images("train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(sentence + "no such file")):
        Dataset(root).images("train")


def test_a_wrong_count_names_both_numbers(root: Path) -> None:
    path = root / "quickpaint_test.txt"
    path.write_text(path.read_text().partition("\n")[0])
    with pytest.raises(ValueError, match=re.escape(f"quickpaint must have 3 test images, got 1 in {root};")):
        Dataset(root).images("test")
