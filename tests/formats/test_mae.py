"""Official MAE and SSAT files: encoder, head and decoder give what the official computation gives."""

import argparse
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssat_probe.foreign import Foreign
from ssat_probe.formats import detect

Open = Callable[..., Foreign]


@pytest.mark.parametrize("classes", [7, 0])
def test_both_passes_are_the_official_ones(autoencoder: Callable, opened: Open, images: Tensor, classes: int) -> None:
    official = autoencoder(classes)
    content = {"model": official.names(), "epoch": 99, "args": argparse.Namespace(mask_ratio=0.75), "scaler": {}}
    assert detect(content["model"]) == "mae"
    foreign = opened(content)
    encoder, decoder = foreign.encoder().eval(), foreign.decoder()
    assert decoder is not None
    with torch.no_grad():
        features = official.encoder(images)
        torch.testing.assert_close(encoder(images), official.head(features) if classes else features)
        shuffle = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
        mask = torch.ones(2, 16, dtype=torch.bool).scatter(1, shuffle[:, :4], False)
        expected = official.reconstruct(images, shuffle[:, :4], shuffle.argsort(1))
        torch.testing.assert_close(decoder.eval()(encoder.encode(images, mask)), expected, rtol=1e-5, atol=1e-5)
    assert foreign.report.fraction == 1.0
    assert foreign.report.note.startswith("SSAT" if classes else "MAE")


def test_another_image_size_resamples_encoder_and_decoder_when_asked(autoencoder: Callable, opened: Open) -> None:
    state = autoencoder(7).names()
    foreign = opened(state, img_size=(30, 15), resize=True)
    assert foreign.report.resized == {
        "pos_embed": "(1, 17, 128) to (1, 19, 128)",
        "decoder.pos_embed": "(1, 17, 32) to (1, 19, 32)",
    }
    encoder, decoder = foreign.encoder().eval(), foreign.decoder()
    assert decoder is not None
    assert decoder(encoder.encode(torch.zeros(1, 3, 30, 15))).shape == (1, 18, 75)
    assert torch.equal(foreign.state["pos_embed"][:, 0], state["pos_embed"][:, 0])
    with pytest.raises(
        ValueError, match=r"'pos_embed' must have shape \(1, 19, 128\) .* got \(1, 17, 128\); give --res"
    ):
        opened(state, img_size=(30, 15))


def test_a_decoder_that_does_not_fit_is_refused_or_dropped(autoencoder: Callable, opened: Open) -> None:
    state = autoencoder(7).names()
    del state["decoder_norm.bias"]
    with pytest.raises(ValueError, match=r"decoder's weights must fill it, got 1 that do not fit \(norm.bias\)"):
        opened(state)
    foreign = opened(state, allow_partial=True)
    assert foreign.decoder() is None
    assert foreign.report.dropped["decoder.norm.weight"] == "it does not fit this image or patch size"


def test_whether_patches_are_normed_is_told_by_the_options_in_the_file_or_by_the_user(
    autoencoder: Callable, opened: Open
) -> None:
    state = autoencoder(0).names()
    told = opened({"model": state, "args": argparse.Namespace(norm_pix_loss=True, mask_ratio=0.5)})
    assert (told.recipe.norm_pix, told.recipe.mask_ratio) == (True, 0.5)
    assert told.report.note.endswith("the decoder predicts pixels normalised patch by patch")
    silent = opened({"model": state})
    assert (silent.recipe.norm_pix, silent.recipe.mask_ratio) == (False, 0.75)
    assert silent.report.note.endswith("the decoder predicts pixels as they are")
    assert opened({"model": state}, norm_pix=True).recipe.norm_pix
