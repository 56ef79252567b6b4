"""Handwritten digits, 1,797 real 8x8 grey images that scikit-learn carries: nothing to download."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from ssat_probe.images import ArrayImages, Facts, Source
from ssat_probe.published import Published, frozen_split

NUM_IMAGES = {"train": 1300, "test": 497}

FACTS = Facts(
    classes=tuple("0123456789"),
    img_size=(8, 8),
    channels=1,
    mean=(0.304735,),  # of the training images; a test computes both again
    std=(0.375784,),
    flip=False,
    splits="There is no official split: 497 of the 1,797 images, drawn once with every class in proportion, "
    "are the test set, the other 1,300 are for training.",
    licence="CC BY 4.0",
    citation="E. Alpaydin, C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning "
    "Repository, https://doi.org/10.24432/C50P49",
)


def _read(root: Path, split: str, img_size: tuple[int, int]) -> ArrayImages:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Every pixel counts the ink in a 4x4 square: 0 to 16.
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return frozen_split(torch.from_numpy(pixels[:, None]), digits.target, NUM_IMAGES["test"])[split]


Dataset = partial(
    Published,
    name="digits",
    source=Source(how="The images come with scikit-learn."),
    own=FACTS,
    num_images=NUM_IMAGES,
    read=_read,
)
