"""The architecture that names and shapes tell, and the sentence where they do not."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ssat_probe.architecture import inferred_model, num_classes_of, seeded, shape_of, timm_model
from ssat_probe.formats import Converted
from ssat_probe.source import Source

SMALL = {"img_size": 20, "patch_size": 5, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 7}


def state(**options: object) -> dict[str, Tensor]:
    return VisionTransformer(**(SMALL | options)).state_dict()  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12), (128, 2)])
def test_the_usual_number_of_heads(width: int, heads: int) -> None:
    model = inferred_model(Converted(state(embed_dim=width, num_heads=heads, depth=1)), Source())
    assert model.blocks[0].attn.num_heads == heads


def test_heads_can_be_given_and_must_be_for_an_unusual_width() -> None:
    narrow = Converted(state(embed_dim=36, num_heads=3))
    with pytest.raises(ValueError, match=r"must tell their attention heads, got a width of 36 .* give it with --heads"):
        inferred_model(narrow, Source())
    assert inferred_model(narrow, Source(heads=3)).blocks[0].attn.num_heads == 3
    with pytest.raises(ValueError, match="got a width of 36"):
        inferred_model(narrow, Source(heads=5))


def test_a_rectangle_is_told_by_its_size() -> None:
    rectangle = Converted(state(img_size=(10, 25)))
    with pytest.raises(ValueError, match=r"'pos_embed' must be 1 positions and a square of patches, got 11 positions"):
        inferred_model(rectangle, Source())
    assert inferred_model(rectangle, Source(img_size=(10, 25))).patch_embed.grid_size == (2, 5)


def test_a_model_without_positions_needs_a_size() -> None:
    bare = Converted(state(pos_embed="none"))
    with pytest.raises(ValueError, match="no positions that tell the image size; give it with --img-size"):
        inferred_model(bare, Source())
    assert inferred_model(bare, Source(img_size=(20,))).pos_embed is None


@pytest.mark.parametrize("shape", [(), (3,), (128, 0, 5, 5)])
def test_an_absurd_shape_is_named(shape: tuple[int, ...]) -> None:
    absurd = Converted(state() | {"patch_embed.proj.weight": torch.zeros(shape)})
    with pytest.raises(ValueError, match=r"'patch_embed\.proj\.weight' must have 4 axes to tell the model, got shape"):
        inferred_model(absurd, Source())


def test_an_absurd_number_of_blocks_is_named() -> None:
    absurd = Converted(state() | {"blocks.99999999.norm1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="at most 256 blocks, got block 99999999"):
        inferred_model(absurd, Source())
    with pytest.raises(ValueError, match="'a' must have 1 axes to tell the model, got none"):
        shape_of({}, "a", 1)


def test_models_of_timm_by_name() -> None:
    model = timm_model("vit_tiny_patch16_224", Source(img_size=(32,), patch_size=(8,)), 5)
    assert (model.patch_embed.grid_size, model.num_classes) == ((4, 4), 5)
    with pytest.raises(ValueError, match=r"got 'vit_tinny_patch16_224'\. Did you mean 'vit_tiny_patch16_224'\?"):
        timm_model("vit_tinny_patch16_224", Source(), None)
    for size in ((), (32,)):
        with pytest.raises(ValueError, match=r"timm:resnet18 must be made with .*'patch_size': 4.* but timm says: "):
            timm_model("resnet18", Source(img_size=size, patch_size=(4,)), None)


def test_models_of_any_size_are_told_theirs() -> None:
    for name in ("pvt_v2_b0", "resnet10t"):
        model = timm_model(name, Source(img_size=(64, 96)), 5).eval()
        assert model.img_size == (64, 96)
        assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 5)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("vit_tny", "vit_tiny_patch16_224"),
        ("vit_tiny", "vit_tiny_patch16_224"),
        ("swin_tny", "swin_tiny_patch4_window7_224"),
        ("deit_smal", "deit_small_patch16_224"),
        ("vit_base_patch16_223", "vit_base_patch16_224"),
        ("mvitv2_tny", "mvitv2_tiny"),
    ],
)
def test_a_part_of_a_name_or_a_slip_in_it_suggests_the_same_family(wrong: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"Did you mean '{hint}'"):
        timm_model(wrong, Source(), None)


def test_classes_of_the_head() -> None:
    assert num_classes_of({"head.weight": torch.zeros(7, 3)}) == 7
    assert num_classes_of({"head.fc.weight": torch.zeros(5, 3)}) == 5
    assert num_classes_of({}) == 0


def test_a_seed_decides_the_weights_and_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(3)
    first = seeded(1, lambda: torch.nn.Linear(2, 3)).weight
    assert torch.equal(first, seeded(1, lambda: torch.nn.Linear(2, 3)).weight)
    assert not torch.equal(first, seeded(2, lambda: torch.nn.Linear(2, 3)).weight)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
