"""SVHN, 99,289 house numbers cropped to single digits, 32x32 colour; Matlab files as torchvision lays them out."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import SVHN
from torchvision.datasets.utils import download_url

from ssat_probe.files import reading
from ssat_probe.images import ArrayImages, Facts, Source
from ssat_probe.published import Published

NUM_IMAGES = {"train": 73_257, "test": 26_032}

FACTS = Facts(
    classes=tuple("0123456789"),
    img_size=(32, 32),
    channels=3,
    mean=(0.4377, 0.4438, 0.4728),
    std=(0.1980, 0.2010, 0.1970),
    flip=False,
    splits="The official split: 73,257 images for training, 26,032 for testing; the extra images are not used.",
    licence="non-commercial use only",
    citation="Y. Netzer et al. (2011), Reading Digits in Natural Images with Unsupervised Feature Learning, NIPS "
    "workshop on deep learning, http://ufldl.stanford.edu/housenumbers/nips2011_housenumbers.pdf",
)


def _read(root: Path, split: str, img_size: tuple[int, int]) -> ArrayImages:
    from scipy.io import loadmat

    with reading(root / f"{split}_32x32.mat", f"the {split} images of SVHN in format 2 (cropped digits)") as path:
        stored = loadmat(path)
        pixels = np.ascontiguousarray(stored["X"].transpose(3, 2, 0, 1))  # stored: height width channel image
        labels = stored["y"].reshape(-1).astype(np.int64)
    labels[labels == 10] = 0  # Matlab counts from 1
    return ArrayImages(torch.from_numpy(pixels), labels)


def _fetch(root: Path) -> None:
    for split in NUM_IMAGES:
        address, name, checksum = SVHN.split_list[split]
        download_url(address, str(root), name, checksum)


Dataset = partial(
    Published,
    name="svhn",
    source=Source(
        tree="train_32x32.mat\ntest_32x32.mat",
        address="http://ufldl.stanford.edu/housenumbers/",
        how="--download fetches the two files (250 MB).",
    ),
    own=FACTS,
    num_images=NUM_IMAGES,
    read=_read,
    fetch=_fetch,
)
