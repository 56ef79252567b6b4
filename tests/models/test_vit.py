"""The encoder against timm's own, by name and by value; counts against the paper's."""

import math
from collections.abc import Callable

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from ssat_probe.models import vit
from ssat_probe.network import build_decoder, build_encoder
from ssat_probe.patches import sincos_positions

Make = Callable[..., tuple]
IMG_SIZE, PATCH, CHANNELS, CLASSES, DIM, DEPTH, HEADS, BATCH = (15, 14), (5, 7), 3, 11, 28, 3, 7, 5
TOKENS = 6


@pytest.fixture
def model() -> vit.Model:
    """A ViT of no variant's size, float64."""
    torch.manual_seed(2)
    made = vit.Model(
        img_size=IMG_SIZE, patch_size=PATCH, channels=CHANNELS, num_classes=CLASSES, dim=DIM, depth=DEPTH, heads=HEADS
    )
    return made.double().eval()


@pytest.fixture
def reference() -> VisionTransformer:
    """timm's ViT of the same size, float64, with weights of its own, learnt positions included."""
    torch.manual_seed(3)
    made = VisionTransformer(
        img_size=IMG_SIZE,
        patch_size=PATCH,
        in_chans=CHANNELS,
        num_classes=CLASSES,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        global_pool="token",
    )
    return made.double().eval()


@pytest.fixture
def images(generator: Callable[[str], torch.Generator]) -> torch.Tensor:
    return torch.randn(BATCH, CHANNELS, *IMG_SIZE, generator=generator("vit"), dtype=torch.float64)


def num_trainable(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_our_weights_work_in_timm(model: vit.Model, reference: VisionTransformer, images: torch.Tensor) -> None:
    reference.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(reference(images), model(images), rtol=0, atol=1e-12)
    torch.testing.assert_close(reference.float()(images.float()), model.float()(images.float()), rtol=0, atol=1e-6)


def test_timms_weights_work_in_ours(model: vit.Model, reference: VisionTransformer, images: torch.Tensor) -> None:
    assert (reference(images) - model(images)).abs().max() > 0.1
    model.load_state_dict(reference.state_dict(), strict=True)
    torch.testing.assert_close(model(images), reference(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "patch"),
    [("vit_tiny", 16), ("vit_small", 16), ("vit_base", 16), ("vit_large", 16), ("vit_huge", 14)],
)
def test_a_variant_has_timms_names_shapes_and_parameters_but_fixed_positions(
    make_recipe: Make, name: str, patch: int
) -> None:
    recipe, facts = make_recipe((224, 224), 3, 10, model=name, patch_size=patch)
    with torch.device("meta"):
        ours = build_encoder(recipe, facts)
        theirs = timm.create_model(f"{name}_patch{patch}_224", num_classes=10)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert num_trainable(ours) == num_trainable(theirs) - theirs.pos_embed.numel()
    assert [module.eps for module in ours.modules() if isinstance(module, torch.nn.LayerNorm)] == [1e-6] * (
        2 * len(ours.blocks) + 1
    )


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"), [("vit_tiny", 5_488_522, 520_704), ("vit_small", 21_593_866, 545_280)]
)
def test_parameters_are_as_many_as_in_the_paper(make_recipe: Make, name: str, encoder: int, decoder: int) -> None:
    recipe, facts = make_recipe((224, 224), 3, 10, model=name)
    with torch.device("meta"):
        assert num_trainable(build_encoder(recipe, facts)) == encoder
        assert num_trainable(build_decoder(recipe, facts)) == decoder


def test_nano_has_at_most_60000_parameters_with_its_decoder(make_recipe: Make) -> None:
    recipe, facts = make_recipe()
    total = num_trainable(build_encoder(recipe, facts)) + num_trainable(build_decoder(recipe, facts))
    assert total <= 60_000


def test_positions_are_fixed_and_those_of_the_table(model: vit.Model) -> None:
    assert not model.pos_embed.requires_grad
    assert model.pos_embed.shape == (1, 1 + TOKENS, DIM)
    assert torch.equal(model.pos_embed[0].float(), sincos_positions(DIM, (3, 2), with_class_token=True))


