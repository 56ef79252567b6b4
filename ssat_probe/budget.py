"""What a run costs before it starts: parameters, multiply-adds, steps and images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ssat_probe import objectives, registry
from ssat_probe.images import Facts
from ssat_probe.network import Encoder, build_encoder
from ssat_probe.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """Cost of a stage."""

    name: str
    epochs: int
    steps: int
    images: int
    multiply_adds_per_image: int
    "Of all forward passes of a step."
    training_multiply_adds_per_image: int
    "Of all forward and backward passes of a step, as torch makes them: products with weights and with activations."

    @property
    def training_multiply_adds(self) -> int:
        """Multiply-adds of all passes of the stage, forward and backward."""
        return self.images * self.training_multiply_adds_per_image


@dataclass(frozen=True)
class Budget:
    """Cost of a run, known before it starts."""

    encoder_parameters: int
    "Trainable ones, with the head."
    decoder_parameters: int
    "Trainable ones of what the task puts behind the encoder; 0 where the run has no task."
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
    def training_multiply_adds(self) -> int:
        """Multiply-adds of all passes over all stages, forward and backward."""
        return sum(stage.training_multiply_adds for stage in self.stages)

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
    with torch.device("meta"):
        encoder = build_encoder(recipe, facts)
        behind = objectives.behind_encoder(recipe, facts, encoder)
        cost = {stage: _multiply_adds(recipe, facts, stage, encoder, behind) for stage in recipe.stage_epochs}
    steps = steps_per_epoch(num_images, recipe.batch_size)
    images = steps * min(recipe.batch_size, num_images)
    return Budget(
        _num_trainable(encoder),
        _num_trainable(behind) if behind is not None else 0,
        tuple(
            Stage(name, epochs, epochs * steps, epochs * images, *cost[name])
            for name, epochs in recipe.stage_epochs.items()
        ),
    )


def _multiply_adds(
    recipe: Recipe, facts: Facts, stage: str, encoder: Encoder, behind: nn.Module | None
) -> tuple[int, int]:
    """Multiply-adds of an image in a stage's loss, all passes together; and with those of its gradient."""
    objective = registry.load("objectives", objectives.name_of(recipe, stage)).Objective(recipe, encoder, behind).eval()
    images = torch.empty(recipe.batch_size, facts.channels, *recipe.img_size)
    labels = torch.zeros(recipe.batch_size, dtype=torch.int64)
    noise = torch.linspace(0, 1, encoder.num_tokens, device="cpu").expand(recipe.batch_size, -1)
    views = {"other": images} if objective.num_views == 2 else {}
    counting = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _of_both_gradients})
    with counting as counter, sdpa_kernel(SDPBackend.MATH):
        loss = objective(images, labels, noise, **views).total
        forward = counter.get_total_flops()
        loss.backward()
    both = counter.get_total_flops()
    return forward // 2 // recipe.batch_size, both // 2 // recipe.batch_size


def _of_both_gradients(
    gradient: Sequence[int], images: Sequence[int], weight: Sequence[int], *options: Any, **_: Any
) -> int:
    """Operations of a convolution's backward pass, by shapes, in groups too.

    torch (2.14) counts the gradient of grouped weights as if they were whole: 64 times as many for 64 channels apart.

    Returns:
        Twice the multiply-adds, as torch counts.
    """
    is_transposed, is_wanted = options[4], options[7]  # of input, weight and bias
    return conv_flop_count(list(images), list(weight), list(gradient), transposed=is_transposed) * sum(is_wanted[:2])


def _num_trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
