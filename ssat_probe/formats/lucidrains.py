"""ViT of the vit-pytorch package (lucidrains): old and new names, linear patch embedding, no bias in qkv."""

import re
from collections.abc import Mapping, Set

from einops import rearrange
from torch import Tensor

from ssat_probe.formats import Converted

HEAD_DIM = 64
"That package's default for the width of a head; the file does not say it."

# In the package's first layout a block is PreNorm(fn); since 2023 the norm lies inside attention and MLP.
_IN_BLOCK = {
    "0.norm": "norm1",
    "0.fn.to_qkv": "attn.qkv",
    "0.to_qkv": "attn.qkv",
    "0.fn.to_out.0": "attn.proj",
    "0.to_out.0": "attn.proj",
    "1.norm": "norm2",
    "1.fn.net.0": "mlp.fc1",
    "1.fn.net.3": "mlp.fc2",
    "1.net.0": "norm2",
    "1.net.1": "mlp.fc1",
    "1.net.4": "mlp.fc2",
}
_OLD = {"mlp_head.0": "norm", "mlp_head.1": "head", "to_patch_embedding.1": "patch_embed.proj"}
_NEW = {
    "transformer.norm": "norm",
    "mlp_head": "head",
    "mlp_head.0": "norm",
    "mlp_head.1": "head",
    "to_patch_embedding.1": "patch_embed.norm_pixels",
    "to_patch_embedding.2": "patch_embed.proj",
    "to_patch_embedding.3": "patch_embed.norm",
}


def matches(names: Set[str]) -> bool:
    """Whether these are the names of that package's ViT.

    Args:
        names: Of a state dict.

    Returns:
        True for ``to_patch_embedding`` and ``transformer.layers``.
    """
    attends = {"transformer.layers.0.0.fn.to_qkv.weight", "transformer.layers.0.0.to_qkv.weight"}
    return "to_patch_embedding.1.weight" in names and "pos_embedding" in names and bool(attends & names)


def convert(state: Mapping[str, Tensor]) -> Converted:
    """Names as timm's; the linear patch embedding as a convolution, its pixels outer and channels inner.

    Args:
        state: Tensors by name.

    Returns:
        Images of three channels and square patches are assumed; newer layouts norm the pixels of a patch first.
    """
    is_new = "to_patch_embedding.2.weight" in state
    table = _NEW if is_new else _OLD
    encoder = {_renamed(name, table): value for name, value in state.items()}
    for name in encoder.keys() & {"cls_token", "pos_embed"}:
        value = encoder[name]
        encoder[name] = value.reshape(1, -1, value.shape[-1]) if 1 <= value.ndim <= 3 else value  # newest: (token, dim)
    weight = encoder["patch_embed.proj.weight"]
    side = round((weight.shape[1] / 3) ** 0.5) if weight.ndim == 2 else 0
    if side and 3 * side * side == weight.shape[1]:
        encoder["patch_embed.proj.weight"] = rearrange(weight, "d (p q c) -> d c p q", p=side, q=side).contiguous()
    note = f"head width {HEAD_DIM}, the head reads the class token"
    return Converted(encoder, norm_eps=1e-5, head_dim=HEAD_DIM, patches_normed=is_new, note=note)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """Name in timm's layout; what the tables do not know keeps its name and so is reported as unexpected."""
    if name == "pos_embedding":
        return "pos_embed"
    layer = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer:
        return f"blocks.{layer[1]}.{_IN_BLOCK[layer[2]]}.{layer[3]}" if layer[2] in _IN_BLOCK else name
    stem, _, end = name.rpartition(".")
    return f"{table[stem]}.{end}" if stem in table else name
