from collections.abc import Callable

import pytest
import torch

from ssat_probe.decoders import simmim as decoders
from ssat_probe.losses import target_of
from ssat_probe.network import build_decoder, build_encoder, resolve
from ssat_probe.objectives.simmim import Objective
from ssat_probe.patches import random_mask
from ssat_probe.recipe import Recipe

Make = Callable[..., tuple]
BATCH = 5


@pytest.mark.parametrize("model", ["vit_pico", "swin_nano", "cvt_nano"])
def test_the_loss_is_the_mean_absolute_error_over_the_hidden_pixels(
    make_recipe: Make, generator: Callable[[str], torch.Generator], model: str
) -> None:
    recipe, facts = make_recipe(model=model, task="simmim")
    encoder, decoder = build_encoder(recipe, facts).double(), build_decoder(recipe, facts).double()
    assert isinstance(decoder, decoders.Decoder)
    assert encoder.keeps_hidden
    images = torch.randn(BATCH, 1, 8, 8, generator=generator("images"), dtype=torch.float64)
    noise = torch.rand(BATCH, encoder.num_tokens, generator=generator("noise"))
    losses = Objective(recipe, encoder, decoder)(images, torch.zeros(BATCH, dtype=torch.int64), noise)
    mask = random_mask(noise, recipe.mask_ratio)
    with torch.no_grad():
        features = encoder.encode(images, mask)
        side = 8 // encoder.grid[0]
        errors = (decoder.pred(features.tokens) - target_of(images, (side, side), norm_pix=False)).abs()
    torch.testing.assert_close(losses.total.detach(), errors[mask].mean(), rtol=1e-12, atol=0)
    assert losses.reconstruction == losses.total
    losses.total.backward()
    assert encoder.mask_token.grad.any()


def test_a_vit_hides_its_patches_behind_a_mask_token(
    make_recipe: Make, generator: Callable[[str], torch.Generator]
) -> None:
    recipe, facts = make_recipe(model="vit_pico", task="simmim")
    encoder = build_encoder(recipe, facts).double()
    plain = build_encoder(make_recipe(model="vit_pico")[0], facts).double()
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in plain.state_dict().items())
    images = torch.randn(BATCH, 1, 8, 8, generator=generator("images"), dtype=torch.float64)
    assert torch.equal(encoder(images), plain(images))
    mask = random_mask(torch.rand(BATCH, 16, generator=generator("noise")), 0.75)
    features = encoder.encode(images, mask)
    assert (features.tokens.shape, features.visible_ids) == ((BATCH, 16, 12), None)
    hidden = mask.view(BATCH, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    changed = encoder.encode(torch.where(hidden, torch.nan, images), mask)
    assert torch.equal(changed.tokens, features.tokens)
    with torch.no_grad():
        encoder.patch_embed.proj.weight.zero_()  # then a patch is told by its bias alone
        encoder.mask_token.copy_(encoder.patch_embed.proj.bias)
    assert torch.equal(encoder.encode(images, mask).tokens, encoder.encode(images).tokens)


def test_the_linear_decoder_needs_an_encoder_that_keeps_hidden_patches(make_facts: Make) -> None:
    with pytest.raises(ValueError, match="leaves hidden patches out, as vit_nano does, got 'simmim'; use shallow"):
        resolve(Recipe(decoder="simmim"), make_facts())
    assert resolve(Recipe(decoder="simmim", model="swin_nano"), make_facts()).decoder == "simmim"
    assert resolve(Recipe(task="simmim"), make_facts()).task == "simmim"
