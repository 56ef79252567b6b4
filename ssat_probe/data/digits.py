"""Handwritten digits, 1,797 real 8x8 grey images that scikit-learn carries: nothing to download."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ssat_probe.images import ArrayImages, Facts, Images, fitted
from ssat_probe.registry import known
from ssat_probe.sampling import holdout

NUM_TEST = 497
"Held out as test set; leaves 1,300 for training."

SPLIT_SEED = 0

MEAN, STD = 0.304735, 0.375784
"Of the training images; a test computes them again."


@dataclass(frozen=True)
class Dataset:
    """Handwritten digits of scikit-learn."""

    root: Path | None = None
    "Unused: the images come with scikit-learn."
    download: bool = False
    "Unused: the images come with scikit-learn."
    img_size: tuple[int, int] | None = None
    "Height and width to scale the images to; none keeps 8x8."

    @property
    def official(self) -> tuple[str, ...]:
        """Names of the splits."""
        return ("train", "test")

    @property
    def facts(self) -> Facts:
        """What is known about the digits."""
        return Facts(
            classes=tuple("0123456789"),
            img_size=self.img_size or (8, 8),
            channels=1,
            mean=(MEAN,),
            std=(STD,),
            flip=False,
            splits="There is no official split: 497 of the 1,797 images, drawn once with every class in proportion, "
            "are the test set, the other 1,300 are for training.",
            licence="CC BY 4.0",
            citation="E. Alpaydin, C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning "
            "Repository, https://doi.org/10.24432/C50P49",
        )

    def images(self, split: str) -> Images:
        """Images of one split.

        Args:
            split: ``train`` or ``test``.

        Returns:
            The images, in memory.
        """
        known(split, self.official, "splits of digits")
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[str, Images]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Every pixel counts the ink in a 4x4 square: 0 to 16.
        pixels = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None])
        train, test = holdout(digits.target, NUM_TEST / len(pixels), SPLIT_SEED)
        return {
            name: fitted(ArrayImages(pixels[ids], digits.target[ids]), self.img_size, channels=1)
            for name, ids in (("train", train), ("test", test))
        }