def test_a_masked_pass_is_the_blocks_on_the_visible_tokens(
    model: vit.Model, reference: VisionTransformer, images: torch.Tensor
) -> None:
    reference.load_state_dict(model.state_dict())
    visible = [[0, 3, 5], [1, 2, 3], [0, 1, 2], [3, 4, 5], [0, 2, 4]]
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    for row, ids in enumerate(visible):
        mask[row, ids] = False
    features = model.encode(images, mask)
    assert features.visible_ids is not None
    assert features.visible_ids.tolist() == visible
    assert features.grid == (3, 2)
    embedded = reference._pos_embed(reference.patch_embed(images))
    for row, ids in enumerate(visible):
        tokens = embedded[row : row + 1, [0, *(1 + i for i in ids)]]
        expected = reference.norm(reference.blocks(tokens))[0]
        torch.testing.assert_close(features.tokens[row], expected[1:], rtol=0, atol=1e-12)
        torch.testing.assert_close(features.class_token[row], expected[0], rtol=0, atol=1e-12)


def test_a_full_pass_has_every_token_and_the_head_on_the_class_token(model: vit.Model, images: torch.Tensor) -> None:
    features = model.encode(images)
    assert features.visible_ids is None
    assert features.tokens.shape == (BATCH, TOKENS, DIM)
    assert torch.equal(model(images), model.head(features.class_token))
    unmasked = model.encode(images, torch.zeros(BATCH, TOKENS, dtype=torch.bool))
    torch.testing.assert_close(unmasked.tokens, features.tokens, rtol=0, atol=1e-12)


def test_hidden_pixels_do_not_reach_the_encoder(model: vit.Model, images: torch.Tensor) -> None:
    mask = torch.tensor([[True, False, True, True, False, True]] * BATCH)
    hidden = mask.view(BATCH, 1, 3, 2).repeat_interleave(5, 2).repeat_interleave(7, 3).expand_as(images)
    images.requires_grad_()
    model.encode(images, mask).tokens.square().sum().backward()
    assert images.grad is not None
    assert not images.grad[hidden].any()
    assert images.grad[~hidden].all()
    changed = torch.where(hidden, float("nan"), images.detach())
    assert torch.equal(model.encode(changed, mask).tokens, model.encode(images, mask).tokens)


def test_one_image_does_not_change_with_its_neighbours(model: vit.Model, images: torch.Tensor) -> None:
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]), rtol=0, atol=1e-12)


def test_linear_maps_start_xavier_uniform_and_biases_zero(make_recipe: Make) -> None:
    recipe, facts = make_recipe((32, 32), 3, 10, model="vit_tiny", seed=1)
    model = build_encoder(recipe, facts)
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    weights["patch_embed.proj"] = model.patch_embed.proj.weight.flatten(1)
    assert len(weights) == 12 * 4 + 2
    for name, weight in weights.items():
        bound = math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max() <= bound, name
        assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(weight.numel())), (
            name
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            assert not module.bias.any(), name
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all(), name
    assert float(model.cls_token.detach().std()) == pytest.approx(0.02, rel=5 / math.sqrt(2 * 192))


@pytest.mark.parametrize(
    ("img_size", "side"), [((8, 8), 2), ((23, 23), 2), ((24, 99), 4), ((32, 32), 4), ((64, 64), 8), ((224, 224), 16)]
)
def test_default_patches(img_size: tuple[int, int], side: int) -> None:
    assert vit.default_patch_size(img_size) == (side, side)


@pytest.mark.parametrize("name", ["vit_nano", "vit_tiny"])
def test_the_loss_falls_in_five_steps(
    make_recipe: Make, generator: Callable[[str], torch.Generator], name: str
) -> None:
    recipe, facts = make_recipe((8, 8), 1, 5, model=name, patch_size=(4, 4))
    model = build_encoder(recipe, facts)
    images, labels = torch.randn(5, 1, 8, 8, generator=generator("five")), torch.arange(5)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses == sorted(losses, reverse=True)
