"""Convolutional vision Transformer with a class token in its last stage, masked in pixel space (Wu et al., 2021)."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from ssat_probe.cvt_blocks import Block, Embedding
from ssat_probe.masked_convolution import Visible, at_stage, shown
from ssat_probe.patches import Features, taken, visible_ids_of

# cvt_13: Wu et al. (2021), Table 2. cvt_nano is ours, for 8x8 digits.
VARIANTS = {
    "cvt_nano": {"dims": (8, 16, 24), "depths": (1, 1, 2), "heads": (1, 2, 3), "mlp_ratio": 2, "decoder": (2, 16, 4)},
    "cvt_13": {
        "dims": (64, 192, 384),
        "depths": (1, 2, 10),
        "heads": (1, 3, 6),
        "mlp_ratio": 4,
        "decoder": (2, 128, 16),
    },
}

KEEPS_HIDDEN = True
"Hidden patches pass the blocks as mask tokens whatever the task, unless convolutions are masked."

MASKED_CONVOLUTIONS = True
"It can be asked for."


def default_patch_size(img_size: tuple[int, ...]) -> tuple[int, int]:
    """Stride of the first embedding when none is asked for: 4 pixels from 128 on, 2 from 24, else 1.

    Args:
        img_size: Height and width in pixels.

    Returns:
        Height and width. What is hidden are the patches of the last stage: four times as large.
    """
    smaller = min(img_size)
    side = 4 if smaller >= 128 else 2 if smaller >= 24 else 1
    return side, side


class Model(nn.Module):
    """Convolutional vision Transformer; its weights have the names and shapes of Microsoft's.

    A masked pass sets the hidden pixels to 0, the mean colour, before the first of the overlapping convolutions, so
    that nothing of them leaks into visible tokens, and puts a mask token in their places after it; it takes as long as
    a full pass, and leaves the running statistics of the batch norms alone. With masked convolutions hidden places
    carry nothing through any of the stages instead, no query looks at them, and only visible tokens come out.

    Not lucidrains' variant of the same name, which has no class token.

    References:
        Wu et al. (2021), https://arxiv.org/abs/2103.15808.
    """

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        channels: int,
        num_classes: int,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        mlp_ratio: int | float = 4,
        drop_path: float = 0.0,
        masked_convolutions: bool = False,
    ) -> None:
        """Make the model with fresh weights, from torch's global generator.

        Args:
            img_size: Height and width of the images in pixels.
            patch_size: Stride of the first embedding in pixels; its kernel is 2 * stride - 1 wide (7 for 4).
            channels: Channels of the images.
            num_classes: Classes of the head.
            dims: Width of each stage.
            depths: Blocks of each stage.
            heads: Attention heads of each stage.
            mlp_ratio: Width of the hidden layer of an MLP in units of the stage's width.
            drop_path: Chance that the last block's branches are skipped for an image in training; the other blocks of
                the last stage have their share of it, the stages before none, as in the paper.
            masked_convolutions: Leave hidden places out of convolutions and attention, as ConvMAE does.

        Raises:
            ValueError: If the total stride does not divide the image.
        """
        super().__init__()
        self.ratio = 2 ** (len(dims) - 1)
        stride = (patch_size[0] * self.ratio, patch_size[1] * self.ratio)
        if img_size[0] % stride[0] or img_size[1] % stride[1]:
            raise ValueError(
                f"patch_size times {self.ratio}, the total stride of CvT, must divide the image of "
                f"{img_size[0]}x{img_size[1]} pixels, got {patch_size[0]}x{patch_size[1]}; choose another patch_size "
                "or img_size."
            )
        self.img_size, self.patch_size, self.channels, self.dim = img_size, patch_size, channels, dims[-1]
        self.stride, self.grid = stride, (img_size[0] // stride[0], img_size[1] // stride[1])
        self.num_tokens = self.grid[0] * self.grid[1]
        self.num_prefix_tokens = (0, 0, 1)  # by stage
        self.with_class_token, self.keeps_hidden = True, not masked_convolutions
        self.num_stages = len(dims)
        for number in range(self.num_stages):
            is_last = number == self.num_stages - 1
            rates: Any = calculate_drop_path_rates(drop_path if is_last else 0.0, depths[number])
            stage = Stage(
                dims[number - 1] if number else channels,
                dims[number],
                patch_size if number == 0 else (2, 2),
                heads[number],
                mlp_ratio,
                rates,
                with_class_token=is_last,
            )
            self.add_module(f"stage{number}", stage)
        # Batch norms need two values of each channel; keys are on every second place of the last stage.
        self.least_images = 2 if max(self.grid) <= 2 else 1
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        self.mask_token = None if masked_convolutions else nn.Parameter(torch.zeros(1, dims[0], 1, 1))
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.apply(_init_weights)

    def encode(
        self,
        images: Float[Tensor, "batch channel height width"],
        mask: Bool[Tensor, "batch token"] | None = None,
    ) -> Features:
        """Features of the images, or of their visible patches alone.

        Args:
            images: Normalised images.
            mask: True at the patches to hide, whose pixels are not looked at; none for a full pass.

        Returns:
            The tokens of the last stage after the final norm, the hidden ones among them; without them if convolutions
            are masked.
        """
        counts = mask is None
        hidden = visible = None
        # On the CPU, as a mask should be, asking waits for nothing; a pass that hides nothing is then a dense one.
        leaves_out = mask is not None and not self.keeps_hidden and bool(mask.any())
        if mask is not None:
            hidden = mask.to(images.device).unflatten(1, self.grid)[:, None]
            images = torch.where(_enlarged(hidden, self.stride), 0.0, images)
        first: Any = self.stage0
        maps, class_token = first.embedded(images), None
        if hidden is not None and self.mask_token is not None:
            maps = torch.where(_enlarged(hidden, (self.ratio, self.ratio)), self.mask_token.to(maps.dtype), maps)
        for number in range(self.num_stages):
            stage: Any = getattr(self, f"stage{number}")
            maps = stage.embedded(shown(maps, visible)) if number else maps
            if hidden is not None and leaves_out:
                visible = at_stage(~hidden, 2 ** (self.num_stages - 1 - number))
            maps, class_token = stage(maps, counts, visible)
        assert class_token is not None
        tokens = self.norm(torch.cat([class_token, maps.flatten(2).mT], dim=1))
        if mask is None or self.keeps_hidden:
            return Features(tokens[:, 1:], tokens[:, 0], self.grid, None)
        visible_ids = visible_ids_of(mask).to(images.device)
        return Features(taken(tokens[:, 1:], visible_ids), tokens[:, 0], self.grid, visible_ids)

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch class"]:
        """Logits of a full pass: the head on the class token.

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
        return self.head(features.class_token)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers of the parameters by name, for learning rates that differ between layers; timm's convention.

        Args:
            coarse: One layer per stage instead of one per block.

        Returns:
            Patterns: the first embedding, the blocks with the embeddings before them, and after them norm and head.
        """
        blocks = r"^stage(\d+)" if coarse else [(r"^stage(\d+)\.(?:patch_embed|cls_token)", (0,)),  # as block 0
                                               (r"^stage(\d+)\.blocks\.(\d+)", None)]  # fmt: skip
        return {"stem": r"^stage0\.patch_embed|^mask_token", "blocks": blocks, "end": r"^norm|^head"}

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed though they be no vectors, as in Microsoft's code.

        Returns:
            Their names.
        """
        return {f"stage{self.num_stages - 1}.cls_token", "mask_token"}


