"""Images in files: decoding, and a set of them that is read as it is needed."""

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

MODES = {1: "L", 3: "RGB"}
"Pillow's name for one and for three channels."

GREY = frozenset({"1", "L", "LA", "La", "I", "F"}) | {"I;16", "I;16B", "I;16L", "I;16N"}
"Pillow's modes of images without colour."

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
"Endings of files that are taken for images."


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images decoded from their files whenever they are read.

    Args:
        paths: One file per image.
        labels: Class of each image.
        img_size: Height and width that every image is scaled and cropped to, see ``decoded``.
        channels: 1 (grey) or 3 (RGB).
        root: Folder that the paths are relative to in the fingerprint, so that a moved copy keeps it.
    """

    paths: tuple[Path, ...]
    labels: np.ndarray
    img_size: tuple[int, int]
    channels: int
    root: Path

    def __post_init__(self) -> None:
        """Bring labels to int64."""
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=np.int64))

    @property
    def in_memory(self) -> bool:
        """False."""
        return False

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def read(self, ids: Sequence[int] | np.ndarray) -> UInt8[Tensor, "batch channel height width"]:
        """Pixels of the images at these positions."""
        pixels = np.empty((len(ids), *self.img_size, self.channels), dtype=np.uint8)
        for row, position in enumerate(ids):
            pixels[row] = decoded(self.paths[position], self.img_size, self.channels)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def fingerprint(self) -> str:
        """SHA-256 over relative path, size and label of each file, and the image size."""
        digest = hashlib.sha256(repr((self.img_size, self.channels)).encode())
        rows = (
            (path.relative_to(self.root).as_posix(), path.stat().st_size, int(label))
            for path, label in zip(self.paths, self.labels, strict=True)
        )
        for row in sorted(rows):
            digest.update(repr(row).encode())
        return digest.hexdigest()


def decoded(path: Path, img_size: tuple[int, int], channels: int) -> UInt8[np.ndarray, "height width channel"]:
    """Pixels of one file, scaled (bicubic, antialiased) until they cover the size, then cropped around the centre.

    Transparency is dropped, 16-bit grey becomes 8-bit, and the orientation noted by a camera is not applied (the habit
    of the field, so that results compare).

    Args:
        path: An image file.
        img_size: Height and width.
        channels: 1 (grey) or 3 (RGB).

    Returns:
        0 to 255.
    """
    height, width = img_size
    with _opened(path) as image:
        # A large JPEG is decoded at a fraction of its size, never below twice what is needed.
        image.draft(MODES[channels], (2 * width, 2 * height))
        return pixels_of(image, img_size, channels)


def pixels_of(
    image: Image.Image, img_size: tuple[int, int], channels: int
) -> UInt8[np.ndarray, "height width channel"]:
    """Pixels of an opened image, as ``decoded`` gives those of a file.

    Args:
        image: Of any mode.
        img_size: Height and width.
        channels: 1 (grey) or 3 (RGB).

    Returns:
        0 to 255.
    """
    height, width = img_size
    plain = _eight_bit(image).convert(MODES[channels])
    if plain.size != (width, height):
        plain = ImageOps.fit(plain, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(plain).reshape(height, width, channels)


def colour(
    images: Iterable[UInt8[np.ndarray, "height width channel"]],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over the pixels of some images of one size.

    Args:
        images: 0 to 255; at least one.

    Returns:
        Of pixels in [0, 1], to six digits; the deviation at least 1/255, so that nothing is divided by 0.
    """
    total, squares, number = np.zeros(()), np.zeros(()), 0
    for image in images:
        values = image / 255
        total, squares, number = total + values.mean((0, 1)), squares + (values**2).mean((0, 1)), number + 1
    mean = total / number
    std = np.sqrt(np.maximum(squares / number - mean**2, 0)).clip(1 / 255)
    return tuple(mean.round(6).tolist()), tuple(std.round(6).tolist())


def shape(path: Path) -> tuple[int, int, int]:
    """Height, width and channels (1 or 3) of an image file, from its header alone.

    Args:
        path: An image file.

    Returns:
        Pixels, pixels, channels.
    """
    with _opened(path) as image:
        return image.height, image.width, 1 if image.mode in GREY else 3


def listed(root: Path, rows: Iterable[tuple[str, int]], img_size: tuple[int, int], channels: int) -> FileImages:
    """Images named by a list, in its order.

    Args:
        root: Folder that the names are relative to.
        rows: Name and class of each image.
        img_size: Height and width that every image is scaled and cropped to.
        channels: 1 (grey) or 3 (RGB).

    Returns:
        The images, decoded when read.

    Raises:
        FileNotFoundError: If some of the files are missing; says how many, and names the first.
    """
    rows = list(rows)
    paths = tuple(root / name for name, _ in rows)
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{root} must hold the {len(paths)} images of its list, got {len(missing)} missing, the first "
            f"{missing[0]}; unpack them there."
        )
    return FileImages(paths, np.array([label for _, label in rows], dtype=np.int64), img_size, channels, root)


def by_class(folder: Path, classes: Sequence[str]) -> tuple[tuple[Path, ...], np.ndarray]:
    """Images of a folder that holds one folder per class, sorted by class and then by path.

    Args:
        folder: Such as ``train``.
        classes: Names of the class folders, in the order of their labels.

    Returns:
        Files; class of each.

    Raises:
        ValueError: If a class has no images.
    """
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = below(folder / name)
        if not found:
            raise ValueError(
                f"{folder / name} must hold images ({', '.join(sorted(ENDINGS))}), got none; add some or remove "
                "the class from every split."
            )
        paths += found
        labels += [label] * len(found)
    return tuple(paths), np.array(labels, dtype=np.int64)


def below(folder: Path) -> list[Path]:
    """Image files at any depth, through links too, without the hidden ones that editors and systems leave behind.

    Args:
        folder: Any that exists.

    Returns:
        Their paths, sorted.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        is_circle = (real := os.path.realpath(place)) in seen  # a link to a folder above
        seen.add(real)
        folders[:] = [] if is_circle else [name for name in folders if not name.startswith((".", "__"))]
        shown = [] if is_circle else [name for name in names if not name.startswith(".")]
        found += [Path(place) / name for name in shown if Path(name).suffix.lower() in ENDINGS]
    return sorted(found)


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, sorted by name, without hidden ones and what archives of other systems leave behind.

    Args:
        folder: Any that exists.

    Returns:
        Their paths.
    """
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


@contextmanager
def reading(path: Path, content: str) -> Iterator[Path]:
    """A file that holds what a data set needs, with every failure to read it turned into one sentence.

    Args:
        path: The file.
        content: What it must be, such as "the labels of flowers102"; goes into the message.

    Yields:
        The path.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If reading it fails, for whatever reason.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be {content}, got no such file; check --data-dir, or put it there.")
    try:
        yield path
    except Exception as error:  # readers of npz, mat, json and gz raise nearly anything on damaged files
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path} must be {content}, got {reason} on reading it; get the file again.") from error


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file, with every failure inside turned into one sentence that names it.

    Yields:
        The image; its pixels are decoded when they are asked for.

    Raises:
        ValueError: If the file is missing, not an image, damaged, or larger than Pillow considers safe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} must have at most {Image.MAX_IMAGE_PIXELS} pixels, got more; scale it down or remove it."
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).partition("\n")[0]
        raise ValueError(
            f"{path} must be an image that can be decoded, got {reason!r}; replace or remove it."
        ) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # Pillow would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in {"I", "F"}:
        raise ValueError(f"mode {image.mode}: numbers without a known range")
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns unless it goes through RGBA
        return image.convert("RGBA")
    return image
