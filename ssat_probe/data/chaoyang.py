"""Chaoyang, 6,160 patches of colon tissue, 512x512 colour, in 4 classes with noisy training labels; JSON lists."""

import json
from functools import partial
from pathlib import Path

from ssat_probe.files import FileImages, listed, reading
from ssat_probe.images import Facts, Source
from ssat_probe.published import IMAGENET_MEAN, IMAGENET_STD, PHOTO_SIZE, Published

NUM_IMAGES = {"train": 4021, "test": 2139}

FACTS = Facts(
    classes=("normal", "serrated", "adenocarcinoma", "adenoma"),
    img_size=PHOTO_SIZE,
    channels=3,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    flip=True,
    splits="The official lists: 4,021 images, whose labels are partly wrong, for training; 2,139, on whose labels all "
    "pathologists agree, for testing.",
    licence="on request, for research; the terms are those of the request form",
    citation="C. Zhu, W. Chen, T. Peng, Y. Wang, M. Jin (2022), Hard Sample Aware Noise Robust Learning for "
    "Histopathology Image Classification, IEEE TMI 41(4), https://doi.org/10.1109/TMI.2021.3125459",
)


def _read(root: Path, split: str, img_size: tuple[int, int]) -> FileImages:
    with reading(root / f"{split}.json", f"the {split} list of Chaoyang: objects with name and label") as path:
        rows = [(row["name"], int(row["label"])) for row in json.loads(path.read_text(encoding="utf-8"))]
    return listed(root, rows, img_size, channels=3)


Dataset = partial(
    Published,
    name="chaoyang",
    source=Source(
        tree="""
train.json      [{"name": "train/....JPG", "label": 0, ...}, ...]
test.json
train/
  ....JPG
test/
  ....JPG
""".strip(),
        address="https://bupt-ai-cz.github.io/HSA-NRL/",
        how="Ask the authors for the images with the form on that page, and unpack them in one folder.",
    ),
    own=FACTS,
    num_images=NUM_IMAGES,
    read=_read,
)
