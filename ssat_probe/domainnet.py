"""DomainNet, drawings and photographs of 345 classes in several domains: its list files and folders."""

from functools import partial
from pathlib import Path

from ssat_probe.files import FileImages, listed, reading
from ssat_probe.images import Facts, Source
from ssat_probe.published import IMAGENET_MEAN, IMAGENET_STD, PHOTO_SIZE, Published

CLASSES = """
aircraft_carrier airplane alarm_clock ambulance angel animal_migration ant anvil apple arm asparagus axe backpack
banana bandage barn baseball baseball_bat basket basketball bat bathtub beach bear beard bed bee belt bench bicycle
binoculars bird birthday_cake blackberry blueberry book boomerang bottlecap bowtie bracelet brain bread bridge
broccoli broom bucket bulldozer bus bush butterfly cactus cake calculator calendar camel camera camouflage campfire
candle cannon canoe car carrot castle cat ceiling_fan cello cell_phone chair chandelier church circle clarinet clock
cloud coffee_cup compass computer cookie cooler couch cow crab crayon crocodile crown cruise_ship cup diamond
dishwasher diving_board dog dolphin donut door dragon dresser drill drums duck dumbbell ear elbow elephant envelope
eraser eye eyeglasses face fan feather fence finger fire_hydrant fireplace firetruck fish flamingo flashlight
flip_flops floor_lamp flower flying_saucer foot fork frog frying_pan garden garden_hose giraffe goatee golf_club
grapes grass guitar hamburger hammer hand harp hat headphones hedgehog helicopter helmet hexagon hockey_puck
hockey_stick horse hospital hot_air_balloon hot_dog hot_tub hourglass house house_plant hurricane ice_cream jacket
jail kangaroo key keyboard knee knife ladder lantern laptop leaf leg light_bulb lighter lighthouse lightning line
lion lipstick lobster lollipop mailbox map marker matches megaphone mermaid microphone microwave monkey moon
mosquito motorbike mountain mouse moustache mouth mug mushroom nail necklace nose ocean octagon octopus onion oven
owl paintbrush paint_can palm_tree panda pants paper_clip parachute parrot passport peanut pear peas pencil penguin
piano pickup_truck picture_frame pig pillow pineapple pizza pliers police_car pond pool popsicle postcard potato
power_outlet purse rabbit raccoon radio rain rainbow rake remote_control rhinoceros rifle river roller_coaster
rollerskates sailboat sandwich saw saxophone school_bus scissors scorpion screwdriver sea_turtle see_saw shark sheep
shoe shorts shovel sink skateboard skull skyscraper sleeping_bag smiley_face snail snake snorkel snowflake snowman
soccer_ball sock speedboat spider spoon spreadsheet square squiggle squirrel stairs star steak stereo stethoscope
stitches stop_sign stove strawberry streetlight string_bean submarine suitcase sun swan sweater swing_set sword
syringe table teapot teddy-bear telephone television tennis_racquet tent The_Eiffel_Tower The_Great_Wall_of_China
The_Mona_Lisa tiger toaster toe toilet tooth toothbrush toothpaste tornado tractor traffic_light train tree triangle
trombone truck trumpet t-shirt umbrella underwear van vase violin washing_machine watermelon waterslide whale wheel
windmill wine_bottle wine_glass wristwatch yoga zebra zigzag
"""
"In the order of the labels in the lists, which is not the order of sorted folders."


def domain(name: str, num_train: int, num_test: int, archive: str) -> partial[Published]:
    """Data set of one domain.

    Args:
        name: Of the domain, its folder and its lists.
        num_train: Images of the training list.
        num_test: Images of the test list.
        archive: Address of the images, below that of the challenge.

    Returns:
        To be called with folder, download and image size.
    """
    return partial(
        Published,
        name=name,
        source=Source(
            tree=f"""
{name}_train.txt      lines such as {name}/aircraft_carrier/{name}_001_000001.jpg 0
{name}_test.txt
{name}/
  aircraft_carrier/
    {name}_001_000001.jpg
    ...
  ...                   345 folders
""".strip(),
            address="https://ai.bu.edu/M3SDA/",
            how=f"Fetch {archive} and the two lists from there by hand, and unpack it beside them.",
        ),
        own=Facts(
            classes=tuple(CLASSES.split()),
            img_size=PHOTO_SIZE,
            channels=3,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            flip=True,
            splits=f"The official lists: {num_train:,} images for training, {num_test:,} for testing.",
            licence="that of each image's maker; the authors offer them for non-commercial research",
            citation="X. Peng et al. (2019), Moment Matching for Multi-Source Domain Adaptation, ICCV, "
            "https://arxiv.org/abs/1812.01754",
        ),
        num_images={"train": num_train, "test": num_test},
        read=partial(_read, name),
    )


def _read(name: str, root: Path, split: str, img_size: tuple[int, int]) -> FileImages:
    """Classes come from the lists: capitals sort differently in folders."""
    with reading(root / f"{name}_{split}.txt", f"the {split} list of {name}, a path and a label per line") as path:
        lines = (line.rpartition(" ") for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        rows = [(file, int(label)) for file, _, label in lines]
    return listed(root, rows, img_size, channels=3)
