"""Folders of images, written by the test in the formats that users have."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssat_probe import images as images_module
from ssat_probe.data.folder import Dataset
from ssat_probe.images import split
from ssat_probe.loading import batches

COUNTS = {"train": 7, "val": 3, "test": 5}


def write(path: Path, seed: int, size: tuple[int, int] = (11, 13), channels: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(path)
    return path


def tree(root: Path, splits: tuple[str, ...] = ("train", "test"), channels: int = 3) -> Path:
    for split_name in splits:
        for label, name in enumerate(("cat", "dog")):
            for number in range(COUNTS[split_name]):
                write(root / split_name / name / f"{number}.png", seed=100 * label + number, channels=channels)
    return root


def test_classes_size_and_images_are_those_on_disk(tmp_path: Path) -> None:
    data = Dataset(tree(tmp_path))
    facts, train = data.facts, data.images("train")
    assert (facts.classes, facts.img_size, facts.channels) == (("cat", "dog"), (11, 13), 3)
    assert data.official == ("train", "test")
    assert train.labels.tolist() == [0] * 7 + [1] * 7
    expected = np.asarray(Image.open(tmp_path / "train" / "dog" / "2.png"))
    assert torch.equal(train.read([9])[0], torch.from_numpy(expected.copy()).permute(2, 0, 1))


def test_mean_and_std_are_those_of_the_training_pixels(tmp_path: Path) -> None:
    data = Dataset(tree(tmp_path))
    pixels = data.images("train").read(range(14)).double() / 255
    assert data.facts.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert data.facts.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_grey_images_have_one_channel_and_one_in_colour_makes_three(tmp_path: Path) -> None:
    assert Dataset(tree(tmp_path, channels=1)).facts.channels == 1
    write(tmp_path / "train" / "dog" / "coloured.png", seed=0)
    assert Dataset(tmp_path).facts.channels == 3


@pytest.mark.parametrize(
    ("splits", "official", "num_test", "num_val", "policy"),
    [
        (("train", "val", "test"), ("train", "val", "test"), 10, 6, "The folders train, val and test."),
        (("train", "test"), ("train", "test"), 10, 1, "The folders train and test; the latter is for testing alone."),
        (("train", "val"), ("train", "test"), 6, 1, "The folders train and val; the latter is for testing alone."),
    ],
)
def test_every_layout_has_a_policy(
    tmp_path: Path, splits: tuple[str, ...], official: tuple[str, ...], num_test: int, num_val: int, policy: str
) -> None:
    data = Dataset(tree(tmp_path, splits))
    assert data.official == official
    assert data.facts.splits == policy
    assert (len(split(data, "test")), len(split(data, "val"))) == (num_test, num_val)
    assert len(split(data, "train")) == 14 - (num_val if "val" not in official else 0)


def test_images_are_decoded_once_where_they_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Dataset(tree(tmp_path))
    small = split(data, "train")
    monkeypatch.setattr(images_module, "IN_MEMORY_BYTES", 13 * 3 * 11 * 13 - 1)
    large = split(data, "train")
    assert (small.in_memory, large.in_memory) == (True, False)
    for (here, labels, _), (there, other_labels, _) in zip(
        batches(small, [[0, 5], [12]]), batches(large, [[0, 5], [12]]), strict=True
    ):
        assert torch.equal(here, there)
        assert torch.equal(labels, other_labels)


def test_other_files_and_hidden_folders_are_passed_over(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("a note")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    write(tmp_path / "train" / "cat" / "deeper" / "UPPER.JPG", seed=1)
    data = Dataset(tmp_path)
    assert data.facts.classes == ("cat", "dog")
    assert len(data.images("train")) == 15


def test_hidden_copies_are_passed_over_and_links_are_followed(tmp_path: Path) -> None:
    tree(tmp_path / "a")
    place = tmp_path / "a" / "train" / "cat"

    def found() -> list[str]:
        return [path.name for path in Dataset(tmp_path / "a").images("train").paths]

    before = found()
    (place / ".ipynb_checkpoints").mkdir()
    for copy in (".ipynb_checkpoints/0-checkpoint.png", "._0.png"):
        (place / copy).write_bytes((place / "0.png").read_bytes())
    assert found() == before
    place.rename(tmp_path / "elsewhere")
    place.mkdir()
    (place / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "above").symlink_to(tmp_path / "elsewhere")  # a circle
    assert found() == before


def test_uniform_images_do_not_divide_by_zero(tmp_path: Path) -> None:
    for name in ("train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(np.full((3, 5), 51, dtype=np.uint8)).save(tmp_path / name)
    facts = Dataset(tmp_path).facts
    assert (facts.mean, facts.std) == ((0.2,), (pytest.approx(1 / 255, abs=1e-6),))


def test_sizes_that_differ_ask_for_one(tmp_path: Path) -> None:
    odd = write(tree(tmp_path) / "test" / "dog" / "odd.png", seed=0, size=(17, 19))
    with pytest.raises(
        ValueError, match=rf"got 11x13 in \S+0\.png and 17x19 in {re.escape(str(odd))}; give --img-size"
    ):
        _ = Dataset(tmp_path).facts
    data = Dataset(tmp_path, img_size=(8, 10))
    assert data.facts.img_size == (8, 10)
    assert data.images("test").read(range(11)).shape == (11, 3, 8, 10)


def test_a_broken_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    broken = tree(tmp_path) / "test" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200])  # the header is whole
    with pytest.raises(ValueError, match=re.escape(f"{broken} must be an image that can be decoded, got ")):
        split(Dataset(tmp_path), "test")


def test_without_a_folder_the_sentence_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="told where the images are, got no folder; name it with --data-dir"):
        _ = Dataset().official
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'x'} must be a folder of images, got no such")):
        _ = Dataset(tmp_path / "x").facts


@pytest.mark.parametrize(("splits", "got"), [((), "no folders"), (("test",), "test"), (("train",), "train")])
def test_missing_splits_are_answered_with_what_is_there(tmp_path: Path, splits: tuple[str, ...], got: str) -> None:
    sentence = f"{tmp_path} must hold the folders train and test (or val), got {got}; move the images"
    with pytest.raises(FileNotFoundError, match=re.escape(sentence)):
        _ = Dataset(tree(tmp_path, splits)).official


def test_classes_that_differ_between_splits_are_named(tmp_path: Path) -> None:
    write(tree(tmp_path) / "test" / "fish" / "0.png", seed=0)
    sentence = f"{tmp_path / 'test'} must hold the same class folders as train, got a difference in fish; rename"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Dataset(tmp_path).images("train")


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / name / "cat" / "0.png", seed=0)
    with pytest.raises(ValueError, match="a folder for each of two or more classes, got 1; sort the images"):
        _ = Dataset(tmp_path).facts


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tree(tmp_path) / name / "fish").mkdir()
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(tmp_path / 'train' / 'fish'))} must hold images \(.*\), got none"
    ):
        Dataset(tmp_path).images("train")


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("No 'val' in splits of this folder: train, test.")):
        Dataset(tree(tmp_path)).images("val")
