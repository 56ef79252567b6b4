"""One file per objective; here, which one a stage of a recipe has, and what its task puts behind the encoder."""

import torch
from torch import nn

from ssat_probe import registry
from ssat_probe.images import Facts
from ssat_probe.network import Encoder, build_decoder
from ssat_probe.recipe import Recipe


def name_of(recipe: Recipe, stage: str) -> str:
    """Objective of a stage.

    Args:
        recipe: Gives the method and the task.
        stage: ``pretrain``, ``finetune`` or ``train``.

    Returns:
        A file of this folder, without ending.
    """
    if stage == "pretrain":
        return recipe.task
    return "ssat" if recipe.method == "ssat" else "supervised"


def behind_encoder(recipe: Recipe, facts: Facts, encoder: Encoder) -> nn.Module | None:
    """What the task of a run puts behind the encoder; fresh weights that depend on the recipe's seed alone.

    Args:
        recipe: Resolved.
        facts: Of the data.
        encoder: As the training begins.

    Returns:
        A decoder of pixels, the head of another task, or none where a run has no task.
    """
    if not recipe.has_task:
        return None
    if recipe.reconstructs:
        return build_decoder(recipe, facts)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + 1)
        return registry.load("objectives", recipe.task).Head(encoder)
