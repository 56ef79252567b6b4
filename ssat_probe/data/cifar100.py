"""CIFAR-100, 60,000 colour photographs of 32x32 in 100 classes; on disk as torchvision lays it out, or downloaded."""

from functools import partial

from torchvision.datasets import CIFAR100

from ssat_probe.data.cifar10 import fetch_pickles, read_pickles
from ssat_probe.images import Facts, Source
from ssat_probe.published import Published

CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""

NUM_IMAGES = {"train": 50_000, "test": 10_000}

FACTS = Facts(
    classes=tuple(CLASSES.split()),
    img_size=(32, 32),
    channels=3,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    flip=True,
    splits="The official split: 50,000 images for training, 10,000 for testing; the 100 fine classes.",
    licence="none stated by the authors",
    citation="A. Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images, "
    "https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf",
)

Dataset = partial(
    Published,
    name="cifar100",
    source=Source(
        tree="""
cifar-100-python/
  meta
  train
  test
""".strip(),
        address=CIFAR100.url,
        how="--download fetches and unpacks the archive (170 MB).",
    ),
    own=FACTS,
    num_images=NUM_IMAGES,
    read=partial(read_pickles, CIFAR100),
    fetch=partial(fetch_pickles, CIFAR100),
)
