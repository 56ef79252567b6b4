"""Vision Transformer with fixed positions and a class token, of timm's parts (Das et al., 2024; He et al., 2022)."""

from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssat_probe.patch_encoder import PatchEncoder
from ssat_probe.patches import Features, grid_of, sincos_positions, taken, visible_ids_of

# Widths, depths and heads: Touvron et al. (2021), Table 1, for tiny, small and base; Dosovitskiy et al. (2021), Table
# 1, for large and huge (there with patches of 14 pixels: --patch-size 14). Decoders: the official code of Das et al.
# (2024) for tiny and small. The first three are ours: vit_pico has some 3,000 parameters, so that the whole Hessian can
# be computed; vit_nano six blocks, so that depth can be looked at, in under 60,000; vit_tiny6 half of vit_tiny.
VARIANTS = {
    "vit_pico": {"dim": 12, "depth": 2, "heads": 3, "mlp_ratio": 2, "decoder": (1, 8, 2)},
    "vit_nano": {"dim": 32, "depth": 6, "heads": 4, "mlp_ratio": 2, "decoder": (2, 16, 4)},
    "vit_tiny6": {"dim": 192, "depth": 6, "heads": 3, "mlp_ratio": 4, "decoder": (2, 128, 16)},
    "vit_tiny": {"dim": 192, "depth": 12, "heads": 3, "mlp_ratio": 4, "decoder": (2, 128, 16)},
    "vit_small": {"dim": 384, "depth": 12, "heads": 6, "mlp_ratio": 4, "decoder": (2, 128, 16)},
    "vit_base": {"dim": 768, "depth": 12, "heads": 12, "mlp_ratio": 4, "decoder": (2, 128, 16)},
    "vit_large": {"dim": 1024, "depth": 24, "heads": 16, "mlp_ratio": 4, "decoder": (2, 128, 16)},
    "vit_huge": {"dim": 1280, "depth": 32, "heads": 16, "mlp_ratio": 4, "decoder": (2, 128, 16)},
}


def default_patch_size(img_size: tuple[int, ...]) -> tuple[int, int]:
    """Patch size when none is asked for: 16 pixels from 128 on, 8 from 64, 4 from 24, else 2.

    Args:
        img_size: Height and width in pixels.

    Returns:
        Height and width of a patch; 49 to 256 tokens on the usual squares (16 on 8x8).
    """
    smaller = min(img_size)
    side = 16 if smaller >= 128 else 8 if smaller >= 64 else 4 if smaller >= 24 else 2
    return side, side


class Model(PatchEncoder, nn.Module):
    """Vision Transformer; its weights have timm's names and shapes, so they interchange by name."""

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        channels: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: int | float = 4,
        drop_path: float = 0.0,
        keeps_hidden: bool = False,
    ) -> None:
        """Make the model with fresh weights, from torch's global generator.

        Args:
            img_size: Height and width of the images in pixels.
            patch_size: Height and width of a patch in pixels.
            channels: Channels of the images.
            num_classes: Classes of the head.
            dim: Width.
            depth: Blocks.
            heads: Attention heads of a block.
            mlp_ratio: Width of the hidden layer of an MLP in units of ``dim``.
            drop_path: Chance that the last block's branches are skipped for an image in training; block i of n has
                i / (n - 1) of it (Huang et al., 2016, https://arxiv.org/abs/1603.09382).
            keeps_hidden: Replace hidden patches by a mask token instead of leaving them out (Xie et al., 2022).
        """
        super().__init__()
        self.img_size, self.patch_size, self.channels, self.dim = img_size, patch_size, channels, dim
        self.grid = grid_of(img_size, patch_size)
        self.num_tokens = self.grid[0] * self.grid[1]
        self.num_prefix_tokens = 1
        self.with_class_token, self.keeps_hidden = True, keeps_hidden
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(img_size, patch_size, channels, dim)  # type: ignore[arg-type]  # takes pairs
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(
            sincos_positions(dim, self.grid, with_class_token=True)[None], requires_grad=False
        )
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm, drop_path=chance)
            for chance in np.linspace(0, drop_path, depth).tolist()
        )
        self.norm = norm(dim)
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.cls_token, std=0.02)
        self.apply(init_weights)
        if keeps_hidden:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def encoded(self, tokens: Float[Tensor, "batch token dim"], mask: Bool[Tensor, "batch token"] | None) -> Features:
        """Features from embedded patches.

        Args:
            tokens: As ``patch_embed`` gives them.
            mask: True at the patches to hide, of which the blocks then see nothing; none for a full pass.

        Returns:
            The tokens after the final norm.
        """
        if mask is not None and self.keeps_hidden:
            tokens = torch.where(mask.to(tokens.device)[:, :, None], self.mask_token.to(tokens.dtype), tokens)
        tokens = tokens + self.pos_embed[:, 1:]
        visible_ids = None
        if mask is not None and not self.keeps_hidden:
            visible_ids = visible_ids_of(mask).to(tokens.device)
            tokens = taken(tokens, visible_ids)
        class_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([class_token, tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return Features(tokens[:, 1:], tokens[:, 0], self.grid, visible_ids)

    def logits_of(self, features: Features) -> Float[Tensor, "batch class"]:
        """Logits from features, of a full or a masked pass.

        Args:
            features: Of this encoder.

        Returns:
            One logit per class.
        """
        return self.head(features.class_token)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers of the parameters by name, for learning rates that differ between layers; timm's convention.

        Args:
            coarse: Not used: there is one layer per block.

        Returns:
            Patterns: the embedding, the blocks, and after them norm and head.
        """
        return {
            "stem": r"^cls_token|^mask_token|^pos_embed|^patch_embed",
            "blocks": r"^blocks\.(\d+)",
            "end": r"^norm|^head",
        }


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform weights, a patch embedding being a linear map of its flattened patch, and zero biases.

    The bias of the patch embedding keeps torch's own initialisation, as in the official code.

    Args:
        module: Linear, convolution or LayerNorm; anything else is left alone.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
