"""Swin Transformer of timm's, masked as SimMIM does: mask tokens after the patch embedding (Liu et al., 2021)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from ssat_probe.patch_encoder import PatchEncoder
from ssat_probe.patches import Features

# swin_tiny: Liu et al. (2021), Sec. 3.3. The others are ours: swin_mini is swin_tiny without its last stage and with
# windows of 4, whose total stride of 8 leaves 32 to 64 pixels 4x4 to 8x8 patches to hide; swin_nano is for 8x8 digits.
VARIANTS = {
    "swin_nano": {"dim": 12, "depths": (2, 2), "heads": (2, 4), "window": 2, "decoder": (2, 16, 4)},
    "swin_mini": {"dim": 96, "depths": (2, 2, 6), "heads": (3, 6, 12), "window": 4, "decoder": (2, 128, 16)},
    "swin_tiny": {"dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "window": 7, "decoder": (2, 128, 16)},
}

KEEPS_HIDDEN = True
"Hidden patches always pass the blocks as mask tokens, whatever the task."


def default_patch_size(img_size: tuple[int, ...]) -> tuple[int, int]:
    """Size of the embedded patches when none is asked for: 4 pixels from 128 on, 2 from 24, else 1.

    Args:
        img_size: Height and width in pixels.

    Returns:
        Height and width of a patch. What is hidden are the patches of the last stage: 2^(stages - 1) times as large.
    """
    smaller = min(img_size)
    side = 4 if smaller >= 128 else 2 if smaller >= 24 else 1
    return side, side


class Model(PatchEncoder, SwinTransformer):
    """timm's Swin Transformer with a mask token; all other weights have timm's names and shapes.

    A masked pass hides patches of the last stage's grid, so that nothing visible shares a token with anything hidden at
    any stage, and takes as long as a full one. There is no class token: the head looks at the mean of the tokens, in a
    masked pass at that of the visible ones.
    """

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        channels: int,
        num_classes: int,
        dim: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        window: int,
        drop_path: float = 0.0,
    ) -> None:
        """Make the model with fresh weights, from torch's global generator.

        Args:
            img_size: Height and width of the images in pixels.
            patch_size: Height and width of an embedded patch in pixels.
            channels: Channels of the images.
            num_classes: Classes of the head.
            dim: Width of the first stage; each further one is twice as wide and has half as many rows and columns.
            depths: Blocks of each stage.
            heads: Attention heads of each stage.
            window: Rows and columns of an attention window, in tokens; a smaller grid is one window.
            drop_path: Chance that the last block's branches are skipped for an image in training.

        Raises:
            ValueError: If the total stride does not divide the image.
        """
        self.ratio = 2 ** (len(depths) - 1)
        stride = (patch_size[0] * self.ratio, patch_size[1] * self.ratio)
        if img_size[0] % stride[0] or img_size[1] % stride[1]:
            raise ValueError(
                f"patch_size times {self.ratio}, the total stride of this Swin's {len(depths)} stages, must divide the "
                f"image of {img_size[0]}x{img_size[1]} pixels, got {patch_size[0]}x{patch_size[1]}; choose another "
                "patch_size or img_size."
            )
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,  # type: ignore[arg-type]  # takes pairs
            in_chans=channels,
            num_classes=num_classes,
            embed_dim=dim,
            depths=depths,
            num_heads=heads,
            window_size=window,
            drop_path_rate=drop_path,
        )
        self.img_size, self.patch_size, self.channels, self.dim = img_size, patch_size, channels, self.num_features
        self.grid = (img_size[0] // stride[0], img_size[1] // stride[1])
        self.num_tokens = self.grid[0] * self.grid[1]
        self.with_class_token, self.keeps_hidden = False, KEEPS_HIDDEN
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = Block
                module._init_buffers()

    def encoded(
        self, tokens: Float[Tensor, "batch row column dim"], mask: Bool[Tensor, "batch token"] | None
    ) -> Features:
        """Features from embedded patches.

        Args:
            tokens: As ``patch_embed`` gives them.
            mask: True at the patches to hide, each of which is a mask token in the blocks; none for a full pass.

        Returns:
            The tokens of the last stage after the final norm, the hidden ones among them.
        """
        if mask is not None:
            hidden = mask.to(tokens.device).unflatten(1, self.grid)[..., None]
            hidden = hidden.repeat_interleave(self.ratio, 1).repeat_interleave(self.ratio, 2)
            tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
        return Features(self.norm(self.layers(tokens)).flatten(1, 2), None, self.grid, None, mask)

    def logits_of(self, features: Features) -> Float[Tensor, "batch class"]:
        """Logits from features, of a full or a masked pass.

        Args:
            features: Of this encoder.

        Returns:
            One logit per class.
        """
        tokens = features.seen
        return self.head(tokens.unflatten(1, self.grid) if features.hidden is None else tokens[:, None])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers of the parameters by name, for learning rates that differ between layers; timm's convention.

        Args:
            coarse: One layer per stage instead of one per block.

        Returns:
            Patterns: the embedding, the blocks with the merging before them, and after them norm and head.
        """
        blocks = r"^layers\.(\d+)" if coarse else [(r"^layers\.(\d+)\.downsample", (0,)),  # as block 0
                                                   (r"^layers\.(\d+)\.blocks\.(\d+)", None)]  # fmt: skip
        return {"stem": r"^patch_embed|^mask_token", "blocks": blocks, "end": r"^norm|^head"}

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed though they be no vectors, as in the code of Swin and SimMIM.

        Returns:
            Their names.
        """
        return super().no_weight_decay() | {"mask_token"}


class Block(SwinTransformerBlock):
    """timm's block with attention masks that are right at any resolution.

    Where windows do not divide the grid, timm (1.0.31) shifts the tokens first and pads them afterwards, and takes its
    mask from where the seam would be without padding: tokens from opposite borders then attend to each other, and real
    tokens to padding. Here the padding comes first, as in Liu et al.'s code, and is attended to by padding alone. Where
    windows divide the grid both are the same.
    """

    pads_first = True
    "For whoever asks which token is in which window."

    def get_attn_mask(
        self, x: Tensor | None = None, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "window query key"] | None:
        """What is added to the scores: 0 where a token may attend, minus infinity where not; none if all may.

        Args:
            x: Not used: the size of the images does not change.
            device: Of the result.
            dtype: Of the result.

        Returns:
            For every window of an image, in raster order.
        """
        grid: Any = self.input_resolution
        allowed = attention_mask(grid, self.window_size, self.shift_size)
        if bool(allowed.all()):
            return None
        scores = torch.zeros(allowed.shape, dtype=dtype, device="cpu").masked_fill(~allowed, float("-inf"))
        return scores.to(device)

    def _attn(self, x: Float[Tensor, "batch row column dim"]) -> Float[Tensor, "batch row column dim"]:
        """Attention within windows: pad, shift, partition, and all of it back."""
        num_rows, num_columns = x.shape[1:3]
        back = (self.shift_size[0], self.shift_size[1])
        x = F.pad(x, (0, 0, 0, -num_columns % self.window_size[1], 0, -num_rows % self.window_size[0]))
        padded = x.shape[1:3]
        x = torch.roll(x, (-back[0], -back[1]), dims=(1, 2)) if any(back) else x
        windows = window_partition(x, self.window_size).flatten(1, 2)
        windows = self.attn(windows, mask=self.attn_mask)
        x = window_reverse(windows.unflatten(1, self.window_size), self.window_size, *padded)
        x = torch.roll(x, back, dims=(1, 2)) if any(back) else x
        return x[:, :num_rows, :num_columns]


def attention_mask(
    grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
) -> Bool[Tensor, "window query key"]:
    """Which tokens may attend to which, within each window of a padded and shifted grid.

    Args:
        grid: Rows and columns of tokens.
        window: Rows and columns of a window.
        shift: Rows and columns by which the windows are shifted; less than ``window``.

    Returns:
        True where the key lies in the query's window of the unrolled grid and neither is padding; padding attends to
        padding, so that no row is empty. Windows in raster order, on the CPU.
    """
    regions = []
    for size, side, by in zip(grid, window, shift, strict=True):
        padded = size + -size % side
        place = torch.arange(padded, device="cpu").roll(-by)  # where each row was before it was shifted
        seam = torch.arange(padded, device="cpu") >= padded - by  # those that came around
        regions.append(torch.where(place < size, seam.long(), 2))
    rows, columns = torch.meshgrid(*regions, indexing="ij")
    kinds = torch.where((rows == 2) | (columns == 2), 4, 2 * rows + columns)
    kinds = window_partition(kinds[None, :, :, None], (window[0], window[1])).flatten(1)
    return kinds[:, :, None] == kinds[:, None, :]
