"""Labelled images as every data set hands them out, and how they are split, subset and normalised."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, no_type_check, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from ssat_probe.registry import known
from ssat_probe.sampling import holdout, stratified_subset

IN_MEMORY_BYTES = 256 * 2**20
"Sets that take no more than this once decoded are held in memory."

VALIDATION_SEED = 0
"The images carved from train for validation are the same in every run, whatever its seed."


@no_type_check  # at run time, in tests: lists are welcome too
@dataclass(frozen=True)
class Facts:
    """What a data set states about itself; plain data, so that a checkpoint can carry it.

    ``Facts(**asdict(facts))`` gives the same facts, also after a trip through YAML or JSON, where tuples become lists.
    """

    classes: tuple[str, ...]
    img_size: tuple[int, int]
    "Height and width in pixels."
    channels: int
    mean: tuple[float, ...]
    "Per channel over the training images, pixels in [0, 1]."
    std: tuple[float, ...]
    "Per channel over all pixels of the training images, pixels in [0, 1]."
    flip: bool
    "Whether a mirrored image still belongs to its class."
    splits: str
    licence: str
    citation: str

    def __post_init__(self) -> None:
        """Turn lists into tuples."""
        for name in ("classes", "img_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


@dataclass(frozen=True)
class Source:
    """Where the files of a data set come from, and where they must lie."""

    tree: str = ""
    "Files and folders below ``--data-dir``, one a line, indented as they lie; empty if nothing is needed on disk."
    address: str = ""
    "Page or file on the web; empty where there is none."
    how: str = ""
    "How to get the files, in a sentence or two."


@runtime_checkable
class Images(Protocol):
    """Labelled images that are read by their position."""

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, int64."""

    @property
    def in_memory(self) -> bool:
        """Whether reading is a mere look-up, so that worker processes would only cost time."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, ids: Sequence[int] | np.ndarray) -> UInt8[Tensor, "batch channel height width"]:
        """Pixels of the images at these positions."""

    def fingerprint(self) -> str:
        """Hash that changes when the images do."""


@runtime_checkable
class Dataset(Protocol):
    """A data set: its facts, its source and its official splits."""

    @property
    def facts(self) -> Facts:
        """What the data set states about itself."""

    @property
    def source(self) -> Source:
        """Where its files come from, and where they must lie; needs no files."""

    @property
    def official(self) -> tuple[str, ...]:
        """Names of the splits that exist: ``train``, ``test`` and perhaps ``val``."""

    def images(self, split: str) -> Images:
        """Images of one official split."""


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images held in memory.

    Args:
        pixels: 0 to 255.
        labels: Class of each image.
    """

    pixels: UInt8[Tensor, "image channel height width"]
    labels: np.ndarray

    def __post_init__(self) -> None:
        """Check that every image has its label.

        Raises:
            ValueError: If the numbers differ.
        """
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=np.int64))
        if len(self.labels) != len(self.pixels):
            raise ValueError(
                f"Every image needs one label, got {len(self.pixels)} images and {len(self.labels)} labels; "
                "check how the set was put together."
            )

    @property
    def in_memory(self) -> bool:
        """True."""
        return True

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def read(self, ids: Sequence[int] | np.ndarray) -> UInt8[Tensor, "batch channel height width"]:
        """Pixels of the images at these positions; a copy."""
        return self.pixels[torch.as_tensor(np.asarray(ids, dtype=np.int64))]

    def fingerprint(self) -> str:
        """SHA-256 over shape, labels and pixels."""
        digest = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        digest.update(np.ascontiguousarray(self.labels).data)
        digest.update(np.ascontiguousarray(self.pixels.numpy()).data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Selection:
    """Some of the images of a set, in the order given; nothing is copied.

    Args:
        images: The set.
        ids: Positions in it.
    """

    images: Images
    ids: np.ndarray

    def __post_init__(self) -> None:
        """See through a selection of a selection, so that equal choices have equal fingerprints."""
        ids = np.asarray(self.ids, dtype=np.int64)
        if isinstance(self.images, Selection):
            ids = self.images.ids[ids]
            object.__setattr__(self, "images", self.images.images)
        object.__setattr__(self, "ids", ids)

    @property
    def labels(self) -> np.ndarray:
        """Class of each image."""
        return self.images.labels[self.ids]

    @property
    def in_memory(self) -> bool:
        """As the set."""
        return self.images.in_memory

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids)

    def read(self, ids: Sequence[int] | np.ndarray) -> UInt8[Tensor, "batch channel height width"]:
        """Pixels of the images at these positions of the selection."""
        return self.images.read(self.ids[np.asarray(ids, dtype=np.int64)])

    def fingerprint(self) -> str:
        """SHA-256 over the fingerprint of the set and the positions."""
        return hashlib.sha256(self.images.fingerprint().encode() + self.ids.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Fitted:
    """Images of a set, scaled and cropped whenever they are read; see ``fit``.

    Args:
        images: The set.
        img_size: Height and width.
    """

    images: Images
    img_size: tuple[int, int]

    @property
    def labels(self) -> np.ndarray:
        """Class of each image."""
        return self.images.labels

    @property
    def in_memory(self) -> bool:
        """False: scaling is work that worker processes can share."""
        return False

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def read(self, ids: Sequence[int] | np.ndarray) -> UInt8[Tensor, "batch channel height width"]:
        """Pixels of the images at these positions, scaled and cropped."""
        return fit(self.images.read(ids), self.img_size)

    def fingerprint(self) -> str:
        """SHA-256 over the fingerprint of the set and the image size."""
        return hashlib.sha256(f"{self.images.fingerprint()} {tuple(self.img_size)}".encode()).hexdigest()


def in_memory(images: Images, img_size: tuple[int, int], channels: int) -> Images:
    """The same images, decoded once into memory if they take at most ``IN_MEMORY_BYTES`` there.

    Args:
        images: Any set.
        img_size: Height and width of its images.
        channels: Channels of its images.

    Returns:
        ``ArrayImages``, or ``images`` itself where it is too large or in memory already.
    """
    if images.in_memory or len(images) * channels * img_size[0] * img_size[1] > IN_MEMORY_BYTES:
        return images
    return ArrayImages(images.read(range(len(images))), images.labels)


def fitted(images: Images, img_size: tuple[int, int] | None, channels: int) -> Images:
    """The images of a set at another size, made once where they fit into memory.

    Args:
        images: The set.
        img_size: Height and width; None keeps the images as they are.
        channels: Channels of its images.

    Returns:
        Images of that size.
    """
    return images if img_size is None else in_memory(Fitted(images, img_size), img_size, channels)


def fit(
    pixels: UInt8[Tensor, "batch channel height width"], img_size: tuple[int, int]
) -> UInt8[Tensor, "batch channel new_height new_width"]:
    """Images scaled (bicubic, antialiased) until they cover the size, then cropped around their centre.

    Args:
        pixels: 0 to 255.
        img_size: Height and width.

    Returns:
        Images of that size; ``pixels`` itself if it has it.
    """
    height, width = pixels.shape[-2:]
    if (height, width) == tuple(img_size):
        return pixels
    scale = max(img_size[0] / height, img_size[1] / width)
    size = [max(new, round(old * scale)) for new, old in zip(img_size, (height, width), strict=True)]
    scaled = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True)
    top, left = (size[0] - img_size[0]) // 2, (size[1] - img_size[1]) // 2
    cropped = scaled[..., top : top + img_size[0], left : left + img_size[1]]
    return cropped.round().clamp(0, 255).to(torch.uint8)


