"""Shallow transformer decoder of masked autoencoders: two blocks, 128 wide in the paper (Das et al., 2024)."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssat_probe.patches import Features, sincos_positions


class Decoder(nn.Module):
    """Transformer that predicts the pixels of every patch from the tokens of the visible ones."""

    def __init__(
        self,
        *,
        encoder_dim: int,
        grid: tuple[int, int],
        patch_values: int,
        depth: int,
        width: int,
        heads: int,
        with_class_token: bool = True,
        keeps_hidden: bool = False,
    ) -> None:
        """Make the decoder with fresh weights, from torch's global generator.

        Args:
            encoder_dim: Width of the encoder's tokens.
            grid: Rows and columns of patches.
            patch_values: Values of a patch: height * width * channels.
            depth: Blocks.
            width: Width of the blocks, a multiple of 4 and of ``heads``.
            heads: Attention heads of a block.
            with_class_token: The encoder has a class token, which then takes part in the attention.
            keeps_hidden: The encoder gives a token for every patch, so there is no mask token here.

        Raises:
            ValueError: If ``heads`` does not divide ``width``.
        """
        super().__init__()
        if width % heads:
            raise ValueError(f"decoder_width must be a multiple of decoder_heads {heads}, got {width}; change either.")
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.num_prefix_tokens = int(with_class_token)
        self.embed = nn.Linear(encoder_dim, width)
        self.mask_token = None if keeps_hidden else nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(width, grid, with_class_token)[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(width)
        self.pred = nn.Linear(width, patch_values)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: Features) -> Float[Tensor, "batch token value"]:
        """Predicted pixels of every patch, hidden or not.

        Args:
            features: Of a masked pass.

        Returns:
            In raster order, laid out as ``patches.patchify`` does.
        """
        visible = self.embed(features.tokens)
        tokens = visible
        if features.visible_ids is not None and self.mask_token is not None:
            num_tokens = features.grid[0] * features.grid[1]
            ids = features.visible_ids[:, :, None].expand(-1, -1, visible.shape[2])
            hidden = self.mask_token.to(visible.dtype).expand(len(visible), num_tokens, -1)
            tokens = hidden.scatter(1, ids, visible)
        if features.class_token is not None:
            tokens = torch.cat([self.embed(features.class_token)[:, None], tokens], dim=1)
        tokens = tokens + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return self.pred(self.norm(tokens))[:, self.num_prefix_tokens :]
