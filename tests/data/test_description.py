"""What is printed about a data set, and the check of what is there."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssat_probe import registry
from ssat_probe.data import description, pneumoniamnist


@pytest.mark.parametrize(
    "name", sorted(set(registry.names("data")) - {"digits", "mnist5k", "folder", "huggingface", "unlabelled"})
)
def test_what_lies_on_disk_is_described_without_it(name: str) -> None:
    dataset = registry.load("data", name).Dataset()
    printed = "\n".join(description(name))
    assert printed.startswith(f"{name}: {registry.summary('data', name)}\nLayout of --data-dir:\n  ")
    for line in dataset.source.tree.splitlines():
        assert f"\n  {line}\n" in printed
    for part in (dataset.source.address, dataset.source.how, *dataset.facts.classes[:2], dataset.facts.licence):
        assert part in printed
    assert f"Classes: {dataset.facts.num_classes:,} (" in printed
    assert printed.endswith("Check: none, since no folder was named; add --data-dir.")


def test_embedded_sets_need_nothing_and_are_checked() -> None:
    lines = list(description("digits"))
    assert "Layout: nothing is needed." in lines
    assert lines[-2:] == [
        "Check of train: 1,300 images, read at 8x8; as it should be.",
        "Check of test: 497 images, read at 8x8; as it should be.",
    ]


def test_a_folder_of_ones_own_is_described_by_what_is_in_it(tmp_path: Path) -> None:
    assert list(description("folder"))[-1].startswith("folder must be told where the images are, got no folder; name")
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (7, 5)).save(tmp_path / split / name / "a.png")
    lines = list(description("folder", tmp_path))
    assert "Classes: 2 (cat, dog)" in lines
    assert lines[-1] == "Check of test: 2 images, read at 5x7; as it should be."
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'x'} must be a folder of images, got no such")):
        list(description("folder", tmp_path / "x"))


def test_what_is_wrong_is_said_after_the_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"images": (3, 28, 28), "labels": (3, 1)}
    names = [(split, kind) for split in ("train", "val", "test") for kind in shapes]
    stored = {f"{split}_{kind}": np.zeros(shapes[kind], dtype=np.uint8) for split, kind in names}
    np.savez(tmp_path / "pneumoniamnist.npz", **stored)
    monkeypatch.setitem(pneumoniamnist.NUM_IMAGES, "train", 3)
    lines = description("pneumoniamnist", tmp_path)
    printed: list[str] = []
    with pytest.raises(ValueError, match=re.escape(f"pneumoniamnist must have 524 val images, got 3 in {tmp_path};")):
        printed.extend(iter(lambda: next(lines), None))
    assert printed[-1] == "Check of train: 3 images, read at 28x28; as it should be."
