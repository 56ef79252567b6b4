"""Patch encoder: passes of a network that embeds its patches first, each by itself, and hides some afterwards."""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from ssat_probe.patches import Features


class PatchEncoder:
    """What ViT, Swin and timm's ViTs share; each says itself what becomes of embedded patches and how it classifies."""

    patch_embed: Any
    "Of images; what it makes of a patch depends on no other."

    def encode(
        self,
        images: Float[Tensor, "batch channel height width"],
        mask: Bool[Tensor, "batch token"] | None = None,
    ) -> Features:
        """Features of the images, or of their visible patches alone.

        Args:
            images: Normalised images.
            mask: True at the patches to hide, of which the blocks then see nothing, or a mask token in the place of
                each; none for a full pass. Best on the CPU, where counting the visible ones waits for nothing.

        Returns:
            The tokens after the final norm.
        """
        return self.encoded(self.patch_embed(images), mask)

    def encode_both(
        self, images: Float[Tensor, "batch channel height width"], mask: Bool[Tensor, "batch token"]
    ) -> tuple[Features, Features]:
        """Features of a full and of a masked pass, whose patches are embedded once.

        Args:
            images: Normalised images.
            mask: True at the patches to hide.

        Returns:
            What `encode` gives without and with the mask.
        """
        embedded = self.patch_embed(images)
        return self.encoded(embedded, None), self.encoded(embedded, mask)

    def encoded(self, tokens: Float[Tensor, "batch *place dim"], mask: Bool[Tensor, "batch token"] | None) -> Features:
        """Features from embedded patches.

        Args:
            tokens: As ``patch_embed`` gives them.
            mask: True at the patches to hide; none for a full pass.

        Returns:
            The tokens after the final norm.
        """
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
        """Logits of a full pass.

        Args:
            images: Normalised images.

        Returns:
            One logit per class.
        """
        return self.logits_of(self.encode(images))

    def logits_of(self, features: Features) -> Float[Tensor, "batch class"]:
        """Logits from features, of a full or a masked pass.

        Args:
            features: Of this encoder.

        Returns:
            One logit per class.
        """
        raise NotImplementedError
