"""What a run costs before it starts: parameters, multiply-adds, steps and images."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssat_probe.images import Facts
from ssat_probe.network import Encoder, build_decoder, build_encoder
from ssat_probe.patches import random_mask
from ssat_probe.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """Cost of a stage."""

    name: str
    epochs: int
    steps: int
    images: int
    multiply_adds_per_image: int
    "Of one forward pass; the backward pass takes about twice as many."


@dataclass(frozen=True)
class Budget:
    """Cost of a run, known before it starts."""

    encoder_parameters: int
    "Trainable ones, with the head."
    decoder_parameters: int
    "Trainable ones; 0 where the run has no decoder."
    stages: tuple[Stage, ...]

    @property
    def images(self) -> int:
        """Images processed over all stages."""
        return sum(stage.images for stage in self.stages)

    @property
    def steps(self) -> int:
        """Optimiser steps over all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all forward passes over all stages."""
        return sum(stage.images * stage.multiply_adds_per_image for stage in self.stages)


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Optimiser steps of an epoch; images that do not fill a batch wait for the next shuffle.

    Args:
        num_images: Training images.
        batch_size: Images per step.

    Returns:
        At least 1: fewer images than a batch make one smaller batch.
    """
    return max(1, num_images // batch_size)


def budget_of(recipe: Recipe, facts: Facts, num_images: int) -> Budget:
    """Cost of a run.

    Args:
        recipe: Resolved.
        facts: Of the data.
        num_images: Training images.

    Returns:
        Counted on tensors without storage, so that any model is counted at once.
    """
    with torch.device("meta"), torch.random.fork_rng():
        encoder, decoder = build_encoder(recipe, facts).eval(), build_decoder(recipe, facts).eval()
        full, masked = _multiply_adds(encoder, decoder, recipe, facts)
    reconstructs = recipe.method == "ssl_ft" or (recipe.method == "ssat" and recipe.lambda_weight < 1)
    classifies = recipe.method == "ssat" and recipe.lambda_weight > 0
    cost = {"pretrain": masked, "finetune": full, "train": full}
    if recipe.method == "ssat":
        cost["train"] = full * classifies + masked * reconstructs
    steps = steps_per_epoch(num_images, recipe.batch_size)
    images = steps * min(recipe.batch_size, num_images)
    return Budget(
        _num_trainable(encoder),
        _num_trainable(decoder) if reconstructs else 0,
        tuple(
            Stage(name, epochs, epochs * steps, epochs * images, cost[name])
            for name, epochs in recipe.stage_epochs.items()
        ),
    )


def _multiply_adds(encoder: Encoder, decoder: nn.Module, recipe: Recipe, facts: Facts) -> tuple[int, int]:
    """Multiply-adds of a full pass, and of a masked pass with the decoder, for one image."""
    images = torch.empty(1, facts.channels, *recipe.img_size)
    mask = random_mask(torch.linspace(0, 1, encoder.num_tokens, device="cpu")[None], recipe.mask_ratio)
    passes = (lambda: encoder(images), lambda: decoder(encoder.encode(images, mask)))
    counts = []
    for run in passes:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            run()
        counts.append(counter.get_total_flops() // 2)
    return counts[0], counts[1]


def _num_trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
