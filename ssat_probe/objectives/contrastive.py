"""Contrast of two views of each image with those of all others in the batch (Chen et al., 2020: SimCLR)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssat_probe.losses import Losses
from ssat_probe.patches import Features
from ssat_probe.recipe import Recipe
from ssat_probe.sharing import share_of, whole

TEMPERATURE = 0.5
"Of the similarities: Chen et al. (2020), App. B.9, for CIFAR-10, which is trained on small batches of small images."


class Head(nn.Module):
    """Two linear maps with a ReLU between them: where the contrast is taken, and thrown away afterwards."""

    def __init__(self, encoder: Any) -> None:
        """Make the head with fresh weights, from torch's global generator.

        Args:
            encoder: Whose features are projected, to its own width.
        """
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(encoder.dim, encoder.dim), nn.Linear(encoder.dim, encoder.dim)

    def forward(self, summary: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Projection of each image.

        Args:
            summary: Of the encoder's features.

        Returns:
            Of any length.
        """
        return self.fc2(self.fc1(summary).relu())


class Objective(nn.Module):
    """NT-Xent of two augmented views; negatives are the other images of the batch, in whichever process."""

    num_views = 2
    masks = False

    def __init__(self, recipe: Recipe, encoder: Any, decoder: nn.Module | None) -> None:
        """Wrap the modules.

        Args:
            recipe: Not used.
            encoder: Encoder; its head gets no gradient.
            decoder: A ``Head``.

        Raises:
            ValueError: If there is no head.
        """
        super().__init__()
        if not isinstance(decoder, Head):
            raise ValueError(f"The contrastive task needs its Head, got {type(decoder).__name__}; make one first.")
        self.encoder, self.projection = encoder, decoder

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        labels: Int[Tensor, " batch"],
        noise: Float[Tensor, "batch token"],
        other: Float[Tensor, "batch channel height width"],
        features: Features | None = None,
    ) -> Losses:
        """Loss of a batch.

        Args:
            images: Normalised images.
            labels: Not used.
            noise: Not used: nothing is masked.
            other: The same images, augmented once more.
            features: Of a full pass of ``images``, where they are known already.

        Returns:
            The mean contrastive loss.
        """
        features = self.encoder.encode(images) if features is None else features
        first, second = (self.projection(one.summary) for one in (features, self.encoder.encode(other)))
        loss = nt_xent(first, second, TEMPERATURE)
        return Losses(loss, auxiliary=loss.detach())


def nt_xent(
    first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"], temperature: float
) -> Float[Tensor, ""]:
    """Normalised temperature-scaled cross-entropy: each view must find its partner among all other views.

    Args:
        first: Projections of one view of each image.
        second: Of the other view.
        temperature: Divides the cosine similarities.

    Returns:
        Mean over both views in nats, at least in float32; log(2·batch - 1) where all views are alike. Where processes
        share a batch, that of a process's images among those of all.

    References:
        Chen et al. (2020), Eq. 1, https://arxiv.org/abs/2002.05709.
    """
    views = torch.cat([first, second])
    views = F.normalize(views.float() if views.dtype in (torch.float16, torch.bfloat16) else views, dim=1)
    with torch.autocast("cpu" if views.is_meta else views.device.type, enabled=False):
        everyone = torch.cat([whole(view) for view in views.chunk(2)])
        scores = views @ everyone.T / temperature
    share = share_of(len(first))
    places = torch.arange(len(everyone), device=views.device)
    own, partners = (share.of(one.view(2, -1).T).T.flatten() for one in (places, places.roll(share.total)))
    return F.cross_entropy(scores.masked_fill(places == own[:, None], float("-inf")), partners)
