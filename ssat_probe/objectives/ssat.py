"""Classification and a self-supervised task at once, λ·CE + (1-λ)·task (Das et al., 2024)."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssat_probe import registry
from ssat_probe.losses import Losses
from ssat_probe.objectives import supervised
from ssat_probe.patches import Features, random_mask
from ssat_probe.recipe import Recipe


class Objective(nn.Module):
    """Convex combination of the cross-entropy and the loss of the recipe's task, by default masked reconstruction."""

    def __init__(self, recipe: Recipe, encoder: nn.Module, decoder: nn.Module | None) -> None:
        """Wrap the modules; a term of weight 0 is not in the graph.

        Args:
            recipe: Gives λ, which weighs the classification, the task, and what is classified.
            encoder: Encoder with its head, shared by both terms.
            decoder: What the task puts behind the encoder; not used when λ is 1.
        """
        super().__init__()
        self.recipe = recipe
        self.weight = recipe.lambda_ends[1]
        "λ; a schedule sets it before each step."
        self.supervised: Any = supervised.Objective(recipe, encoder) if max(recipe.lambda_ends) > 0 else None
        task = registry.load("objectives", recipe.task).Objective
        self.task: Any = task(recipe, encoder, decoder) if min(recipe.lambda_ends) < 1 else None
        self.num_views = self.task.num_views if self.task is not None else 1
        both = self.supervised is not None and self.task is not None
        mixes = recipe.mixup > 0 or recipe.cutmix > 0
        self.shares_pass = both and not mixes and task.masks == (recipe.cls_view == "masked")
        looks_twice = both and not mixes and task.masks and recipe.cls_view == "full"
        self.shares_embedding = looks_twice and hasattr(encoder, "encode_both")
        sees_parts = self.supervised is not None and recipe.cls_view == "masked"
        sees_parts = sees_parts and (self.task is None or task.masks)
        self.counts_apart = sees_parts and any(isinstance(module, _BatchNorm) for module in encoder.modules())
        "Whether batch norms would never see a whole image, which is what they are evaluated on."

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        labels: Int[Tensor, " batch"],
        noise: Float[Tensor, "batch token"],
        other: Float[Tensor, "batch channel height width"] | None = None,
    ) -> Losses:
        """Loss of a batch: both terms see the same augmented images, and share their pass where it is the same.

        Args:
            images: Normalised images.
            labels: Class of each.
            noise: Uniform numbers that decide the masks.
            other: The images augmented once more, for a task that looks at two views.

        Returns:
            The weighted total, the unweighted terms, and the logits.
        """
        classified, own = self.terms(images, labels, noise, other)
        if classified is None or own is None:
            only = classified or own
            assert only is not None
            return only
        total = self.weight * classified.total + (1 - self.weight) * own.total
        return Losses(total, classified.cross_entropy, own.reconstruction, classified.logits, own.auxiliary)

    def terms(
        self,
        images: Float[Tensor, "batch channel height width"],
        labels: Int[Tensor, " batch"],
        noise: Float[Tensor, "batch token"],
        other: Float[Tensor, "batch channel height width"] | None = None,
    ) -> tuple[Losses | None, Losses | None]:
        """Both losses of a batch, unweighted, each with its graph.

        Args:
            images: Normalised images.
            labels: Class of each.
            noise: Uniform numbers that decide the masks.
            other: The images augmented once more, for a task that looks at two views.

        Returns:
            Of the classification and of the task; none for one that has no weight.
        """
        seen, looked_at = self._features(images, noise)
        classified = self.supervised(images, labels, noise, features=seen) if self.supervised is not None else None
        if self.task is None:
            return classified, None
        return classified, self.task(images, labels, noise, other, looked_at)

    def _features(
        self, images: Float[Tensor, "batch channel height width"], noise: Float[Tensor, "batch token"]
    ) -> tuple[Features | None, Features | None]:
        """What is classified and what the task looks at, where a term does not make them itself."""
        is_masked = self.recipe.cls_view == "masked"
        if self.supervised is None or not (is_masked or self.shares_pass or self.shares_embedding):
            return None, None
        if self.counts_apart:
            with torch.no_grad():
                self.supervised.encoder.encode(images)
        mask = random_mask(noise, self.recipe.mask_ratio) if is_masked or self.shares_embedding else None
        if self.shares_embedding:
            return self.supervised.encoder.encode_both(images, mask)
        features = self.supervised.encoder.encode(images, mask)
        return features, features if self.shares_pass else None

    def after_step(self) -> None:
        """What the task does after each step of the optimiser, if anything."""
        if hasattr(self.task, "after_step"):
            self.task.after_step()
