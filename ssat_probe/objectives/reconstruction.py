"""Masked reconstruction, the task of the paper: pixels of hidden patches (He et al., 2022)."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from ssat_probe.losses import Losses, reconstruction_error
from ssat_probe.patches import Features, random_mask
from ssat_probe.recipe import Recipe


class Objective(nn.Module):
    """Mean squared or absolute error over the hidden patches of a masked pass."""

    masks = True

    def __init__(self, recipe: Recipe, encoder: nn.Module, decoder: nn.Module | None) -> None:
        """Wrap the modules.

        Args:
            recipe: Gives the mask ratio and the kind of target.
            encoder: Encoder; its head gets no gradient.
            decoder: Predicts the pixels.

        Raises:
            ValueError: If there is no decoder.
        """
        super().__init__()
        if decoder is None:
            raise ValueError("Reconstruction needs a decoder, got none; build one with network.build_decoder.")
        self.encoder, self.decoder, self.recipe = encoder, decoder, recipe
        self.num_views = 2 if recipe.reconstruction_target == "clean" else 1

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
        mask = random_mask(noise, self.recipe.mask_ratio)
        error = reconstruction_error(
            self.encoder, self.decoder, images, mask, self.recipe.norm_pix, self.recipe.reconstruction_loss, features,
            other,
        )  # fmt: skip
        return Losses(error.mean(), reconstruction=error.mean().detach())
