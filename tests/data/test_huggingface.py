"""Data of Hugging Face: with its package where that is installed, else with a stand-in that has its interface."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from ssat_probe.data import open_dataset
from ssat_probe.images import split
from ssat_probe.recipe import Recipe
from ssat_probe.training import train


class Image:
    """Type of a column, as datasets.Image."""


class ClassLabel:
    """Type of a column, as datasets.ClassLabel."""

    dtype = "int64"

    def __init__(self, names: list[str]) -> None:
        self.names = names


class Value:
    """Type of a column, as datasets.Value."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


class Rows:
    """As datasets.Dataset: a row by its number, a column by its name."""

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features = columns, features
        self.info = types.SimpleNamespace(license="mit", citation="Somebody (2020)")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        assert type(key) is int, "datasets takes no other integers kindly"
        return {name: values[key] for name, values in self.columns.items()}


def pictures(number: int, mode: str = "RGB", size: tuple[int, int] = (10, 8)) -> list[Pillow.Image]:
    generator = np.random.default_rng(number)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return [Pillow.fromarray(generator.integers(0, 256, shape, dtype=np.uint8), mode) for _ in range(number)]


def rows(number: int, mode: str = "RGB", label: str = "label", kind: Any = None, lowest: int = 0) -> Rows:
    kind = kind or ClassLabel(["ant", "bee", "cow"])
    columns = {"image": pictures(number, mode), label: [i % 3 + lowest for i in range(number)]}
    return Rows(columns, {"image": Image(), label: kind})


Hub = dict[str, dict[str, Rows]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """What the stand-in finds, by name; remembers how it was asked."""
    there: Hub = {}
    package: Any = types.ModuleType("datasets")
    package.asked = []

    def load_dataset(path: str, name: str | None = None, *, cache_dir: Any = None, download_config: Any = None) -> Any:
        package.asked.append((path, name, cache_dir, download_config.local_files_only))
        if path not in there:
            raise ConnectionError(f"Couldn't reach {path!r}\nand more")
        return there[path]

    package.load_dataset = load_dataset
    package.load_from_disk = lambda path: there[path]
    package.DownloadConfig = lambda local_files_only: types.SimpleNamespace(local_files_only=local_files_only)
    monkeypatch.setitem(sys.modules, "datasets", package)
    there["asked"] = package.asked
    return there


def test_images_labels_classes_and_facts_are_those_of_the_data(hub: Hub) -> None:
    hub["me/insects"] = {"train": rows(30), "validation": rows(9), "test": rows(12)}
    data = open_dataset("hf:me/insects")
    assert data.official == ("train", "val", "test")
    facts = data.facts
    assert (facts.classes, facts.img_size, facts.channels) == (("ant", "bee", "cow"), (8, 10), 3)
    assert (facts.licence, facts.citation) == ("mit", "Somebody (2020)")
    test = data.images("test")
    assert test.labels.tolist() == [0, 1, 2] * 4
    expected = np.stack([np.asarray(one) for one in hub["me/insects"]["test"]["image"]])
    assert np.array_equal(test.read([3, 0]).permute(0, 2, 3, 1).numpy(), expected[[3, 0]])
    pixels = np.stack([np.asarray(one) for one in hub["me/insects"]["train"]["image"]]) / 255
    assert facts.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=1e-6)
    assert facts.std == pytest.approx(pixels.std((0, 1, 2)), abs=1e-6)
    assert test.fingerprint() == open_dataset("hf:me/insects").images("test").fingerprint()
    assert test.fingerprint() != data.images("train").fingerprint()
    assert hub["asked"][0] == ("me/insects", None, None, True)


def test_configuration_cache_and_download_are_passed_on(hub: Hub, tmp_path: Path) -> None:
    hub["x"] = {"train": rows(6), "test": rows(3)}
    assert open_dataset("hf:x?small", tmp_path, download=True).official == ("train", "test")
    assert hub["asked"] == [("x", "small", str(tmp_path), False)]


