"""Optimiser of a stage: which parameters are decayed, and how fast each layer learns."""

from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from ssat_probe.recipe import Recipe


def build_optimiser(objective: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over an objective's trainable parameters.

    ``adamw`` is torch's, with its decoupled weight decay. ``sgd`` is torch's too: g = gradient + weight decay · w,
    v = momentum · v + g, w = w - rate · v; at a constant rate that is Polyak's heavy ball, without dampening.

    Args:
        objective: Holds the encoder and whatever else is trained.
        recipe: Gives the rates and averaging constants.

    Returns:
        With a group per weight decay, and per layer where ``layer_decay`` is not 1; ``set_rate`` moves them together.
    """
    groups = parameter_groups(objective, recipe)
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def set_rate(optimiser: Any, rate: float) -> None:
    """Give every group the learning rate of a step, times its layer's own share.

    Args:
        optimiser: From ``build_optimiser``, or the engine's wrapper of one.
        rate: Learning rate of the last layer.
    """
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def parameter_groups(objective: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters by weight decay, and by layer of the encoder where the layers learn at different rates.

    The embedding is layer 0, block i is layer i + 1, norm and head are the last one; layer k of n learns with
    ``layer_decay ** (n - 1 - k)`` of the rate. What is not in the encoder learns at the full rate.

    Args:
        objective: With an ``encoder`` somewhere in it.
        recipe: Gives the weight decay, which vectors, biases and what the encoder names in ``no_weight_decay`` do not
            have, and ``layer_decay``.

    Returns:
        Groups for an optimiser.

    Raises:
        ValueError: If the layers of the encoder are not known.

    References:
        Bao et al. (2022), https://arxiv.org/abs/2106.08254, Sec. 3.1, as in He et al. (2022), Table 9.
    """
    encoder = next(module for name, module in objective.named_modules() if name.split(".")[-1] == "encoder")
    spared = encoder.no_weight_decay() if hasattr(encoder, "no_weight_decay") else set()
    everywhere = {f"*encoder.{name}" for name in spared}
    if recipe.layer_decay == 1:
        return param_groups_weight_decay(objective, recipe.weight_decay, no_weight_decay_list=everywhere)
    if not hasattr(encoder, "group_matcher"):
        raise ValueError(
            f"layer_decay must be 1 for {recipe.model}, whose layers are not known, got {recipe.layer_decay}."
        )
    groups = param_groups_layer_decay(encoder, recipe.weight_decay, spared, layer_decay=recipe.layer_decay)
    inside = {id(parameter) for parameter in encoder.parameters()}
    others = param_groups_weight_decay(objective, recipe.weight_decay)
    for group in others:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in inside]
    return [*groups, *(group for group in others if group["params"])]
