"""ViT, DeiT and ViTMAE of Hugging Face's transformers: query, key and value apart, other names throughout."""

import re
from collections.abc import Mapping, Set

import torch
from torch import Tensor

from ssat_probe.formats import HALF, IMAGENET, Converted

_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}
_IN_BLOCK = {
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
_IN_DECODER = {
    "mask_token": "mask_token",
    "decoder_pos_embed": "pos_embed",
    "decoder_embed": "embed",
    "decoder_norm": "norm",
    "decoder_pred": "pred",
}
_LAYER = re.compile(r"(encoder\.layer|decoder_layers)\.(\d+)\.(.+)\.(weight|bias)")
_QKV = re.compile(r"(encoder\.layer|decoder_layers)\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)")


def matches(names: Set[str]) -> bool:
    """Whether these are the names of a ViT of transformers, alone or within a larger model.

    Args:
        names: Of a state dict.

    Returns:
        True for ``embeddings`` and ``encoder.layer``, alone or behind ``vit.`` or ``deit.``.
    """
    ends = ("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.attention.attention.query.weight")
    return any({prefix + end for end in ends} <= names for prefix in ("", "vit.", "deit."))


def convert(state: Mapping[str, Tensor]) -> Converted:
    """Names as timm's, query, key and value fused in this order.

    Args:
        state: Tensors by name.

    Returns:
        The encoder, the head where there is one, and ViTMAE's decoder.
    """
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    dropped: dict[str, str] = {}
    is_mae = any(name.startswith("decoder.") for name in state)
    for name, value in _fused(state).items():
        is_decoder = name.startswith("decoder.")
        bare = re.sub(r"^(vit|deit|decoder)\.", "", name)
        if bare == "embeddings.mask_token" or bare.startswith("pooler."):
            dropped[name] = "used by pre-training or by a pooler that no head reads"
            continue
        parts[is_decoder][_renamed(bare, _IN_DECODER if is_decoder else _NAMES)] = value
    mean, std = IMAGENET if is_mae else HALF
    pixels = f"{'ViTMAE' if is_mae else 'ViT'}'s image processor does"
    return Converted(parts[0], parts[1], dropped, norm_eps=1e-12, mean=mean, std=std, pixels=pixels)


def _fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with query, key and value of each layer as one; incomplete triples stay as they are."""
    result = dict(state)
    for name in state:
        if re.search(_QKV.pattern.replace("(query|key|value)", "query"), name):
            names = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            if all(part in state for part in names):
                fused = torch.cat([result.pop(part) for part in names])
                result[name.replace(".attention.attention.query.", ".attention.qkv.")] = fused
    return result


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """Name in timm's layout; what the tables do not know keeps its name and so is reported as unexpected."""
    layer = _LAYER.fullmatch(name)
    if layer:
        inner = "attn.qkv" if layer[3] == "attention.qkv" else _IN_BLOCK.get(layer[3])
        return f"blocks.{layer[2]}.{inner}.{layer[4]}" if inner else name
    if name in table:
        return table[name]
    stem, _, end = name.rpartition(".")
    return f"{table[stem]}.{end}" if stem in table else name