def test_grey_numbers_without_names_and_a_validation_split_alone(hub: Hub) -> None:
    numbers: Any = {"label": "labels", "kind": Value("int32"), "lowest": 1}
    hub["x"] = {"train": rows(30, "L", **numbers), "validation": rows(6, "L", **numbers)}
    data = open_dataset("hf:x", img_size=(4, 4))
    assert data.official == ("train", "test")
    assert (data.facts.classes, data.facts.channels, data.facts.img_size) == (("1", "2", "3"), 1, (4, 4))
    assert data.images("test").labels.tolist() == [0, 1, 2] * 2
    assert len(split(data, "val")) == 3


def test_a_test_split_without_classes_is_not_tested_on(hub: Hub) -> None:
    hidden = rows(6)
    hidden.columns["label"] = [-1] * 6
    hub["a"] = {"train": rows(9), "validation": rows(7), "test": hidden}
    dataset = open_dataset("hf:a")
    assert dataset.official == ("train", "test")
    assert len(dataset.images("test")) == 7
    hub["b"] = {"train": rows(9), "test": hidden}
    with pytest.raises(
        ValueError, match="every image of its split test one of 3 classes, got 6 of 6 with none; choose"
    ):
        open_dataset("hf:b").images("test")


def test_what_was_saved_to_disk_is_opened_from_there(hub: Hub, tmp_path: Path) -> None:
    hub[str(tmp_path)] = {"train": rows(6), "test": rows(3)}
    (tmp_path / "dataset_dict.json").touch()
    assert len(open_dataset("hf:mine", tmp_path).images("train")) == 6


def test_it_can_be_trained_on(hub: Hub, tmp_path: Path) -> None:
    hub["me/insects"] = {"train": rows(40), "test": rows(12)}
    recipe = Recipe(
        method="ssat", model="vit_pico", data="hf:me/insects", img_size=(8, 8), patch_size=(2, 2), epochs=1,
        batch_size=12, warmup_epochs=0,
    )  # fmt: skip
    checkpoint = train(recipe, tmp_path, device="cpu")
    assert checkpoint.path.parent.name == "vit_pico-hf_me_insects-ssat-seed0"
    assert checkpoint.facts.classes == ("ant", "bee", "cow")


@pytest.mark.parametrize(
    ("splits", "sentence"),
    [
        (
            {"train": rows(3)},
            "hf:x must have a split train and one of test and validation, got train; choose other data",
        ),
        (
            {"train": Rows({"a": [1]}, {"a": Value("int64")}), "test": rows(3)},
            "must have one column of images, got none",
        ),
        (
            {"train": rows(3, kind=Value("string")), "test": rows(3)},
            "must have one column of classes, or one called label",
        ),
    ],
)
def test_data_of_another_shape_are_refused(hub: Hub, splits: dict[str, Rows], sentence: str) -> None:
    hub["x"] = splits
    with pytest.raises(ValueError, match=sentence):
        open_dataset("hf:x").images("train")


def test_images_of_several_sizes_need_one(hub: Hub) -> None:
    mixed = rows(4)
    mixed.columns["image"][2] = pictures(1, size=(20, 20))[0]
    hub["x"] = {"train": mixed, "test": rows(3)}
    with pytest.raises(
        ValueError, match="must share one size unless it is given, got 8x10 and 20x20 in hf:x; give --im"
    ):
        open_dataset("hf:x").images("train")
    assert open_dataset("hf:x", img_size=(8, 8)).images("train").read([2]).shape == (1, 3, 8, 8)


def test_what_cannot_be_found_is_named_with_the_reason(hub: Hub) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"hf:no/such must be on disk or, with --download, .* ConnectionError: Co"
    ):
        open_dataset("hf:no/such").images("train")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"hf:x needs the package datasets, .* pip install 'ssat-probe\[huggingface\]'"
    ):
        open_dataset("hf:x").images("train")


def test_a_folder_of_images_through_the_package_itself(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for name in ("train", "test"):
        for number, label in enumerate(("ant", "bee", "cow")):
            (tmp_path / name / label).mkdir(parents=True)
            for i, picture in enumerate(pictures(2 + number)):
                picture.save(tmp_path / name / label / f"{i}.png")
    data = open_dataset(f"hf:{tmp_path}")
    assert data.facts.classes == ("ant", "bee", "cow")
    assert np.bincount(data.images("train").labels).tolist() == [2, 3, 4]
