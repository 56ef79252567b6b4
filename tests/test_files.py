"""Decoding of image files of every kind, and of files that are none."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssat_probe.files import FileImages, decoded, listed, reading, shape

RNG = np.random.default_rng(0)


def colour(height: int = 5, width: int = 7) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def test_a_lossless_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    pixels = colour()
    path = saved(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(decoded(path, (5, 7), 3), pixels)
    assert shape(path) == (5, 7, 3)


def test_a_grey_file_can_be_read_in_colour(tmp_path: Path) -> None:
    pixels = colour()[..., 0]
    path = saved(tmp_path / "a.png", pixels)
    assert shape(path) == (5, 7, 1)
    np.testing.assert_array_equal(decoded(path, (5, 7), 1)[..., 0], pixels)
    np.testing.assert_array_equal(decoded(path, (5, 7), 3), pixels[..., None].repeat(3, axis=-1))


def test_sixteen_bits_are_reduced_to_eight_instead_of_clipped(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 2**16, (5, 7), dtype=np.uint16)
    path = saved(tmp_path / "a.png", pixels)
    assert shape(path) == (5, 7, 1)
    np.testing.assert_array_equal(decoded(path, (5, 7), 1)[..., 0], pixels >> 8)


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    image = Image.fromarray(colour()[..., 0] % 2).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", transparency=b"\x00\xff")
    assert {tuple(pixel) for pixel in decoded(tmp_path / "a.png", (5, 7), 3).reshape(-1, 3)} == {
        (255, 0, 0),
        (0, 0, 255),
    }


def test_an_alpha_channel_is_dropped(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(saved(tmp_path / "a.png", pixels), (5, 7), 3), pixels[..., :3])


def test_a_larger_image_is_scaled_to_cover_and_cropped_around_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((30, 90, 3), dtype=np.uint8)
    pixels[:, 30:60] = 211
    got = decoded(saved(tmp_path / "a.png", pixels), (10, 10), 3)
    assert got.shape == (10, 10, 3)
    assert (got[:, 2:-2] == 211).all()
    assert (decoded(saved(tmp_path / "b.png", pixels), (10, 30), 3)[:, :7] == 0).all()


def test_a_large_photograph_decoded_at_a_fraction_looks_like_one_decoded_whole(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:640, 0:960] / 100
    pixels = np.stack([127 + 120 * np.sin(rows), 127 + 120 * np.cos(columns), 127 + 60 * np.sin(rows + columns)], -1)
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "a.png")
    fast, whole = (decoded(tmp_path / name, (40, 60), 3).astype(int) for name in ("a.jpg", "a.png"))
    assert np.abs(fast - whole).max() <= 4


def broken(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "broken.jpg"
    if kind == "text":
        path.write_text("no image at all")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        Image.fromarray(colour(64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:-700])
    elif kind == "folder":
        path.mkdir()
    elif kind == "float":
        Image.fromarray(np.ones((5, 7), dtype=np.float32)).save(path, format="TIFF")
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", "cannot identify image file"),
        ("empty", "cannot identify image file"),
        ("truncated", "image file is truncated"),
        ("missing", "no such file"),
        ("folder", "Is a directory"),
        ("float", "mode F: numbers without a known range"),
    ],
)
def test_what_cannot_be_decoded_is_one_sentence_that_names_the_file(tmp_path: Path, kind: str, reason: str) -> None:
    path = broken(tmp_path, kind)
    sentence = f"{re.escape(str(path))} must be an image that can be decoded, got .*{reason}.*; replace or remove it"
    with pytest.raises(ValueError, match=sentence) as caught:
        decoded(path, (5, 7), 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [34, 10])
def test_an_image_too_large_to_be_safe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = saved(tmp_path / "a.png", colour())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=rf"a\.png must have at most {limit} pixels, got more; scale it down"):
        decoded(path, (5, 7), 3)
    with pytest.raises(ValueError, match=rf"a\.png must have at most {limit} pixels"):
        shape(path)


def test_files_are_read_in_the_order_asked_for_and_hash_by_content_of_the_folder(tmp_path: Path) -> None:
    written = [colour() for _ in range(5)]
    paths = tuple(saved(tmp_path / f"{number}.png", pixels) for number, pixels in enumerate(written))
    images = FileImages(paths, np.arange(5), (5, 7), 3, tmp_path)
    got = images.read(np.array([3, 0]))
    assert torch.equal(got, torch.from_numpy(np.stack([written[3], written[0]])).permute(0, 3, 1, 2))
    assert got.is_contiguous()
    assert (len(images), images.in_memory) == (5, False)
    first = images.fingerprint()
    assert FileImages(paths, np.arange(5), (4, 4), 3, tmp_path).fingerprint() != first
    assert FileImages(paths, np.zeros(5), (5, 7), 3, tmp_path).fingerprint() != first
    saved(paths[2], colour(11, 13))
    assert images.fingerprint() != first


def test_a_moved_folder_keeps_its_fingerprint(tmp_path: Path) -> None:
    def made(root: Path) -> FileImages:
        root.mkdir()
        paths = tuple(saved(root / f"{number}.png", np.full((5, 7), number, np.uint8)) for number in range(3))
        return FileImages(paths, np.zeros(3), (5, 7), 1, root)

    assert made(tmp_path / "here").fingerprint() == made(tmp_path / "there").fingerprint()


def test_a_list_of_images_is_read_in_its_order(tmp_path: Path) -> None:
    for value, name in enumerate(("b.png", "a.png")):
        Image.fromarray(np.full((3, 5), 10 + value, dtype=np.uint8)).save(tmp_path / name)
    images = listed(tmp_path, [("a.png", 2), ("b.png", 7)], (3, 5), 1)
    assert images.labels.tolist() == [2, 7]
    assert images.read([0, 1])[:, 0, 0, 0].tolist() == [11, 10]
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"must hold the 3 images of its list, got 2 missing, the first {tmp_path}/c")
    ):
        listed(tmp_path, [("a.png", 0), ("c.png", 0), ("d.png", 0)], (3, 5), 1)


def test_what_cannot_be_read_is_one_sentence_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    with (
        pytest.raises(FileNotFoundError, match=re.escape(f"{path} must be a list, got no such file; check")),
        reading(path, "a list"),
    ):
        pass
    path.write_text("a\nb")
    with (
        pytest.raises(ValueError, match=re.escape(f"{path} must be a list, got KeyError: 'x' on reading it;")),
        reading(path, "a list"),
    ):
        raise KeyError("x")
    with reading(path, "a list") as same:
        assert same.read_text() == "a\nb"
