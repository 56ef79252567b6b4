"""CIFAR-10, 60,000 colour photographs of 32x32 in 10 classes; on disk as torchvision lays it out, or downloaded."""

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.exceptions import VisibleDeprecationWarning
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from ssat_probe.images import ArrayImages, Facts, Images, fitted
from ssat_probe.registry import known

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

NUM_IMAGES = {"train": 50_000, "test": 10_000}

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"Over all pixels of the training images; the std often seen, .2023 .1994 .2010, is the mean of each image's own."


@dataclass(frozen=True)
class Dataset:
    """CIFAR-10."""

    root: Path | None = None
    "Folder that holds cifar-10-batches-py."
    download: bool = False
    "Fetch the images (170 MB) into that folder if they are not there."
    img_size: tuple[int, int] | None = None
    "Height and width to scale the images to; none keeps 32x32."

    @property
    def official(self) -> tuple[str, ...]:
        """Names of the splits."""
        return ("train", "test")

    @property
    def facts(self) -> Facts:
        """What is known about CIFAR-10."""
        return Facts(
            classes=CLASSES,
            img_size=self.img_size or (32, 32),
            channels=3,
            mean=MEAN,
            std=STD,
            flip=True,
            splits="The official split: 50,000 images for training, 10,000 for testing.",
            licence="none stated by the authors",
            citation="A. Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images, "
            "https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf",
        )

    def images(self, split: str) -> Images:
        """Images of one split.

        Args:
            split: ``train`` or ``test``.

        Returns:
            The images, in memory at their own size.
        """
        known(split, self.official, "splits of cifar10")
        return fitted(self._train if split == "train" else self._test, self.img_size, channels=3)

    @cached_property
    def _train(self) -> Images:
        return _read(self.root, "train", self.download)

    @cached_property
    def _test(self) -> Images:
        return _read(self.root, "test", self.download)


def _read(root: Path | None, split: str, download: bool) -> Images:
    if root is None:
        raise FileNotFoundError(
            "cifar10 must lie in a folder on disk, got none; name it with --data-dir, and add --download to fetch the "
            "images (170 MB) into it."
        )
    if download:
        _download(root)
    _check_files(root / CIFAR10.base_folder)
    with warnings.catch_warnings():  # numpy 2.4.0 to 2.4.4 of files this old: https://github.com/numpy/numpy/pull/29301
        warnings.simplefilter("ignore", VisibleDeprecationWarning)
        stored = CIFAR10(root, train=split == "train")
    if len(stored.data) != NUM_IMAGES[split]:
        raise ValueError(
            f"cifar10 must have {NUM_IMAGES[split]} {split} images, got {len(stored.data)} in {root}; "
            "remove that folder and run again with --download."
        )
    return ArrayImages(torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous(), np.array(stored.targets))


def _check_files(folder: Path) -> None:
    """Every file is there with its checksum, before any of these pickles is opened."""
    for name, checksum in [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} must hold data_batch_1 to data_batch_5, test_batch and batches.meta of CIFAR-10 for Python, "
                f"got no {name}; add --download, or unpack {CIFAR10.url} there by hand."
            )
        if not check_integrity(folder / name, checksum):
            raise ValueError(
                f"{folder / name} must have the md5 checksum {checksum}, got another; remove it and run again with "
                "--download."
            )


def _download(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        CIFAR10(root, download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{CIFAR10.url} must be reachable and {root} writable for --download, got {str(error)!r}; fetch the file "
            f"by hand and unpack it in {root}."
        ) from error
