"""What many tests share: tiny trained checkpoints, seeded generators, one thread, no figure left open."""

import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from ssat_probe.images import Facts
from ssat_probe.network import resolve
from ssat_probe.recipe import Recipe

# A busy machine is no failure.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

METHODS = ("scratch", "ssl_ft", "ssat")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Bit-exact comparisons, and as many workers as there are cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_open_figures() -> Iterator[None]:
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def generator() -> Callable[[str], torch.Generator]:
    """Generator seeded by a word, so that no two uses share their numbers by chance."""
    return lambda word: torch.Generator().manual_seed(zlib.crc32(word.encode()))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A really trained checkpoint of each method: vit_nano, 40 digits, one epoch. Read only."""
    from ssat_probe.training import train

    folder = tmp_path_factory.mktemp("checkpoints")
    recipes = {method: Recipe(method=method, subset=40, epochs=1, batch_size=8, warmup_epochs=0) for method in METHODS}
    return {method: train(recipe, folder, device="cpu").path for method, recipe in recipes.items()}


@pytest.fixture(scope="session")
def fine_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As ``checkpoints``, with patches of one pixel: a grid of 8 x 8. Read only."""
    from ssat_probe.training import train

    folder = tmp_path_factory.mktemp("fine")
    shared = {"subset": 20, "epochs": 1, "batch_size": 10, "warmup_epochs": 0, "patch_size": (1, 1)}
    return {method: train(Recipe(method=method, **shared), folder, device="cpu").path for method in METHODS}


@pytest.fixture
def checkpoints_of_probe(request: pytest.FixtureRequest) -> Callable[[str], dict[str, Path]]:
    """Checkpoints that a probe can measure, by its name."""
    return lambda name: request.getfixturevalue("fine_checkpoints" if name == "fourier" else "checkpoints")


@pytest.fixture(scope="session")
def make_facts() -> Callable[..., Facts]:
    """Facts of a data set that does not exist, of any size."""

    def made(img_size: tuple[int, int] = (8, 8), channels: int = 1, num_classes: int = 10) -> Facts:
        return Facts(
            classes=tuple(str(number) for number in range(num_classes)),
            img_size=img_size,
            channels=channels,
            mean=(0.5,) * channels,
            std=(0.25,) * channels,
            flip=False,
            splits="",
            licence="",
            citation="",
        )

    return made


@pytest.fixture(scope="session")
def make_recipe(make_facts: Callable[..., Facts]) -> Callable[..., tuple[Recipe, Facts]]:
    """Resolved recipe and its facts."""

    def made(
        img_size: tuple[int, int] = (8, 8), channels: int = 1, num_classes: int = 10, **fields: object
    ) -> tuple[Recipe, Facts]:
        facts = make_facts(img_size, channels, num_classes)
        return resolve(Recipe(**fields), facts), facts

    return made
