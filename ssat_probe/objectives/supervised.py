"""Cross-entropy of the full image: training from scratch, and fine-tuning."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssat_probe.losses import Losses
from ssat_probe.recipe import Recipe


class Objective(nn.Module):
    """Cross-entropy with label smoothing on the class token of a full pass."""

    def __init__(self, recipe: Recipe, encoder: nn.Module, decoder: nn.Module | None = None) -> None:
        """Wrap the modules.

        Args:
            recipe: Gives the label smoothing.
            encoder: Encoder with its head.
            decoder: Not used: there is none in the graph.
        """
        super().__init__()
        self.encoder, self.label_smoothing = encoder, recipe.label_smoothing

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        labels: Int[Tensor, " batch"],
        noise: Float[Tensor, "batch token"],
    ) -> Losses:
        """Loss of a batch.

        Args:
            images: Normalised images.
            labels: Class of each.
            noise: Not used: nothing is masked.

        Returns:
            The mean cross-entropy and the logits.
        """
        logits = self.encoder(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return Losses(loss, cross_entropy=loss.detach(), logits=logits.detach())
