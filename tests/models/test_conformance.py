"""What must hold for every architecture, under every method."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ssat_probe.checkpoint import load_checkpoint
from ssat_probe.description import describe
from ssat_probe.network import build_decoder, build_encoder
from ssat_probe.objectives import ssat
from ssat_probe.patches import random_mask
from ssat_probe.probe import measure
from ssat_probe.recipe import Recipe
from ssat_probe.sample import Sample
from ssat_probe.training import train

Make = Callable[..., tuple]
MODELS = ("vit_pico", "swin_nano", "cvt_nano", "timm:test_vit")
METHODS = ("scratch", "ssl_ft", "ssat")
DECODERS = {"vit_pico": ("shallow",), "timm:test_vit": ("shallow",)}
SIZES = {"timm:test_vit": {"patch_size": (2, 2)}}
CASES = [(model, decoder) for model in MODELS for decoder in DECODERS.get(model, ("shallow", "simmim"))]


class Stop(Exception):  # noqa: N818
    """Somebody pulled the plug."""


def batch_of(generator: Callable[[str], torch.Generator], num_tokens: int) -> tuple[torch.Tensor, ...]:
    """Images, labels, noise."""
    images = torch.randn(6, 1, 8, 8, generator=generator("images"))
    return images, torch.arange(6) % 5, torch.rand(6, num_tokens, generator=generator("noise"))


@pytest.mark.parametrize(("model", "decoder"), CASES)
def test_shapes_are_what_the_interface_says(
    make_recipe: Make, generator: Callable[[str], torch.Generator], model: str, decoder: str
) -> None:
    recipe, facts = make_recipe((8, 8), 1, 5, model=model, decoder=decoder, **SIZES.get(model, {}))
    encoder, decoding = build_encoder(recipe, facts), build_decoder(recipe, facts)
    assert encoder.num_tokens == math.prod(encoder.grid)
    images, _, noise = batch_of(generator, encoder.num_tokens)
    mask = random_mask(noise, recipe.mask_ratio)
    for features, is_full in ((encoder.encode(images), True), (encoder.encode(images, mask), False)):
        shown = encoder.num_tokens if is_full or encoder.keeps_hidden else int((~mask[0]).sum())
        assert features.grid == encoder.grid
        assert features.tokens.shape == (6, shown, encoder.dim)
        assert (features.class_token is not None) == encoder.with_class_token
        assert (features.visible_ids is None) == (is_full or encoder.keeps_hidden)
        if is_full:
            assert features.visible_ids is None
        assert encoder.logits_of(features).shape == (6, 5)
    assert decoding(features).shape == (6, encoder.num_tokens, 64 // encoder.num_tokens)


@pytest.mark.parametrize(("model", "decoder"), CASES)
def test_every_parameter_has_a_finite_gradient_and_the_loss_falls(
    make_recipe: Make, generator: Callable[[str], torch.Generator], model: str, decoder: str
) -> None:
    recipe, facts = make_recipe((8, 8), 1, 5, model=model, decoder=decoder, **SIZES.get(model, {}), lambda_weight=0.5)
    encoder = build_encoder(recipe, facts)
    objective = ssat.Objective(recipe, encoder, build_decoder(recipe, facts))
    batch = batch_of(generator, encoder.num_tokens)
    parameters = {name: one for name, one in objective.named_parameters() if one.requires_grad}
    optimiser = torch.optim.SGD(parameters.values(), lr=1e-4)
    losses = []
    for _ in range(8):
        loss = objective(*batch).total
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name
        optimiser.step()
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_it_trains_resumes_to_the_bit_and_opens_again(tmp_path: Path, model: str, method: str) -> None:
    options = {"subset": 24, "batch_size": 8, "epochs": 2, "warmup_epochs": 0.5, "base_lr": 1e-2} | SIZES.get(model, {})
    recipe = Recipe(method=method, model=model, **options)  # type: ignore[arg-type]
    whole = train(recipe, tmp_path / "whole", device="cpu")
    stops = []

    def progress(done: int, total: int, text: str) -> None:
        if done == 2 + total // 2:
            stops.append(done)
            raise Stop

    with pytest.raises(Stop):
        train(recipe, tmp_path / "stopped", device="cpu", save_every_s=-1, progress=progress)
    again = train(recipe, tmp_path / "stopped", device="cpu")
    assert again.hash == load_checkpoint(whole.path).hash == load_checkpoint(again.path).hash
    if method == "ssat":
        table = measure("accuracy", [whole.path], num_images=20, device="cpu")
        assert table["accuracy"].between(0, 1).all()
        lines = describe(whole.path, Sample(num_images=8, batch_size=2, device="cpu"))
        assert any(f"model: {model}" in line for line in lines)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("task", ["simmim", "contrastive", "dino"])
def test_every_task_trains_on_it_and_resumes_to_the_bit(tmp_path: Path, model: str, task: str) -> None:
    options = {"subset": 16, "batch_size": 8, "epochs": 1, "warmup_epochs": 0.5} | SIZES.get(model, {})
    recipe = Recipe(method="ssl_ft", model=model, task=task, **options)  # type: ignore[arg-type]
    whole = train(recipe, tmp_path / "whole", device="cpu")

    def progress(done: int, total: int, text: str) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        train(recipe, tmp_path / "stopped", device="cpu", save_every_s=-1, progress=progress)
    again = train(recipe, tmp_path / "stopped", device="cpu")
    assert again.hash == load_checkpoint(whole.path).hash
    log = pd.read_csv(whole.path.parent / "log.csv")
    column = "reconstruction" if task == "simmim" else "auxiliary"
    assert np.isfinite(log[column][0])
    pretrain = load_checkpoint(whole.path.with_name("pretrain.pt"))
    assert pretrain.has_decoder == (task == "simmim")
    assert not any("teacher" in name for name in pretrain.state)
