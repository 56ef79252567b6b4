"""ImageNet-1K, 1,331,167 photographs of many sizes in 1,000 classes; folders train and val, in them one per class."""

from functools import partial
from pathlib import Path

from timm.data import ImageNetInfo

from ssat_probe.files import FileImages, by_class, subfolders
from ssat_probe.images import Facts, Source
from ssat_probe.published import IMAGENET_MEAN, IMAGENET_STD, PHOTO_SIZE, Published

FOLDERS = {"train": "train", "test": "val"}

NUM_IMAGES = {"train": 1_281_167, "test": 50_000}

FACTS = Facts(
    classes=tuple(ImageNetInfo("imagenet-1k").label_names()),  # WordNet's numbers, sorted: n01440764, ...
    img_size=PHOTO_SIZE,
    channels=3,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    flip=True,
    splits="The official training images, 1,281,167, are for training, the 50,000 official validation images for "
    "testing, since the labels of the official test images are not public.",
    licence="non-commercial research and education, under the terms of access of image-net.org",
    citation="O. Russakovsky et al. (2015), ImageNet Large Scale Visual Recognition Challenge, IJCV 115(3), "
    "https://doi.org/10.1007/s11263-015-0816-y",
)


def _read(root: Path, split: str, img_size: tuple[int, int]) -> FileImages:
    folder = root / FOLDERS[split]
    if not folder.is_dir():
        found = [path.name for path in subfolders(root)]
        here = (", ".join(found[:5]) or "no folders") + (", ..." if len(found) > 5 else "")
        raise FileNotFoundError(
            f"{root} must hold the folders train and val of imagenet, got {here}; unpack or rename them so."
        )
    missing = sorted(set(FACTS.classes) - {path.name for path in subfolders(folder)})
    if missing:
        raise FileNotFoundError(
            f"{folder} must hold a folder for each of the 1000 classes, got {len(missing)} missing, the first "
            f"{missing[0]}; unpack each class into a folder of its own, and sort the images of val into them, too."
        )
    paths, labels = by_class(folder, FACTS.classes)
    return FileImages(paths, labels, img_size, 3, root)


Dataset = partial(
    Published,
    name="imagenet",
    source=Source(
        tree="""
train/
  n01440764/
    n01440764_10026.JPEG
    ...
  ...           1,000 folders
val/
  n01440764/
    ILSVRC2012_val_00000293.JPEG
    ...
  ...           1,000 folders
""".strip(),
        address="https://image-net.org/challenges/LSVRC/2012/2012-downloads.php",
        how="Register there, fetch the training images (138 GB) and the validation images (6 GB), and unpack each "
        "class into its folder; the images of val have to be sorted into such folders with the list in the "
        "development kit.",
    ),
    own=FACTS,
    num_images=NUM_IMAGES,
    read=_read,
)
