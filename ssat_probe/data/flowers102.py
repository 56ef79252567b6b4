"""Oxford Flowers 102, 8,189 photographs of many sizes; jpg folder and Matlab lists as torchvision lays them out."""

from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets import Flowers102

from ssat_probe.files import FileImages, listed, reading
from ssat_probe.images import Facts, Source
from ssat_probe.published import IMAGENET_MEAN, IMAGENET_STD, PHOTO_SIZE, Published

CLASSES = """
pink primrose; hard-leaved pocket orchid; canterbury bells; sweet pea; english marigold; tiger lily; moon orchid; bird
of paradise; monkshood; globe thistle; snapdragon; colt's foot; king protea; spear thistle; yellow iris; globe-flower;
purple coneflower; peruvian lily; balloon flower; giant white arum lily; fire lily; pincushion flower; fritillary; red
ginger; grape hyacinth; corn poppy; prince of wales feathers; stemless gentian; artichoke; sweet william; carnation;
garden phlox; love in the mist; mexican aster; alpine sea holly; ruby-lipped cattleya; cape flower; great masterwort;
siam tulip; lenten rose; barbeton daisy; daffodil; sword lily; poinsettia; bolero deep blue; wallflower; marigold;
buttercup; oxeye daisy; common dandelion; petunia; wild pansy; primula; sunflower; pelargonium; bishop of llandaff;
gaura; geranium; orange dahlia; pink-yellow dahlia; cautleya spicata; japanese anemone; black-eyed susan; silverbush;
californian poppy; osteospermum; spring crocus; bearded iris; windflower; tree poppy; gazania; azalea; water lily;
rose; thorn apple; morning glory; passion flower; lotus; toad lily; anthurium; frangipani; clematis; hibiscus;
columbine; desert-rose; tree mallow; magnolia; cyclamen; watercress; canna lily; hippeastrum; bee balm; ball moss;
foxglove; bougainvillea; camellia; mallow; mexican petunia; bromelia; blanket flower; trumpet creeper; blackberry lily
"""
"In the order of the labels, from 1 in the lists and from 0 here."

LISTS = {"train": ("trnid", "valid"), "test": ("tstid",)}

NUM_IMAGES = {"train": 2040, "test": 6149}

FACTS = Facts(
    classes=tuple(name.strip() for name in CLASSES.replace("\n", " ").split(";")),
    img_size=PHOTO_SIZE,
    channels=3,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    flip=True,
    splits="The official lists: train and validation together, 2,040 images (20 per class), for training as papers on "
    "small data do, 6,149 for testing. (A copy on Kaggle has 6,552 for training; results on it do not compare.)",
    licence="none stated by the authors",
    citation="M.-E. Nilsback, A. Zisserman (2008), Automated Flower Classification over a Large Number of Classes, "
    "ICVGIP, https://doi.org/10.1109/ICVGIP.2008.47",
)


def _read(root: Path, split: str, img_size: tuple[int, int]) -> FileImages:
    from scipy.io import loadmat

    folder = root / "flowers-102"
    with reading(folder / "setid.mat", "the lists of the official split of Flowers 102") as path:
        stored = loadmat(path)
        numbers = np.concatenate([stored[name].reshape(-1) for name in LISTS[split]])
    with reading(folder / "imagelabels.mat", "the labels of Flowers 102") as path:
        labels = loadmat(path)["labels"].reshape(-1)[numbers - 1].astype(np.int64) - 1
    rows = zip((f"image_{number:05d}.jpg" for number in numbers), labels, strict=True)
    return listed(folder / "jpg", rows, img_size, channels=3)


def _fetch(root: Path) -> None:
    Flowers102(root, download=True)


Dataset = partial(
    Published,
    name="flowers102",
    source=Source(
        tree="""
flowers-102/
  imagelabels.mat
  setid.mat
  jpg/
    image_00001.jpg ... image_08189.jpg
""".strip(),
        address="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        how="--download fetches and unpacks the files (350 MB).",
    ),
    own=FACTS,
    num_images=NUM_IMAGES,
    read=_read,
    fetch=_fetch,
)
