"""Swin Transformers: the official files and timm's, which merges patches at a stage's start instead of its end."""

import re
from collections.abc import Mapping, Set

from torch import Tensor

from ssat_probe.formats import Converted

_BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table")


def matches(names: Set[str]) -> bool:
    """Whether these are the names of a Swin Transformer, of version 1 or 2.

    Args:
        names: Of a state dict.

    Returns:
        True for ``patch_embed.proj`` and ``layers.0.blocks.0.attn.qkv`` at the top.
    """
    return {"patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"} <= names


def convert(state: Mapping[str, Tensor]) -> Converted:
    """Names as timm's; tables that the model makes itself are dropped.

    Args:
        state: Tensors by name.

    Returns:
        With the head where there is one.
    """
    dropped = {name: "made by the model itself" for name in state if name.endswith(_BUFFERS)}
    dropped |= {name: "used by masked pre-training alone" for name in state if name == "mask_token"}
    kept = {name: value for name, value in state.items() if name not in dropped}
    if "layers.0.downsample.reduction.weight" in state:  # the official order: a stage ends with its merging
        kept = {_moved(name): value for name, value in kept.items()}
    return Converted(kept, dropped=dropped, norm_eps=1e-5)


def _moved(name: str) -> str:
    name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + 1}.downsample.", name)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)
