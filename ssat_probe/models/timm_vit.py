"""Any plain Vision Transformer of timm's by name, with a masked pass: timm:NAME, or timm:NAME?pretrained."""

from contextlib import nullcontext
from typing import Any

import timm
import torch
from jaxtyping import Bool, Float
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssat_probe.hub import fetching
from ssat_probe.patch_encoder import PatchEncoder
from ssat_probe.patches import Features, grid_of, taken, visible_ids_of

PREFIX = "timm:"
VARIANTS: dict[str, dict[str, Any]] = {}
"None in a table: timm's own names."

DECODER = (2, 128, 16)
"Depth, width and heads: Das et al. (2024), for tiny and small."


class Model(PatchEncoder, VisionTransformer):  # type: ignore[misc]  # no attention mask
    """A Vision Transformer of timm's: its weights, its full pass, and a masked pass that leaves hidden patches out."""

    def __init__(
        self,
        *,
        name: str,
        img_size: tuple[int, ...] = (),
        patch_size: tuple[int, ...] = (),
        channels: int = 3,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        is_pretrained: bool = False,
        keeps_hidden: bool = False,
    ) -> None:
        """Make the model, with fresh weights from torch's global generator or with those of timm's hub.

        Args:
            name: As timm knows it.
            img_size: Height and width of the images in pixels; empty means the model's own.
            patch_size: Height and width of a patch in pixels; empty means the model's own.
            channels: Channels of the images.
            num_classes: Classes of the head.
            drop_path: Chance that the last block's branches are skipped for an image in training.
            is_pretrained: Fetch the weights; positions and patches are resampled to the sizes that are asked for.
            keeps_hidden: Replace hidden patches by a mask token instead of leaving them out (Xie et al., 2022).

        Raises:
            ValueError: If timm has no such model, or it is no plain Vision Transformer, or cannot be made in this size.
        """
        nn.Module.__init__(self)
        if not timm.is_model(name):
            raise ValueError(f"model must be timm: and a name that timm {timm.__version__} knows, got {name!r}.")
        options: dict[str, Any] = {"in_chans": channels, "num_classes": num_classes, "drop_path_rate": drop_path}
        options |= {"img_size": img_size} if img_size else {}
        options |= {"patch_size": patch_size} if patch_size else {}
        if img_size and patch_size:
            grid_of(img_size, patch_size)
        try:
            with fetching(name) if is_pretrained else nullcontext():
                made = timm.create_model(name, pretrained=is_pretrained, **options)
        except (TypeError, AssertionError, RuntimeError, OSError) as error:
            said = str(error).strip().split("\n")[0] or type(error).__name__
            raise ValueError(f"{PREFIX}{name} must be made with {options}, but timm says: {said}") from error
        if type(made) is not VisionTransformer or made.global_pool not in ("token", "avg"):
            raise ValueError(
                f"model must be a plain Vision Transformer of timm's that classifies by class token or mean, got "
                f"{name!r}, a {type(made).__name__}; timm:vit_tiny_patch16_224 is one."
            )
        if not _embeds_apart(made.patch_embed):
            raise ValueError(
                f"model must embed each patch by itself, so that nothing hidden leaks, got {name!r}, whose "
                f"convolutions overlap patches; {PREFIX}vit_tiny_patch16_224 is one that does."
            )
        self.__dict__.update(made.__dict__)  # its parts are ours: this is the same class with one more method
        self.img_size, self.patch_size = made.patch_embed.img_size, made.patch_embed.patch_size
        self.channels, self.dim = channels, made.embed_dim
        self.grid = (int(made.patch_embed.grid_size[0]), int(made.patch_embed.grid_size[1]))
        self.num_tokens = self.grid[0] * self.grid[1]
        self.with_class_token, self.keeps_hidden = made.cls_token is not None, keeps_hidden
        if keeps_hidden:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, self.dim))
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def encoded(
        self, tokens: Float[Tensor, "batch *patches dim"], mask: Bool[Tensor, "batch token"] | None
    ) -> Features:
        """Features from embedded patches.

        Args:
            tokens: As ``patch_embed`` gives them.
            mask: True at the patches to hide, of which the blocks then see nothing; none for a full pass.

        Returns:
            The patch tokens after the final norm, and the class token where there is one; no register tokens.
        """
        if mask is not None and self.keeps_hidden:
            hidden = mask.to(tokens.device).reshape(*tokens.shape[:-1], 1)  # some models keep rows and columns here
            tokens = torch.where(hidden, self.mask_token.squeeze(0).to(tokens.dtype), tokens)
        tokens = self.norm_pre(self._pos_embed(tokens))
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        visible_ids = None
        if mask is not None and not self.keeps_hidden:
            visible_ids = visible_ids_of(mask).to(tokens.device)
            patches = taken(patches, visible_ids)
        tokens = torch.cat([prefix, patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        class_token = tokens[:, 0] if self.with_class_token else None
        kept = mask if self.keeps_hidden else None
        return Features(tokens[:, self.num_prefix_tokens :], class_token, self.grid, visible_ids, kept)

    def logits_of(self, features: Features) -> Float[Tensor, "batch class"]:
        """Logits from features, of a full or a masked pass.

        Args:
            features: Of this encoder.

        Returns:
            One logit per class: the head on the class token or on the mean of the visible patches, as timm has it.
        """
        pooled = features.class_token if self.global_pool == "token" else features.seen.mean(dim=1)
        return self.head(self.head_drop(self.fc_norm(pooled)))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers of the parameters by name, for learning rates that differ between layers; timm's convention.

        Args:
            coarse: Not used: there is one layer per block.

        Returns:
            Patterns: timm's own embedding with the mask token, the blocks, and after them norms and head.
        """
        stem = super().group_matcher(coarse)["stem"]
        return {"stem": rf"{stem}|^mask_token", "blocks": r"^blocks\.(\d+)", "end": r"^norm|^fc_norm|^head"}

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed though they be no vectors, as timm has it.

        Returns:
            Their names.
        """
        return super().no_weight_decay() | {"mask_token"}


def _embeds_apart(embedding: nn.Module) -> bool:
    """Whether what becomes of a patch depends on no other: one convolution without overlap, as hybrids do not have."""
    proj = getattr(embedding, "proj", None)
    if type(embedding) is not PatchEmbed or not isinstance(proj, nn.Conv2d):
        return False
    return proj.kernel_size == proj.stride and not any(proj.padding)


def default_patch_size(name: str) -> tuple[int, int]:
    """Patch size of a model when none is asked for.

    Args:
        name: As timm knows it.

    Returns:
        Height and width in pixels.
    """
    with torch.device("meta"), torch.random.fork_rng():
        height, width = Model(name=name).patch_size
    return int(height), int(width)
