"""Data sets that others published: facts and counts are stated in advance, a function reads the files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from ssat_probe.images import ArrayImages, Facts, Images, Source, fitted
from ssat_probe.registry import known
from ssat_probe.sampling import holdout

SPLIT_SEED = 0
"Of the test sets that we drew ourselves."

PHOTO_SIZE = (224, 224)
"Height and width that photographs of many sizes are scaled and cropped to, the habit of the papers."

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"Of ImageNet's training images; the papers use them for every set of photographs."

Reader = Callable[[Path, str, tuple[int, int]], Images]
"Folder, split, and height and width (which a set of one size may leave to ``Published``) to images."


@dataclass(frozen=True)
class Published:
    """A published data set; a file in ``data`` fills in all but the first three fields."""

    root: Path | None = None
    "Folder that holds the files; the embedded sets need none."
    download: bool = False
    "Fetch the files into that folder if they are not there."
    img_size: tuple[int, int] | None = None
    "Height and width to scale the images to; none keeps the set's own."
    _: KW_ONLY
    name: str
    "As in ``--data``."
    source: Source
    own: Facts
    "Facts at the set's own image size."
    num_images: dict[str, int]
    "Images that each official split must have."
    read: Reader
    "Reads a split; for embedded sets the folder is the current one and means nothing."
    fetch: Callable[[Path], None] | None = None
    "Fetches the files into a folder unless they are there; none where a person has to."
    _opened: dict[str, Images] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def official(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.num_images)

    @property
    def facts(self) -> Facts:
        """What is known about the set; needs no files."""
        return replace(self.own, img_size=self.img_size or self.own.img_size)

    def images(self, split: str) -> Images:
        """Images of one split, opened once.

        Args:
            split: One of ``official``.

        Returns:
            The images; those of one size are in memory.
        """
        known(split, self.official, f"splits of {self.name}")
        if split not in self._opened:
            images = self.read(self._folder(), split, self.facts.img_size)
            self._check(images, split)
            is_array = isinstance(images, ArrayImages)
            self._opened[split] = fitted(images, self.img_size, self.own.channels) if is_array else images
        return self._opened[split]

    def _folder(self) -> Path:
        """Where to read, with the files in it if they were to be fetched."""
        if not self.source.tree:
            return Path()
        if self.root is None:
            raise FileNotFoundError(
                f"{self.name} must lie in a folder on disk, got none; name it with --data-dir"
                + (", and add --download to fetch the images into it." if self.fetch else ".")
            )
        if self.download and self.fetch is None:
            raise ValueError(
                f"{self.name} has to be fetched by hand, got --download; ssat-probe data {self.name} says from where."
            )
        if self.download and self.fetch is not None:
            with _downloading(self.root, self.source.address):
                self.fetch(self.root)
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"{self.root} must be the folder of {self.name}, got no such folder; check --data-dir"
                + (", or add --download." if self.fetch else ".")
            )
        return self.root

    def _check(self, images: Images, split: str) -> None:
        """As many images as were published, and no class beyond the last."""
        where = f" in {self.root}" if self.root else ""
        if len(images) != self.num_images[split]:
            raise ValueError(
                f"{self.name} must have {self.num_images[split]} {split} images, got {len(images)}{where}; the files "
                f"are incomplete or of another version: get them again, ssat-probe data {self.name} says where."
            )
        lowest, highest = int(images.labels.min()), int(images.labels.max())
        if lowest < 0 or highest >= self.own.num_classes:
            raise ValueError(
                f"The labels of {self.name} must be from 0 to {self.own.num_classes - 1}, got {lowest} to {highest}"
                f"{where}; get the files again."
            )


def frozen_split(
    pixels: UInt8[Tensor, "image channel height width"], labels: np.ndarray, num_test: int
) -> dict[str, ArrayImages]:
    """Training and test images of a set that has no official split; the same in every run.

    Args:
        pixels: All images, 0 to 255.
        labels: Class of each.
        num_test: Images of the test set, with the classes in proportion.

    Returns:
        ``train`` and ``test``.
    """
    train, test = holdout(labels, num_test / len(pixels), SPLIT_SEED)
    return {name: ArrayImages(pixels[ids], labels[ids]) for name, ids in (("train", train), ("test", test))}


@contextmanager
def _downloading(root: Path, address: str) -> Iterator[None]:
    """A place to download to, with every failure turned into one sentence.

    Yields:
        Nothing.

    Raises:
        ValueError: If the address cannot be reached or the folder cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{address} must be reachable and {root} writable for --download, got {str(error)!r}; fetch the files "
            f"by hand and unpack them in {root}."
        ) from error
