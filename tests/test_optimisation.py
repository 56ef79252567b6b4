"""Groups of the optimiser: decay by dimension, rate by layer."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ssat_probe.network import build_decoder, build_encoder
from ssat_probe.objectives import ssat
from ssat_probe.optimisation import build_optimiser, parameter_groups, set_rate


def test_each_layer_learns_a_factor_slower_than_the_next_one(make_recipe: Callable[..., Any]) -> None:
    recipe, facts = make_recipe(method="ssat", layer_decay=0.5, weight_decay=0.07)
    encoder, decoder = build_encoder(recipe, facts), build_decoder(recipe, facts)
    groups = parameter_groups(ssat.Objective(recipe, encoder, decoder), recipe)
    found = {id(p): (group.get("lr_scale", 1.0), group["weight_decay"]) for group in groups for p in group["params"]}
    depth = len(encoder.blocks)
    trainable = {f"encoder.{n}": p for n, p in encoder.named_parameters()} | {
        f"decoder.{n}": p for n, p in decoder.named_parameters()
    }
    trainable = {name: parameter for name, parameter in trainable.items() if parameter.requires_grad}
    assert len(found) == len(trainable) == sum(len(group["params"]) for group in groups)
    for name, parameter in trainable.items():
        block = re.match(r"encoder\.blocks\.(\d+)\.", name)
        is_stem = name.startswith(("encoder.cls_token", "encoder.patch_embed"))
        below = depth + 1 if is_stem else depth - int(block[1]) if block else 0
        assert found[id(parameter)] == (0.5**below, 0.07 if parameter.ndim > 1 else 0), name


def test_the_rate_of_a_step_reaches_every_group(make_recipe: Callable[..., Any]) -> None:
    recipe, facts = make_recipe(method="scratch", layer_decay=0.5)
    module = nn.ModuleDict({"encoder": build_encoder(recipe, facts)})
    optimiser = build_optimiser(module, recipe)
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    set_rate(optimiser, 1e-3)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    for group in optimiser.param_groups:
        group["weight_decay"] = 0
    optimiser.step()  # AdamW's first step has the length of the learning rate
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            block = re.match(r"encoder\.blocks\.(\d+)\.", name)
            is_stem = name.startswith(("encoder.cls_token", "encoder.patch_embed"))
            below = 7 if is_stem else 6 - int(block[1]) if block else 0
            step = (before[name] - parameter.detach()).double()
            torch.testing.assert_close(step, torch.full_like(step, 1e-3 * 0.5**below), rtol=2e-2, atol=0, msg=name)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_moves_by_the_heavy_ball_of_decayed_gradients(make_recipe: Callable[..., Any], momentum: float) -> None:
    recipe, facts = make_recipe(
        method="scratch", optimiser="sgd", momentum=momentum, weight_decay=0.07, layer_decay=0.5
    )
    module = nn.ModuleDict({"encoder": build_encoder(recipe, facts).double()})
    optimiser = build_optimiser(module, recipe)
    scale = {id(p): group.get("lr_scale", 1.0) for group in optimiser.param_groups for p in group["params"]}
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    weights = {name: p.detach().clone() for name, p in trainable.items()}
    sums = {name: torch.zeros_like(p) for name, p in weights.items()}
    generator = torch.Generator().manual_seed(0)
    for rate in (0.3, 0.2, 0.1):
        set_rate(optimiser, rate)
        for name, parameter in trainable.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            decay = 0.07 if parameter.ndim > 1 else 0.0
            sums[name] = momentum * sums[name] + parameter.grad + decay * weights[name]
            weights[name] = weights[name] - rate * scale[id(parameter)] * sums[name]
        optimiser.step()
    assert {round(one, 9) for one in scale.values()} == {0.5**below for below in range(8)}
    for name, parameter in trainable.items():
        torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("cvt_nano", [r"stage0\.patch_embed|mask_token", r"stage0\.blocks\.0", r"stage1\.(blocks\.0|patch_embed)",
                      r"stage2\.(blocks\.0|patch_embed|cls_token)", r"stage2\.blocks\.1", r"norm|head"]),
        ("swin_nano", [r"patch_embed|mask_token", r"layers\.0\.blocks\.0", r"layers\.0\.blocks\.1",
                       r"layers\.1\.(blocks\.0|downsample)", r"layers\.1\.blocks\.1", r"norm|head"]),
        ("timm:test_vit", [r"patch_embed|mask_token|cls_token|pos_embed", *[rf"blocks\.{i}" for i in range(5)],
                           r"blocks\.5", r"norm|head"]),
    ],
)  # fmt: skip
def test_every_architecture_has_one_layer_after_the_other(
    make_recipe: Callable[..., Any], model: str, layers: list[str]
) -> None:
    recipe, facts = make_recipe((16, 16), 3, model=model, task="simmim", patch_size=2, layer_decay=0.5)
    encoder = build_encoder(recipe, facts)
    groups = parameter_groups(nn.ModuleDict({"encoder": encoder}), recipe)
    found = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, parameter in encoder.named_parameters():
        (number,) = [i for i, layer in enumerate(layers) if re.match(rf"({layer})(\.|$)", name)]
        assert found[id(parameter)] == 0.5 ** (len(layers) - 1 - number), name


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
@pytest.mark.parametrize(
    ("model", "spared"),
    [
        ("vit_pico", set()),  # as in the official code of SSAT
        ("cvt_nano", {"stage2.cls_token", "mask_token"}),
        ("swin_nano", {*(f"layers.{i}.blocks.{j}.attn.relative_position_bias_table" for i in (0, 1) for j in (0, 1)),
                       "mask_token"}),
        ("timm:test_vit", {"cls_token", "pos_embed", "reg_token", "mask_token"}),
    ],
)  # fmt: skip
def test_what_its_own_code_does_not_decay_is_not_decayed(
    make_recipe: Callable[..., Any], model: str, spared: set[str], layer_decay: float
) -> None:
    recipe, facts = make_recipe((16, 16), 3, model=model, task="simmim", patch_size=2, layer_decay=layer_decay)
    encoder, decoder = build_encoder(recipe, facts), build_decoder(recipe, facts)
    groups = parameter_groups(ssat.Objective(recipe, encoder, decoder), recipe)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert {name for name, p in named.items() if p.ndim > 1 and not decays[id(p)]} == spared & named.keys()
    assert all(decays[id(p)] == (0.05 if p.ndim > 1 else 0) for p in decoder.parameters() if p.requires_grad)


def test_an_encoder_of_unknown_layers_is_refused(make_recipe: Callable[..., Any]) -> None:
    recipe, _ = make_recipe(layer_decay=0.75)
    with pytest.raises(ValueError, match=r"layer_decay must be 1 for vit_nano, whose layers are not known, got 0\.75"):
        parameter_groups(nn.ModuleDict({"encoder": nn.Linear(3, 2)}), recipe)
