"""Encoder and decoder of a recipe."""

import dataclasses
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ssat_probe import registry
from ssat_probe.images import Facts
from ssat_probe.patches import grid_of, num_masked
from ssat_probe.recipe import Recipe

Encoder = Any
"""A module whose call gives logits, with ``encode(images, mask) -> Features``, ``num_tokens`` and ``grid``.

Not a Protocol: torch types every attribute of a module as tensor or module, which no Protocol can undo.
"""


def resolve(recipe: Recipe, facts: Facts) -> Recipe:
    """The recipe with every default that depends on the model or the data filled in.

    Args:
        recipe: As the user gave it.
        facts: Of the data.

    Returns:
        A recipe that rebuilds the same network whatever our defaults become; a model that does not exist, a patch
        that does not divide the image or a mask ratio that leaves no token is a ValueError.
    """
    module, variant = _variant(recipe.model)
    depth, width, heads = variant["decoder"]
    img_size = recipe.img_size or tuple(facts.img_size)
    patch_size = recipe.patch_size or module.default_patch_size(img_size)
    rows, columns = grid_of(img_size, patch_size)
    num_masked(rows * columns, recipe.mask_ratio)
    return dataclasses.replace(
        recipe,
        img_size=img_size,
        patch_size=patch_size,
        decoder_depth=recipe.decoder_depth or depth,
        decoder_width=recipe.decoder_width or width,
        decoder_heads=recipe.decoder_heads or heads,
    )


def build_encoder(recipe: Recipe, facts: Facts) -> Encoder:
    """Encoder with its head; fresh weights that depend on the recipe's seed alone.

    Args:
        recipe: Resolved.
        facts: Of the data.

    Returns:
        The module, in training mode on the current default device.
    """
    module, variant = _variant(recipe.model)
    options = {name: value for name, value in variant.items() if name != "decoder"}
    options |= {"drop_path": recipe.drop_path} if recipe.drop_path else {}
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return module.Model(
            img_size=recipe.img_size,
            patch_size=recipe.patch_size,
            channels=facts.channels,
            num_classes=facts.num_classes,
            **options,
        )


def build_decoder(recipe: Recipe, facts: Facts) -> nn.Module:
    """Decoder of the masked pass; fresh weights that depend on the recipe's seed alone.

    Args:
        recipe: Resolved.
        facts: Of the data.

    Returns:
        The module, in training mode on the current default device.
    """
    _, variant = _variant(recipe.model)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + 1)
        return registry.load("decoders", recipe.decoder).Decoder(
            encoder_dim=variant["dim"],
            grid=grid_of(recipe.img_size, recipe.patch_size),
            patch_values=recipe.patch_size[0] * recipe.patch_size[1] * facts.channels,
            depth=recipe.decoder_depth,
            width=recipe.decoder_width,
            heads=recipe.decoder_heads,
        )


def _variant(model: str) -> tuple[ModuleType, dict[str, Any]]:
    """Module of a model's family and the row of its table."""
    variants = registry.variants("models")
    module = registry.load("models", variants[registry.known(model, variants, "models")])
    return module, module.VARIANTS[model]