class Stage(nn.Module):
    """An overlapping convolutional embedding, then blocks; a class token joins in the last stage."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: tuple[int, int],
        heads: int,
        mlp_ratio: int | float,
        drop_paths: list[float],
        *,
        with_class_token: bool,
    ) -> None:
        """Make the stage with fresh weights.

        Args:
            in_dim: Channels that come in.
            dim: Width.
            stride: Of the embedding, in rows and columns of what comes in.
            heads: Attention heads of a block.
            mlp_ratio: Width of the hidden layer of an MLP in units of ``dim``.
            drop_paths: Chance to skip a branch of each block; there are as many blocks.
            with_class_token: Put a class token in front.
        """
        super().__init__()
        self.patch_embed = Embedding(in_dim, dim, stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if with_class_token else None
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, chance) for chance in drop_paths)

    def embedded(
        self, maps: Float[Tensor, "batch in_channel in_row in_column"]
    ) -> Float[Tensor, "batch channel row column"]:
        """Fewer and wider tokens, before the blocks.

        Args:
            maps: What comes in.

        Returns:
            Tokens as a map.
        """
        return self.patch_embed(maps)

    def forward(
        self, maps: Float[Tensor, "batch channel row column"], counts: bool, visible: Visible | None = None
    ) -> tuple[Float[Tensor, "batch channel row column"], Float[Tensor, "batch 1 channel"] | None]:
        """Tokens after the blocks.

        Args:
            maps: What ``embedded`` gave.
            counts: Batch norms take this pass into their running statistics.
            visible: Places that convolutions and queries look at; none for all.

        Returns:
            The tokens as a map, and the class token if there is one.
        """
        grid, tokens = maps.shape[2:], maps.flatten(2).mT
        num_prefix = 0
        if self.cls_token is not None:
            num_prefix = 1
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens, (grid[0], grid[1]), counts, visible)
        maps = tokens[:, num_prefix:].mT.unflatten(2, grid)
        return maps, tokens[:, :1] if num_prefix else None


def _enlarged(hidden: Bool[Tensor, "batch 1 row column"], by: tuple[int, int]) -> Bool[Tensor, "batch 1 height width"]:
    return hidden.repeat_interleave(by[0], 2).repeat_interleave(by[1], 3)


def _init_weights(module: nn.Module) -> None:
    """As in Microsoft's code: linear weights of standard deviation 0.02, zero biases; the rest is torch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
