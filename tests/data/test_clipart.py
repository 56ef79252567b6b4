"""DomainNet clipart: its counts; the format is tested with ``domainnet``."""

from pathlib import Path

import pytest
from PIL import Image

from ssat_probe.data.clipart import Dataset


def test_facts_are_the_published_ones() -> None:
    data = Dataset()
    assert data.num_images == {"train": 33525, "test": 14604}
    assert (data.facts.num_classes, data.facts.img_size, data.facts.channels) == (345, (224, 224), 3)
    assert "clipart_train.txt" in data.source.tree


def test_a_short_list_is_read_and_answered_with_both_numbers(tmp_path: Path) -> None:
    (tmp_path / "clipart" / "zigzag").mkdir(parents=True)
    Image.new("RGB", (5, 7)).save(tmp_path / "clipart" / "zigzag" / "a.jpg")
    (tmp_path / "clipart_test.txt").write_text("clipart/zigzag/a.jpg 344\n")
    assert Dataset(tmp_path, num_images={"test": 1}).images("test").labels.tolist() == [344]
    with pytest.raises(ValueError, match="clipart must have 14604 test images, got 1 in "):
        Dataset(tmp_path).images("test")
