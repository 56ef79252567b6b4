"""Encoder and decoder of a recipe."""

import dataclasses
import math
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ssat_probe import registry
from ssat_probe.images import Facts
from ssat_probe.patches import num_masked
from ssat_probe.recipe import Recipe

TIMM, PRETRAINED = "timm:", "pretrained"

Encoder = Any
"""A module whose call gives logits, with the same interface whatever its architecture.

``encode(images, mask) -> Features`` makes a full or a masked pass and ``logits_of(features)`` classifies; ``grid`` and
``num_tokens`` say how many patches can be hidden, ``dim`` is the width of the tokens, ``with_class_token`` says whether
there is a class token, and ``keeps_hidden`` whether hidden patches pass the blocks as mask tokens instead of being left
out. Not a Protocol: torch types every attribute of a module as tensor or module, which no Protocol can undo.
"""


def resolve(recipe: Recipe, facts: Facts) -> Recipe:
    """The recipe with every default that depends on the model or the data filled in.

    Args:
        recipe: As the user gave it.
        facts: Of the data.

    Returns:
        A recipe that rebuilds the same network whatever our defaults become.

    Raises:
        ValueError: If the data has no classes, the model does not exist, its patches do not divide the image, the mask
            ratio leaves no token, a patch has too few values to be normalised, or the decoder cannot decode what the
            encoder gives.
    """
    module, options, (depth, width, heads) = _family(recipe.model)
    img_size = recipe.img_size or tuple(facts.img_size)
    resolved = dataclasses.replace(
        recipe,
        img_size=img_size,
        patch_size=recipe.patch_size or module.default_patch_size(options.get("name", img_size)),
        decoder_depth=recipe.decoder_depth or depth,
        decoder_width=recipe.decoder_width or width,
        decoder_heads=recipe.decoder_heads or heads,
    )
    if not facts.num_classes:
        raise ValueError(f"data must have classes to train on, got {recipe.data!r}, which has none; choose other data.")
    encoder = _outline(resolved, facts)
    if recipe.masks:
        num_masked(encoder.num_tokens, recipe.mask_ratio)
    if recipe.norm_pix and facts.channels * math.prod(img_size) == encoder.num_tokens:
        raise ValueError(
            "norm_pix needs patches of at least two values, got patches of one grey pixel; choose a larger patch_size."
        )
    if recipe.reconstructs and decoder_of(recipe) == "simmim" and not encoder.keeps_hidden:
        raise ValueError(
            f"decoder must be one for an encoder that leaves hidden patches out, as {recipe.model} does, got 'simmim'; "
            "use shallow, or a model that carries mask tokens."
        )
    return resolved


def build_encoder(recipe: Recipe, facts: Facts, with_pretrained: bool = False) -> Encoder:
    """Encoder with its head; fresh weights that depend on the recipe's seed alone.

    Args:
        recipe: Resolved.
        facts: Of the data.
        with_pretrained: Fetch the weights of ``timm:NAME?pretrained``, as the beginning of a training does.

    Returns:
        The module, in training mode on the current default device.
    """
    module, options, _ = _family(recipe.model)
    options |= {"keeps_hidden": True} if recipe.task == "simmim" and not hasattr(module, "KEEPS_HIDDEN") else {}
    options |= {"is_pretrained": True} if with_pretrained and recipe.model.endswith(f"?{PRETRAINED}") else {}
    if recipe.masked_convolutions and hasattr(module, "MASKED_CONVOLUTIONS"):
        options |= {"masked_convolutions": True}
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
    encoder = _outline(recipe, facts)
    pixels = math.prod(recipe.img_size) // encoder.num_tokens
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + 1)
        return registry.load("decoders", decoder_of(recipe)).Decoder(
            encoder_dim=encoder.dim,
            grid=encoder.grid,
            patch_values=pixels * facts.channels,
            depth=recipe.decoder_depth,
            width=recipe.decoder_width,
            heads=recipe.decoder_heads,
            with_class_token=encoder.with_class_token,
            keeps_hidden=encoder.keeps_hidden,
        )


def decoder_of(recipe: Recipe) -> str:
    """Decoder of the masked pass.

    Args:
        recipe: Gives the task and the decoder.

    Returns:
        A file of ``decoders``, without ending: task simmim has its own.
    """
    return "simmim" if recipe.task == "simmim" else recipe.decoder


def _outline(recipe: Recipe, facts: Facts) -> Encoder:
    """The encoder without storage: for its sizes."""
    with torch.device("meta"):
        return build_encoder(recipe, facts)


def _family(model: str) -> tuple[ModuleType, dict[str, Any], tuple[int, int, int]]:
    """Module of a model, what its constructor is told beyond sizes, and depth, width and heads of its decoder."""
    if model.startswith(TIMM):
        module = registry.load("models", "timm_vit")
        name, _, choice = model.removeprefix(TIMM).partition("?")
        if choice not in ("", PRETRAINED):
            raise ValueError(
                f"A model of timm's must be timm:NAME or timm:NAME?{PRETRAINED} to be trained, got {model!r}."
            )
        return module, {"name": name}, module.DECODER
    variants = registry.variants("models")
    module = registry.load("models", variants[registry.known(model, variants, "models")])
    options = dict(module.VARIANTS[model])
    return module, options, options.pop("decoder")
