"""Fashion-MNIST, 70,000 pieces of clothing, 28x28 grey; IDX files as torchvision or Debian lays them out."""

import gzip
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import FashionMNIST

from ssat_probe.files import reading
from ssat_probe.images import ArrayImages, Facts, Source
from ssat_probe.published import Published

FOLDERS = ("FashionMNIST/raw", ".")
"Of torchvision; of Debian and of the authors."

PREFIX = {"train": "train", "test": "t10k"}

NUM_IMAGES = {"train": 60_000, "test": 10_000}

FACTS = Facts(
    classes=("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    img_size=(28, 28),
    channels=1,
    mean=(0.286041,),
    std=(0.353024,),
    flip=True,
    splits="The official split: 60,000 images for training, 10,000 for testing.",
    licence="MIT",
    citation="H. Xiao, K. Rasul, R. Vollgraf (2017), Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine "
    "Learning Algorithms, https://arxiv.org/abs/1708.07747",
)


def _read(root: Path, split: str, img_size: tuple[int, int]) -> ArrayImages:
    images = _array(_found(root, f"{PREFIX[split]}-images-idx3-ubyte"), 3)
    labels = _array(_found(root, f"{PREFIX[split]}-labels-idx1-ubyte"), 1)
    return ArrayImages(torch.from_numpy(images[:, None]), labels)


def _found(root: Path, name: str) -> Path:
    """The file, packed or not, in any of the layouts."""
    for folder in FOLDERS:
        for ending in ("", ".gz"):
            if (path := root / folder / (name + ending)).is_file():
                return path
    raise FileNotFoundError(
        f"{root} must hold {name} or {name}.gz, there or in {FOLDERS[0]}, got neither; ssat-probe data fashion_mnist "
        "says where to get them."
    )


def _array(path: Path, num_axes: int) -> np.ndarray:
    """Bytes of an IDX file: two zeros, type 8 (bytes), number of axes, each axis as a big-endian integer, values."""
    with reading(path, f"an IDX file of bytes with {num_axes} axes"):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:4] != bytes((0, 0, 8, num_axes)):
            raise ValueError(f"it begins with {content[:4].hex(' ')}")
        start = 4 + 4 * num_axes
        sizes = np.frombuffer(content[4:start], dtype=">u4").astype(int)
        return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(sizes).copy()


def _fetch(root: Path) -> None:
    FashionMNIST(root, download=True)


Dataset = partial(
    Published,
    name="fashion_mnist",
    source=Source(
        tree="""
FashionMNIST/raw/       or the four files in --data-dir itself; packed (.gz) or not
  train-images-idx3-ubyte.gz
  train-labels-idx1-ubyte.gz
  t10k-images-idx3-ubyte.gz
  t10k-labels-idx1-ubyte.gz
""".strip(),
        address="https://github.com/zalandoresearch/fashion-mnist",
        how="--download fetches the files (30 MB). On Debian and Ubuntu: apt install dataset-fashion-mnist, then "
        "--data-dir /usr/share/datasets/fashion-mnist.",
    ),
    own=FACTS,
    num_images=NUM_IMAGES,
    read=_read,
    fetch=_fetch,
)
