"""VideoMAE, official and of Hugging Face's transformers: clips in cubes of two frames (Tong et al., 2022).

Images are seen as still clips of two frames, one slice of time: then the embedding of cubes is one of patches with the
weights of both frames added up, and the positions are those of the first slice.
"""

import re
from collections.abc import Mapping, Set

import torch
from jaxtyping import Float
from torch import Tensor

from ssat_probe.formats import Converted

SLICE = (14, 14)
"Patches of a slice of time in all released models: 224 pixels in patches of 16. Files hold no positions."

_HF = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "fc_norm": "fc_norm",
    "classifier": "head",
}
_HF_IN_BLOCK = {
    "attention.attention.query": "attn.query",
    "attention.attention.key": "attn.key",
    "attention.attention.value": "attn.value",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
_DECODER = ("decoder.", "encoder_to_decoder.", "mask_token")


def matches(names: Set[str]) -> bool:
    """Whether these are the names of VideoMAE: blocks with a bias for queries and values alone.

    Args:
        names: Of a state dict.

    Returns:
        True for either spelling, alone or behind ``encoder.`` or ``videomae.``.
    """
    official = {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.q_bias"}
    face = {"embeddings.patch_embeddings.projection.weight", "encoder.layer.0.attention.attention.q_bias"}
    ways = [(official, ""), (official, "encoder."), (face, ""), (face, "videomae.")]
    if "cls_token" in names:  # BEiT, which has such biases too
        return False
    return any({prefix + name for name in needed} <= names for needed, prefix in ways)


def convert(state: Mapping[str, Tensor]) -> Converted:
    """Names as timm's, query, key and value fused with their biases, two frames in one.

    Args:
        state: Tensors by name.

    Returns:
        The encoder, the head where there is one; the decoder reconstructs clips and is dropped.
    """
    is_face = any(".attention.attention.q_bias" in name for name in state)
    dropped = {name: "decoder of clips" for name in state if name.startswith(_DECODER)}
    bare = {_bare(name, is_face): value for name, value in state.items() if name not in dropped}
    encoder = _fused({_timms(name) if is_face else name: value for name, value in bare.items()})
    weight = encoder["patch_embed.proj.weight"]
    if weight.ndim == 5:
        encoder["patch_embed.proj.weight"] = weight.sum(2)
    if weight.ndim > 3 and "pos_embed" not in encoder:
        encoder["pos_embed"] = sinusoids(SLICE[0] * SLICE[1], len(weight))[None]
    note = "each image is a still clip of two frames; positions of the first slice"
    return Converted(encoder, dropped=dropped, norm_eps=1e-12 if is_face else 1e-6, note=note)


def sinusoids(length: int, dim: int) -> Float[Tensor, "position dim"]:
    """Fixed positions of Vaswani et al. (2017), Sec. 3.5: sines and cosines in turn.

    Args:
        length: Number of positions.
        dim: Width of the model.

    Returns:
        Between -1 and 1, float32.
    """
    exponents = torch.arange(dim, dtype=torch.float64).div(2, rounding_mode="floor") * 2 / dim
    angles = torch.arange(length, dtype=torch.float64)[:, None] / 10000**exponents
    angles[:, 0::2], angles[:, 1::2] = angles[:, 0::2].sin(), angles[:, 1::2].cos()
    return angles.float()


def _bare(name: str, is_face: bool) -> str:
    if is_face:
        return name.removeprefix("videomae.")
    return name.removeprefix("encoder.")


def _timms(name: str) -> str:
    """Hugging Face's name in timm's layout; what the tables do not know keeps its name."""
    stem, _, end = name.rpartition(".")
    if stem in _HF:
        return f"{_HF[stem]}.{end}"
    layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", stem)
    if layer and name.endswith((".q_bias", ".v_bias")):
        return f"blocks.{layer[1]}.attn.{end}"
    return f"blocks.{layer[1]}.{_HF_IN_BLOCK[layer[2]]}.{end}" if layer and layer[2] in _HF_IN_BLOCK else name


def _fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value of each block as one, with a bias of 0 for the keys."""
    result = dict(state)
    for name in state:
        if name.endswith(".attn.q_bias"):
            stem = name.removesuffix("q_bias")
            parts = [f"{stem}{part}.weight" for part in ("query", "key", "value")]
            if all(part in state for part in parts):
                result[f"{stem}qkv.weight"] = torch.cat([result.pop(part) for part in parts])
            if f"{stem}v_bias" in state:
                query, value = result.pop(name), result.pop(f"{stem}v_bias")
                result[f"{stem}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return result
