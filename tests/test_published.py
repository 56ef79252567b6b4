"""What all published data sets have in common."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ssat_probe import registry
from ssat_probe.images import ArrayImages, Dataset, Facts, Images, Source
from ssat_probe.published import Published, frozen_split

COUNTS = {"train": 7, "test": 3}


def facts(num_classes: int = 5) -> Facts:
    names = tuple("abcdefgh"[:num_classes])
    return Facts(names, (11, 13), 1, (0.5,), (0.25,), flip=True, splits="", licence="", citation="")


def made(root: Path | None = None, **fields: object) -> Published:
    """A set whose images come from nowhere: 7 and 3 of 11x13."""

    def read(root: Path, split: str, img_size: tuple[int, int]) -> Images:
        return ArrayImages(torch.zeros(COUNTS[split], 1, 11, 13, dtype=torch.uint8), np.arange(COUNTS[split]) % 5)

    return Published(
        root,
        **{"name": "made", "source": Source("tree"), "own": facts(), "num_images": COUNTS, "read": read} | fields,  # type: ignore[arg-type]
    )


def test_splits_and_facts_are_those_stated(tmp_path: Path) -> None:
    data = made(tmp_path)
    assert isinstance(data, Dataset)
    assert data.official == ("train", "test")
    assert data.facts == facts()
    assert data.images("train") is data.images("train")
    assert len(data.images("test")) == 3


def test_arrays_are_brought_to_the_size_asked_for(tmp_path: Path) -> None:
    data = made(tmp_path, img_size=(17, 19))
    assert data.facts.img_size == (17, 19)
    assert data.images("train").read([2, 3]).shape == (2, 1, 17, 19)


def test_an_embedded_set_needs_no_folder() -> None:
    assert len(made(source=Source()).images("train")) == 7


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "made must lie in a folder on disk, got none; name it with --data-dir."),
        ({"fetch": print}, "made must lie in a folder on disk, got none; name it with --data-dir, and add --download"),
        ({"root": Path("no/such")}, "no/such must be the folder of made, got no such folder; check --data-dir."),
        (
            {"root": Path("no/such"), "fetch": print},
            "no/such must be the folder of made, got no such folder; check --data-dir, or add --download.",
        ),
    ],
)
def test_a_missing_folder_is_a_sentence_that_says_what_to_do(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(sentence)):
        made(**fields).images("train")  # type: ignore[arg-type]


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("No 'val' in splits of made: train, test.")):
        made(tmp_path).images("val")


def test_a_wrong_count_names_both_numbers(tmp_path: Path) -> None:
    sentence = f"made must have 11 test images, got 3 in {tmp_path}; the files are incomplete or of another version"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        made(tmp_path, num_images={"train": 7, "test": 11}).images("test")


def test_a_label_beyond_the_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("The labels of made must be from 0 to 2, got 0 to 4 in ")):
        made(tmp_path, own=facts(num_classes=3)).images("train")


def test_fetching_happens_when_asked_for_into_a_new_folder(tmp_path: Path) -> None:
    fetched: list[Path] = []
    new = tmp_path / "new" / "folder"
    assert len(made(new, download=True, fetch=fetched.append).images("train")) == 7
    assert fetched == [new]
    made(new, fetch=fetched.append).images("train")
    assert fetched == [new]


def test_a_set_that_only_a_person_can_get_refuses_to_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="made has to be fetched by hand, got --download; ssat-probe data made says"):
        made(tmp_path, download=True).images("train")


def test_a_fetch_that_fails_says_what_to_do_by_hand(tmp_path: Path) -> None:
    def fetch(root: Path) -> None:
        raise RuntimeError("no route")

    sentence = f"https://x.org must be reachable and {tmp_path} writable for --download, got 'no route'; fetch the"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        made(tmp_path, download=True, fetch=fetch, source=Source("tree", "https://x.org")).images("train")


def test_a_frozen_split_divides_the_images_with_classes_in_proportion() -> None:
    pixels = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1)
    labels = np.repeat(np.arange(3), 20)
    parts = frozen_split(pixels, labels, 15)
    assert np.bincount(parts["test"].labels).tolist() == [5, 5, 5]
    both = torch.cat([part.pixels.flatten() for part in parts.values()])
    assert sorted(both.tolist()) == list(range(60))


@pytest.mark.parametrize("name", sorted(set(registry.names("data")) - {"folder", "huggingface", "unlabelled"}))
def test_every_published_set_states_all_that_is_to_know(name: str) -> None:
    data = registry.load("data", name).Dataset()
    stated = data.facts
    assert isinstance(data, Dataset)
    assert data.name == name
    assert len(set(stated.classes)) == stated.num_classes > 1
    assert len(stated.mean) == len(stated.std) == stated.channels
    assert min(stated.img_size) >= 8
    assert all((stated.splits, stated.licence, stated.citation, data.source.how))
    assert bool(data.source.tree) == bool(data.source.address)
    assert {"train", "test"} <= set(data.official)
    if data.source.tree:
        assert all(f"{count:,}" in stated.splits for count in data.num_images.values())
