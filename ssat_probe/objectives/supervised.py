"""Cross-entropy of the full image: training from scratch, and fine-tuning."""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssat_probe.losses import Losses
from ssat_probe.mixing import mix
from ssat_probe.patches import Features
from ssat_probe.recipe import Recipe


class Objective(nn.Module):
    """Cross-entropy with label smoothing on the class token of a full pass, in training perhaps of mixed images."""

    num_views = 1

    def __init__(self, recipe: Recipe, encoder: Any, decoder: nn.Module | None = None) -> None:
        """Wrap the modules.

        Args:
            recipe: Gives the label smoothing, and how images are mixed.
            encoder: Encoder with its head.
            decoder: Not used: there is none in the graph.
        """
        super().__init__()
        self.encoder, self.label_smoothing = encoder, recipe.label_smoothing
        self.mixup, self.cutmix = recipe.mixup, recipe.cutmix

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        labels: Int[Tensor, " batch"],
        noise: Float[Tensor, "batch token"],
        features: Features | None = None,
    ) -> Losses:
        """Loss of a batch.

        Args:
            images: Normalised images.
            labels: Class of each.
            noise: Not used: nothing is masked.
            features: What to classify instead, where the encoder has already made it of these images.

        Returns:
            The mean cross-entropy, and the logits unless the images were mixed and have no class of their own.
        """
        if features is None and self.training and (self.mixup or self.cutmix):
            mixed, others, share = mix(images, labels, mixup=self.mixup, cutmix=self.cutmix)
            logits = self.encoder(mixed)
            loss = share * self._loss(logits, labels) + (1 - share) * self._loss(logits, others)
            return Losses(loss, cross_entropy=loss.detach())
        logits = self.encoder(images) if features is None else self.encoder.logits_of(features)
        loss = self._loss(logits, labels)
        return Losses(loss, cross_entropy=loss.detach(), logits=logits.detach())

    def _loss(self, logits: Float[Tensor, "batch class"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
