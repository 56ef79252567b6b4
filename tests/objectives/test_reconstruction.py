from collections.abc import Callable

import pytest
import torch

from ssat_probe.losses import reconstruction_error
from ssat_probe.network import build_decoder, build_encoder
from ssat_probe.objectives.reconstruction import Objective

Make = Callable[..., tuple]
BATCH = 5


def test_the_loss_is_the_mean_error_under_the_masks_of_the_noise(
    make_recipe: Make, generator: Callable[[str], torch.Generator]
) -> None:
    recipe, facts = make_recipe(mask_ratio=0.75, norm_pix=True)
    encoder, decoder = build_encoder(recipe, facts).double(), build_decoder(recipe, facts).double()
    images = torch.randn(BATCH, 1, 8, 8, generator=generator("images"), dtype=torch.float64)
    noise = torch.rand(BATCH, 16, generator=generator("noise"))
    losses = Objective(recipe, encoder, decoder)(images, torch.zeros(BATCH, dtype=torch.int64), noise)
    mask = torch.zeros(BATCH, 16, dtype=torch.bool)
    mask.scatter_(1, noise.topk(12, dim=1).indices, value=True)
    expected = reconstruction_error(encoder, decoder, images, mask, norm_pix=True).mean()
    torch.testing.assert_close(losses.total, expected, rtol=1e-13, atol=0)
    assert losses.reconstruction == losses.total
    assert losses.cross_entropy is None
    assert losses.logits is None


def test_labels_do_not_enter_and_the_head_gets_no_gradient(
    make_recipe: Make, generator: Callable[[str], torch.Generator]
) -> None:
    recipe, facts = make_recipe()
    encoder, decoder = build_encoder(recipe, facts), build_decoder(recipe, facts)
    objective = Objective(recipe, encoder, decoder)
    images, noise = (
        torch.randn(BATCH, 1, 8, 8, generator=generator("i")),
        torch.rand(BATCH, 16, generator=generator("n")),
    )
    first = objective(images, torch.zeros(BATCH, dtype=torch.int64), noise).total
    assert first == objective(images, torch.arange(BATCH), noise).total
    first.backward()
    without = {name for name, parameter in objective.named_parameters() if parameter.grad is None}
    assert without == {"encoder.head.weight", "encoder.head.bias", "encoder.pos_embed", "decoder.pos_embed"}


def test_reconstruction_without_a_decoder_is_refused(make_recipe: Make) -> None:
    recipe, facts = make_recipe()
    with pytest.raises(ValueError, match=r"needs a decoder, got none; build one with network\.build_decoder"):
        Objective(recipe, build_encoder(recipe, facts), None)
