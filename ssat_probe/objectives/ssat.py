"""Classification and masked reconstruction at once, λ·CE + (1-λ)·MSE (Das et al., 2024)."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from ssat_probe.losses import Losses
from ssat_probe.objectives import reconstruction, supervised
from ssat_probe.recipe import Recipe


class Objective(nn.Module):
    """Convex combination of the cross-entropy of a full pass and the reconstruction error of a masked one."""

    def __init__(self, recipe: Recipe, encoder: nn.Module, decoder: nn.Module | None) -> None:
        """Wrap the modules; a term of weight 0 is not in the graph.

        Args:
            recipe: Gives λ, which weighs the classification.
            encoder: Encoder with its head, shared by both passes.
            decoder: Predicts the pixels; not used when λ is 1.
        """
        super().__init__()
        self.lambda_weight = recipe.lambda_weight
        self.supervised: Any = supervised.Objective(recipe, encoder) if recipe.lambda_weight > 0 else None
        self.reconstruction: Any = (
            reconstruction.Objective(recipe, encoder, decoder) if recipe.lambda_weight < 1 else None
        )

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        labels: Int[Tensor, " batch"],
        noise: Float[Tensor, "batch token"],
    ) -> Losses:
        """Loss of a batch: both passes see the same augmented images.

        Args:
            images: Normalised images.
            labels: Class of each.
            noise: Uniform numbers that decide the masks.

        Returns:
            The weighted total, the unweighted terms, and the logits of the full pass.
        """
        if self.supervised is None:
            return self.reconstruction(images, labels, noise)
        if self.reconstruction is None:
            return self.supervised(images, labels, noise)
        full = self.supervised(images, labels, noise)
        masked = self.reconstruction(images, labels, noise)
        total = self.lambda_weight * full.total + (1 - self.lambda_weight) * masked.total
        return Losses(total, full.cross_entropy, masked.reconstruction, full.logits)
