"""One linear map from each token to the pixels of its patch (Xie et al., 2022: SimMIM's prediction head)."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ssat_probe.patches import Features


class Decoder(nn.Module):
    """Linear map of every token: a 1x1 convolution and a pixel shuffle, with the pixels laid out as ``patchify`` does.

    For encoders that carry hidden patches through their blocks as mask tokens.

    References:
        Xie et al. (2022), Sec. 3.3, https://arxiv.org/abs/2111.09886.
    """

    def __init__(self, *, encoder_dim: int, patch_values: int, **_: Any) -> None:
        """Make the decoder with fresh weights, from torch's global generator.

        Args:
            encoder_dim: Width of the encoder's tokens.
            patch_values: Values of a patch: height * width * channels.
        """
        super().__init__()
        self.pred = nn.Linear(encoder_dim, patch_values)
        nn.init.xavier_uniform_(self.pred.weight)
        nn.init.zeros_(self.pred.bias)

    def forward(self, features: Features, *, hidden_only: bool = False) -> Float[Tensor, "batch token value"]:
        """Predicted pixels of every patch, hidden or not.

        Args:
            features: Of a masked pass.
            hidden_only: Without effect, as in every decoder whose encoder gives a token for each patch.

        Returns:
            In raster order, laid out as ``patches.patchify`` does.

        Raises:
            ValueError: If the encoder left the hidden patches out.
        """
        if features.visible_ids is not None:
            raise ValueError(
                f"The simmim decoder needs a token for each of the {features.grid[0] * features.grid[1]} patches, got "
                f"{features.tokens.shape[1]}; use the shallow decoder, or an encoder that carries mask tokens."
            )
        return self.pred(features.tokens)
