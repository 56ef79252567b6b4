"""PneumoniaMNIST, 5,856 chest X-rays of children, 28x28 grey, with or without pneumonia; MedMNIST's npz file."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets.utils import download_url

from ssat_probe.files import reading
from ssat_probe.images import ArrayImages, Facts, Source
from ssat_probe.published import Published

FILE = "pneumoniamnist.npz"

ADDRESS, CHECKSUM = "https://zenodo.org/records/10519652/files/pneumoniamnist.npz", "28209eda62fecd6e6a2d98b1501bb15f"
"Of MedMNIST v3; md5."

NUM_IMAGES = {"train": 4708, "val": 524, "test": 624}

FACTS = Facts(
    classes=("normal", "pneumonia"),
    img_size=(28, 28),
    channels=1,
    mean=(0.571922,),
    std=(0.168351,),
    flip=False,  # the heart lies on one side
    splits="The official split of MedMNIST: 4,708 images for training, 524 for validation, 624 for testing.",
    licence="CC BY 4.0",
    citation="J. Yang et al. (2023), MedMNIST v2, Scientific Data 10:41, https://doi.org/10.1038/s41597-022-01721-8; "
    "from D. S. Kermany et al. (2018), Cell 172(5), https://doi.org/10.1016/j.cell.2018.02.010",
)


def _read(root: Path, split: str, img_size: tuple[int, int]) -> ArrayImages:
    with reading(root / FILE, "the npz file of PneumoniaMNIST at 28x28") as path, path.open("rb") as file:
        stored = np.load(file)  # never runs code: pickles are refused by default
        images, labels = stored[f"{split}_images"], stored[f"{split}_labels"]
        return ArrayImages(torch.from_numpy(images.reshape(-1, 1, 28, 28)), labels.reshape(-1))


def _fetch(root: Path) -> None:
    download_url(ADDRESS, str(root), FILE, CHECKSUM)


Dataset = partial(
    Published,
    name="pneumoniamnist",
    source=Source(
        tree="pneumoniamnist.npz      train_images, train_labels, val_images, ... at 28x28",
        address=ADDRESS,
        how="--download fetches the file (4 MB).",
    ),
    own=FACTS,
    num_images=NUM_IMAGES,
    read=_read,
    fetch=_fetch,
)
