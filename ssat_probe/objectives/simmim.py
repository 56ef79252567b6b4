"""SimMIM: hidden patches pass the encoder as mask tokens, one linear map predicts their pixels (Xie et al., 2022)."""

import dataclasses

from jaxtyping import Float, Int
from torch import Tensor, nn

from ssat_probe.losses import Losses
from ssat_probe.objectives import reconstruction
from ssat_probe.patches import Features
from ssat_probe.recipe import Recipe


class Objective(nn.Module):
    """Mean absolute error over the hidden patches, from an encoder that carries mask tokens and a linear decoder."""

    masks = True

    def __init__(self, recipe: Recipe, encoder: nn.Module, decoder: nn.Module | None) -> None:
        """Wrap the modules.

        Args:
            recipe: Gives the mask ratio and the kind of target.
            encoder: Encoder that keeps hidden patches; its head gets no gradient.
            decoder: Predicts the pixels; ``network.build_decoder`` gives this task the linear one.
        """
        super().__init__()
        absolute = dataclasses.replace(recipe, reconstruction_loss="l1")
        self.reconstruction = reconstruction.Objective(absolute, encoder, decoder)
        self.num_views = self.reconstruction.num_views

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        labels: Int[Tensor, " batch"],
        noise: Float[Tensor, "batch token"],
        other: Float[Tensor, "batch channel height width"] | None = None,
        features: Features | None = None,
    ) -> Losses:
        """Loss of a batch.

        Args:
            images: Normalised images.
            labels: Not used.
            noise: Uniform numbers that decide the masks.
            other: The images as they are to be predicted, where these are not the ones that go in.
            features: Of the masked pass, where they are known already.

        Returns:
            The mean reconstruction error.
        """
        return self.reconstruction(images, labels, noise, other, features)
