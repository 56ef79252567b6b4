"""What many tests share: tiny trained checkpoints, seeded generators, one thread, no figure left open."""

import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor, nn

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


@pytest.fixture(scope="session")
def shallow_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As ``checkpoints``, of two blocks, for what takes many products with the Hessian. Read only."""
    from ssat_probe.training import train

    folder = tmp_path_factory.mktemp("shallow")
    shared = {"model": "vit_pico", "subset": 40, "epochs": 1, "batch_size": 8, "warmup_epochs": 0}
    return {method: train(Recipe(method=method, **shared), folder, device="cpu").path for method in METHODS}


@pytest.fixture
def checkpoints_of_probe(request: pytest.FixtureRequest) -> Callable[[str], dict[str, Path]]:
    """Checkpoints that a probe can measure, by its name."""
    fixtures = {"fourier": "fine_checkpoints"}
    fixtures |= dict.fromkeys(("hessian", "terms", "blocks", "landscape"), "shallow_checkpoints")
    return lambda name: request.getfixturevalue(fixtures.get(name, "checkpoints"))


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


def _families() -> dict[str, Callable[[], nn.Module]]:
    """Tiny models of every family whose attention is captured."""
    from timm.models.cait import Cait
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
    from timm.models.pvt_v2 import PyramidVisionTransformerV2
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2
    from timm.models.twins import Twins
    from timm.models.vision_transformer import VisionTransformer
    from torchvision.models import VisionTransformer as Torchvision

    from ssat_probe.models.cvt import Model as OurCvT
    from ssat_probe.models.swin import Model as OurSwin

    plain: dict[str, object] = {"img_size": (32, 48), "patch_size": 8, "in_chans": 3, "num_classes": 3}
    vit = plain | {"embed_dim": 8, "depth": 3, "num_heads": 2}
    stages = plain | {"patch_size": 4, "embed_dim": 6, "depths": (2, 2), "num_heads": (2, 3)}
    pvt = {"num_classes": 3, "depths": (1, 2), "embed_dims": (8, 12), "num_heads": (1, 2), "mlp_ratios": (2, 2)}

    def mvit(**options: object) -> nn.Module:
        has_class = bool(options["use_cls_token"])
        config = MultiScaleVitCfg(
            depths=(1, 2), embed_dim=(8, 16), num_heads=(1, 2), stride_q=((1, 1), (2, 2)), **options
        )
        pool = "token" if has_class else "avg"
        return MultiScaleVit(config, img_size=(32, 32), in_chans=3, num_classes=3, global_pool=pool)

    return {
        "vit": lambda: VisionTransformer(**vit),
        "deit distilled": lambda: VisionTransformerDistilled(**vit),
        "registers": lambda: VisionTransformer(**vit, reg_tokens=4),
        "gap": lambda: VisionTransformer(**vit, class_token=False, global_pool="avg"),
        "swin": lambda: SwinTransformer(**stages, window_size=2),
        "swin padded": lambda: SwinTransformer(**stages, window_size=(3, 5)),
        "our swin": lambda: OurSwin(
            img_size=(32, 48),
            patch_size=(4, 4),
            channels=3,
            num_classes=3,
            dim=6,
            depths=(2, 2),
            heads=(2, 3),
            window=3,
        ),
        "our cvt": lambda: OurCvT(
            img_size=(32, 48),
            patch_size=(2, 2),
            channels=3,
            num_classes=3,
            dims=(5, 6, 9),
            depths=(1, 1, 2),
            heads=(1, 2, 3),
            mlp_ratio=2,
        ),
        "swinv2": lambda: SwinTransformerV2(**stages, window_size=(4, 4)),
        "cait": lambda: Cait(**vit, depth_token_only=2),
        "pvt": lambda: PyramidVisionTransformerV2(**pvt, sr_ratios=(2, 1)),
        "pvt linear": lambda: PyramidVisionTransformerV2(**pvt, sr_ratios=(2, 1), linear=True),
        "twins": lambda: Twins(
            img_size=(32, 48), **pvt | {"depths": (2, 2)}, patch_size=4, sr_ratios=(2, 1), wss=(3, 4)
        ),
        "mvit": lambda: mvit(use_cls_token=False, use_abs_pos=False),
        "mvit class token": lambda: mvit(use_cls_token=True, use_abs_pos=True),
        "torchvision": lambda: Torchvision(
            image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3
        ),
    }


FAMILIES = (
    "vit", "deit distilled", "registers", "gap", "swin", "swin padded", "our swin", "our cvt", "swinv2", "cait", "pvt",
    "pvt linear", "twins", "mvit", "mvit class token", "torchvision",
)  # fmt: skip


@pytest.fixture
def make_family() -> Callable[[str], tuple[nn.Module, Tensor]]:
    """A tiny model of a family in eval mode, whose attention is not uniform, and two images for it."""

    def made(name: str) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = _families()[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        size = (32, 32) if name.startswith(("mvit", "torchvision")) else (32, 48)
        return model, torch.randn(2, 3, *size)

    return made


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, make_family: Callable) -> tuple[str, nn.Module, Tensor]:
    """Name, model and images of each family."""
    return request.param, *make_family(request.param)
