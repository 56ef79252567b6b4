"""Shallow transformer decoder of masked autoencoders: two blocks, 128 wide in the paper (Das et al., 2024)."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssat_probe.patches import Features, sincos_positions, taken


class LastBlock(Block):
    """Block that is asked for its last tokens alone; all of them are attended to."""

    attn: Any
    mlp: Any
    norm1: Any
    norm2: Any

    def forward(  # type: ignore[override]  # timm's own options have no use here
        self, tokens: Float[Tensor, "batch token dim"], num_asked: int
    ) -> Float[Tensor, "batch asked dim"]:
        """What becomes of some tokens.

        Args:
            tokens: Of one width.
            num_asked: How many at the end are asked for.

        Returns:
            These, without the others.
        """
        attention, first = self.attn, tokens.shape[1] - num_asked
        parts = attention.qkv(self.norm1(tokens)).unflatten(2, (3, attention.num_heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        query, asked = query[:, :, first:], tokens[:, first:]
        if attention.fused_attn:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            attended = (query * attention.scale @ key.mT).softmax(dim=3) @ value
        asked = asked + attention.proj(attended.transpose(1, 2).flatten(2))
        return asked + self.mlp(self.norm2(asked))


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
        kinds = [Block] * (depth - 1) + [LastBlock]
        self.blocks = nn.ModuleList(kind(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm) for kind in kinds)
        self.norm = norm(width)
        self.pred = nn.Linear(width, patch_values)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: Features, *, hidden_only: bool = False) -> Float[Tensor, "batch chosen value"]:
        """Predicted pixels.

        Args:
            features: Of a masked pass.
            hidden_only: Leave out the patches that the encoder has seen, for which the last block then makes nothing.
                Without effect where ``features`` has a token for every patch.

        Returns:
            One row for every patch in raster order, or for every one of ``features.hidden_ids``, laid out as
            ``patches.patchify`` does.
        """
        tokens = self.embed(features.tokens)
        positions = self.pos_embed[0, self.num_prefix_tokens :]
        order, num_asked = None, features.grid[0] * features.grid[1]
        if features.visible_ids is None or self.mask_token is None:
            tokens = tokens + positions
        else:  # the hidden patches come last, where they can be cut off without a copy
            hidden = self.mask_token + positions[features.hidden_ids]
            tokens = torch.cat([tokens + positions[features.visible_ids], hidden], dim=1)
            if hidden_only:
                num_asked = hidden.shape[1]
            else:
                order = torch.cat([features.visible_ids, features.hidden_ids], dim=1).argsort(dim=1)
        if features.class_token is not None:
            class_token = self.embed(features.class_token)[:, None] + self.pos_embed[:, :1]
            tokens = torch.cat([class_token, tokens], dim=1)
        *others, last = self.blocks
        for block in others:
            tokens = block(tokens)
        predicted = self.pred(self.norm(last(tokens, num_asked)))
        return predicted if order is None else taken(predicted, order)
