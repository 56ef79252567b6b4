"""Architecture of foreign Swin Transformers, told by names and shapes."""

import math
import re
from collections.abc import Mapping

from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from ssat_probe.architecture import MOST_BLOCKS, num_classes_of, shape_of
from ssat_probe.formats import Converted
from ssat_probe.source import Source

MARK = "layers.0.blocks.0.attn.qkv.weight"
"Name by which weights are those of a Swin Transformer."


def inferred_swin(converted: Converted, source: Source) -> nn.Module:
    """Swin Transformer that foreign weights belong to.

    Args:
        converted: The weights, under timm's names.
        source: Image size, which the weights do not tell.

    Returns:
        timm's model with random weights.

    Raises:
        ValueError: If the weights do not tell their windows, or nobody says the image size.
    """
    state = converted.encoder
    dim, channels, *patch = shape_of(state, "patch_embed.proj.weight", 4)
    tables = [name for name in state if name.endswith("blocks.0.attn.relative_position_bias_table")]
    stages = sorted(int(name.split(".")[1]) for name in tables)
    if not stages or stages != list(range(len(stages))):
        raise ValueError(
            "The weights must hold a table of relative positions for each stage to tell its windows, got "
            f"{len(stages)}; name the model with --model timm:NAME, as SwinV2 needs."
        )
    if not source.img_size:
        raise ValueError(
            "The weights of a Swin Transformer do not tell the image size; give it with --img-size, or name the model "
            "with --model timm:NAME."
        )
    sizes = [shape_of(state, f"layers.{i}.blocks.0.attn.relative_position_bias_table", 2) for i in stages]
    side = math.isqrt(sizes[0][0])
    if side * side != sizes[0][0] or side % 2 == 0:
        raise ValueError(
            f"The weights must tell square windows, got a table of {sizes[0][0]} relative positions; name the model "
            "with --model timm:NAME."
        )
    model = SwinTransformer(
        img_size=(source.img_size[0], source.img_size[1]),
        patch_size=(patch[0], patch[1]),  # type: ignore[arg-type]  # takes pairs
        in_chans=channels, num_classes=num_classes_of(state),
        embed_dim=dim, depths=tuple(_depth(state, i) for i in stages), num_heads=tuple(size[1] for size in sizes),
        window_size=(side + 1) // 2, mlp_ratio=shape_of(state, "layers.0.blocks.0.mlp.fc1.weight", 2)[0] / dim,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in state,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = converted.norm_eps
    return model


def _depth(state: Mapping[str, Tensor], stage: int) -> int:
    """Blocks of a stage."""
    pattern = re.compile(rf"layers\.{stage}\.blocks\.(\d+)\.")
    found = {int(match[1]) for name in state if (match := pattern.match(name))}
    if max(found) >= MOST_BLOCKS:
        raise ValueError(f"The weights must have at most {MOST_BLOCKS} blocks, got block {max(found)}; no model has.")
    return 1 + max(found)
