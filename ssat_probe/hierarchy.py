"""Architecture of foreign models with stages, told by names and shapes: Swin Transformers and CvT."""

import math
import re
from collections.abc import Mapping

from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from ssat_probe.architecture import MOST_BLOCKS, num_classes_of, shape_of
from ssat_probe.formats import Converted
from ssat_probe.models import cvt
from ssat_probe.source import Source

MARKS = {"Swin": "layers.0.blocks.0.attn.qkv.weight", "CvT": "stage0.blocks.0.attn.conv_proj_q.conv.weight"}
"Names by which weights are those of a Swin Transformer or of CvT."

CVT_HEAD_DIM = 64
"Width of a head in all of Wu et al.'s models (2021, Table 2); the weights do not tell it."


def kind_of(state: Mapping[str, Tensor]) -> str:
    """Which architecture weights belong to.

    Args:
        state: Tensors under timm's names, or Microsoft's for CvT.

    Returns:
        ``Swin``, ``CvT``, or else ``ViT``.
    """
    return next((kind for kind, mark in MARKS.items() if mark in state), "ViT")


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
        in_chans=channels, num_classes=num_classes_of(state), embed_dim=dim,
        depths=tuple(_depth(state, f"layers.{i}") for i in stages), num_heads=tuple(size[1] for size in sizes),
        window_size=(side + 1) // 2, mlp_ratio=shape_of(state, "layers.0.blocks.0.mlp.fc1.weight", 2)[0] / dim,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in state,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = converted.norm_eps
    return model


def inferred_cvt(converted: Converted, source: Source) -> nn.Module:
    """CvT that foreign weights belong to.

    Args:
        converted: The weights, under Microsoft's names.
        source: Image size, which the weights do not tell; stride of the first embedding and heads of the first stage,
            where they are given.

    Returns:
        Our model with random weights, without a mask token unless the weights have one.

    Raises:
        ValueError: If the weights do not tell their stages or heads, or nobody says the image size.
    """
    state = converted.encoder
    embeddings = [name for name in state if re.fullmatch(r"stage\d+\.patch_embed\.proj\.weight", name)]
    shapes = [shape_of(state, f"stage{i}.patch_embed.proj.weight", 4) for i in range(len(embeddings))]
    dims = tuple(shape[0] for shape in shapes)
    if not source.img_size:
        raise ValueError("The weights of a CvT do not tell the image size; give it with --img-size.")
    width = dims[0] // source.heads if source.heads else CVT_HEAD_DIM
    if not width or any(dim % width for dim in dims):
        raise ValueError(
            f"The weights must tell their attention heads, got stages of width {', '.join(map(str, dims))} that heads "
            f"of width {width} do not divide; give the number of heads of the first stage with --heads."
        )
    num_classes = num_classes_of(state)
    model = cvt.Model(
        img_size=(source.img_size[0], source.img_size[1]),
        patch_size=source.patch_size or tuple((side + 1) // 2 for side in shapes[0][2:]),  # type: ignore[arg-type]
        channels=shapes[0][1], num_classes=max(num_classes, 1), dims=dims,
        depths=tuple(_depth(state, f"stage{i}") for i in range(len(dims))), heads=tuple(dim // width for dim in dims),
        mlp_ratio=shape_of(state, "stage0.blocks.0.mlp.fc1.weight", 2)[0] / dims[0],
    )  # fmt: skip
    if not num_classes:
        model.head = nn.Identity()  # type: ignore[assignment]
    if "mask_token" not in state:
        model.register_parameter("mask_token", None)
    return model


def _depth(state: Mapping[str, Tensor], stage: str) -> int:
    """Blocks of a stage."""
    pattern = re.compile(rf"{re.escape(stage)}\.blocks\.(\d+)\.")
    found = {int(match[1]) for name in state if (match := pattern.match(name))}
    if not found:
        raise ValueError(f"The weights must have blocks in {stage!r}, got none; name the model with --model timm:NAME.")
    if max(found) >= MOST_BLOCKS:
        raise ValueError(f"The weights must have at most {MOST_BLOCKS} blocks, got block {max(found)}; no model has.")
    return 1 + max(found)