def split(
    dataset: Dataset,
    name: str,
    subset: int | float | None = None,
    subset_seed: int = 0,
    val_fraction: float = 0.1,
) -> Images:
    """Images for one purpose: ``train``, ``val`` or ``test``.

    Validation is the official split of that name, else it is carved from train, always the same images and never from
    test. Train is the official one without them; only then the subset is drawn, so that "500 images" means 500.

    Args:
        dataset: The data set.
        name: ``train``, ``val`` or ``test``.
        subset: Train on so many images only: a count, or a share in (0, 1); None means all.
        subset_seed: Which images those are.
        val_fraction: Share of train kept for validation where there is no official split; 0 keeps none.

    Returns:
        The images, decoded into memory if they are few enough.
    """
    known(name, ("train", "val", "test"), "splits")
    chosen = _split(dataset, name, subset, subset_seed, val_fraction)
    return in_memory(chosen, dataset.facts.img_size, dataset.facts.channels)


def _split(dataset: Dataset, name: str, subset: int | float | None, subset_seed: int, val_fraction: float) -> Images:
    if name == "test" or (name == "val" and "val" in dataset.official):
        return dataset.images(name)
    train = dataset.images("train")
    kept, held_out = np.arange(len(train)), np.arange(0)
    if "val" not in dataset.official and val_fraction != 0:
        kept, held_out = holdout(train.labels, val_fraction, VALIDATION_SEED)
    if name == "val":
        if not len(held_out):
            raise ValueError(
                f"Validation needs images of its own, got a share of {val_fraction} of the {len(train)} training "
                "images; give a larger share, or use the test split."
            )
        return Selection(train, held_out)
    return Selection(train, kept[stratified_subset(train.labels[kept], subset, subset_seed)])


def normalise(
    pixels: UInt8[Tensor, "batch channel height width"], facts: Facts, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "batch channel height width"]:
    """Images with mean 0 and standard deviation 1 per channel over the training images.

    Args:
        pixels: 0 to 255.
        facts: Give mean and standard deviation.
        dtype: Of the result.

    Returns:
        Dimensionless, on the device of ``pixels``.
    """
    mean, std = _per_channel(facts, pixels.device, dtype)
    return (pixels.to(dtype) / 255 - mean) / std


def denormalise(
    images: Float[Tensor, "batch channel height width"], facts: Facts
) -> Float[Tensor, "batch channel height width"]:
    """Pixels from normalised images; undoes ``normalise``.

    Args:
        images: Normalised.
        facts: Give mean and standard deviation.

    Returns:
        In [0, 1] for true images; not clipped, since a reconstruction may lie outside.
    """
    mean, std = _per_channel(facts, images.device, images.dtype)
    return images * std + mean


def _per_channel(facts: Facts, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1) for values in (facts.mean, facts.std))
    return mean, std
