"""DomainNet sketch: its counts; the format is tested with ``domainnet``."""

from pathlib import Path

import pytest
from PIL import Image

from ssat_probe.data.sketch import Dataset


def test_facts_are_the_published_ones() -> None:
    data = Dataset()
    assert data.num_images == {"train": 48212, "test": 20916}
    assert (data.facts.num_classes, data.facts.img_size, data.facts.channels) == (345, (224, 224), 3)
    assert "sketch_train.txt" in data.source.tree


def test_a_short_list_is_read_and_answered_with_both_numbers(tmp_path: Path) -> None:
    (tmp_path / "sketch" / "zigzag").mkdir(parents=True)
    Image.new("RGB", (5, 7)).save(tmp_path / "sketch" / "zigzag" / "a.jpg")
    (tmp_path / "sketch_test.txt").write_text("sketch/zigzag/a.jpg 344\n")
    assert Dataset(tmp_path, num_images={"test": 1}).images("test").labels.tolist() == [344]
    with pytest.raises(ValueError, match="sketch must have 20916 test images, got 1 in "):
        Dataset(tmp_path).images("test")
