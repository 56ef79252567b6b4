"""timm's own models with a masked pass more."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from ssat_probe.models import timm_vit
from ssat_probe.network import build_decoder, build_encoder, resolve
from ssat_probe.patches import random_mask
from ssat_probe.recipe import Recipe

Make = Callable[..., tuple]
NAMES = (
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "vit_medium_patch16_gap_240",
    "vit_small_patch14_reg4_dinov2",
)


def small(name: str, **more: Any) -> VisionTransformer:
    options = {"img_size": (28, 21), "patch_size": (7, 7), "num_classes": 5, "depth": 2, "in_chans": 2} | more
    torch.manual_seed(7)
    return timm.create_model(name, **options)


def ours(name: str, monkeypatch: pytest.MonkeyPatch) -> timm_vit.Model:
    """Two blocks of it, float64."""
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: make(*args, depth=2, **options))
    torch.manual_seed(7)
    made = timm_vit.Model(name=name, img_size=(28, 21), patch_size=(7, 7), channels=2, num_classes=5)
    monkeypatch.undo()
    return made.double().eval()


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_full_pass_are_timms(
    monkeypatch: pytest.MonkeyPatch, generator: Callable[[str], torch.Generator], name: str
) -> None:
    model, reference = ours(name, monkeypatch), small(name).double().eval()
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == reference.state_dict().keys()
    images = torch.randn(3, 2, 28, 21, generator=generator("images"), dtype=torch.float64)
    torch.testing.assert_close(model(images), reference(images), rtol=0, atol=1e-12)
    assert model.encode(images).tokens.shape == (3, 12, model.dim)
    assert model.with_class_token == ("gap" not in name)


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_pass_is_the_blocks_on_prefix_and_visible_tokens(
    monkeypatch: pytest.MonkeyPatch, generator: Callable[[str], torch.Generator], name: str
) -> None:
    model, reference = ours(name, monkeypatch), small(name).double().eval()
    images = torch.randn(3, 2, 28, 21, generator=generator("images"), dtype=torch.float64)
    mask = random_mask(torch.rand(3, 12, generator=generator("mask")), 0.75)
    features = model.encode(images, mask)
    prefix = reference.num_prefix_tokens
    for row in range(3):
        visible = (~mask[row]).nonzero().flatten()
        tokens = reference.norm_pre(reference._pos_embed(reference.patch_embed(images[row : row + 1])))
        kept = torch.cat([tokens[:, :prefix], tokens[:, prefix + visible]], dim=1)
        expected = reference.norm(reference.blocks(kept))[0]
        torch.testing.assert_close(features.tokens[row], expected[prefix:], rtol=0, atol=1e-12)
        assert features.visible_ids is not None
        assert features.visible_ids[row].tolist() == visible.tolist()
        if features.class_token is not None:
            torch.testing.assert_close(features.class_token[row], expected[0], rtol=0, atol=1e-12)
    changed = torch.where(mask.view(3, 1, 4, 3).repeat_interleave(7, 2).repeat_interleave(7, 3), torch.nan, images)
    assert torch.equal(model.encode(changed, mask).tokens, features.tokens)


def test_patches_are_the_models_own_unless_asked_for(make_recipe: Make) -> None:
    recipe, _ = make_recipe((28, 28), 3, 5, model="timm:vit_small_patch14_dinov2")
    assert (recipe.patch_size, recipe.decoder_width) == ((14, 14), 128)
    recipe, facts = make_recipe((8, 8), 1, 10, model="timm:vit_tiny_patch16_224", patch_size=2)
    with torch.device("meta"):
        encoder, decoder = build_encoder(recipe, facts), build_decoder(recipe, facts)
    assert encoder.grid == (4, 4)
    # timm's count at 224 and 16 but for patches, positions and head.
    expected = 5_717_416 - (768 + 1) * 192 - 197 * 192 - 193 * 1000 + (4 + 1) * 192 + 17 * 192 + 193 * 10
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected
    assert decoder.pred.out_features == 4
    assert recipe.name == "timm_vit_tiny_patch16_224-digits-ssat-seed0"


def test_pretrained_weights_are_fetched_when_a_training_begins_and_only_then(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, facts = make_recipe((32, 32), 3, 5, model="timm:vit_tiny_patch16_224?pretrained")
    asked, make = [], timm.create_model

    def noted(name: str, pretrained: bool = False, **options: Any) -> Any:
        asked.append(pretrained)
        return make(name, **options)

    monkeypatch.setattr(timm, "create_model", noted)
    build_encoder(recipe, facts)
    build_encoder(recipe, facts, with_pretrained=True)
    assert asked == [False, True]
    assert recipe.name.startswith("timm_vit_tiny_patch16_224_pretrained-")


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("timm:vit_tny", "a name that timm .* knows, got 'vit_tny'"),
        ("timm:resnet18", "got 'resnet18', a ResNet; timm:vit_tiny"),
        ("timm:vit_base_patch16_siglip_224", "classifies by class token or mean, got 'vit_base_patch16_siglip_224'"),
        ("timm:deit_tiny_distilled_patch16_224", "a VisionTransformerDistilled; timm:vit_tiny_patch16_224 is one"),
        ("timm:vit_tiny_r_s16_p8_224", "embed each patch by itself, so that nothing hidden leaks, got 'vit_tiny_r_s16"),
        ("timm:vitamin_small_224", "embed each patch by itself, .* got 'vitamin_small_224', whose convolutions"),
        ("timm:vit_tiny_patch16_224?best", r"timm:NAME or timm:NAME\?pretrained to be trained, got 'timm:vit"),
        ("timm:vit_tiny_patch16_224", "must divide the image of 28x28 pixels, got 16x16"),
    ],
)
def test_what_cannot_be_trained_is_named(make_facts: Make, model: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve(Recipe(model=model), make_facts((32, 32) if "vit_tiny_r" in model else (28, 28), 3))


@pytest.mark.parametrize("model", ["timm:vit_tiny_r_s16_p8_224", "timm:vit_tiny_patch16_224"])
def test_a_model_that_timm_cannot_make_is_never_refused_without_a_reason(make_facts: Make, model: str) -> None:
    with pytest.raises(ValueError, match=r"but timm says: \w+|must divide|embed each patch"):
        resolve(Recipe(model=model, img_size=(24, 24), patch_size=(16, 16)), make_facts((24, 24), 3))


def test_of_a_masked_pass_the_mean_is_that_of_visible_patches(
    monkeypatch: pytest.MonkeyPatch, generator: Callable[[str], torch.Generator]
) -> None:
    images = torch.randn(3, 2, 28, 21, generator=generator("images"), dtype=torch.float64)
    mask = random_mask(torch.rand(3, 12, generator=generator("mask")), 0.75)
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: make(*args, depth=2, **options))
    model = timm_vit.Model(
        name="vit_medium_patch16_gap_240", img_size=(28, 21), patch_size=(7, 7), channels=2, num_classes=5,
        keeps_hidden=True,
    ).double().eval()  # fmt: skip
    features = model.encode(images, mask)
    assert features.tokens.shape[1] == 12
    pooled = torch.stack([features.tokens[row][~mask[row]].mean(dim=0) for row in range(3)])
    torch.testing.assert_close(model.logits_of(features), model.head(model.fc_norm(pooled)), rtol=0, atol=1e-12)
    torch.testing.assert_close(features.summary, pooled, rtol=0, atol=1e-12)
