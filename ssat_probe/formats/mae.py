"""Masked autoencoders with their decoder, as He et al. (2022) and Das et al. (2024, SSAT) publish them."""

from collections.abc import Mapping, Set

from torch import Tensor

from ssat_probe.formats import Converted, split_off

_DECODER = {
    "decoder_embed.": "embed.",
    "decoder_blocks.": "blocks.",
    "decoder_norm.": "norm.",
    "decoder_pred.": "pred.",
    "decoder_pos_embed": "pos_embed",
}


def matches(names: Set[str]) -> bool:
    """Whether these are the names of a masked autoencoder, with or without SSAT's head.

    Args:
        names: Of a state dict.

    Returns:
        True for timm's names with ``decoder_blocks`` and ``mask_token`` beside them.
    """
    return {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "decoder_embed.weight", "mask_token"} <= names


def convert(state: Mapping[str, Tensor]) -> Converted:
    """Encoder, decoder, and SSAT's head where there is one.

    Args:
        state: Tensors by name.

    Returns:
        The head reads the class token after the final norm, as SSAT's does.
    """
    encoder, rest = split_off(state, (*_DECODER, "mask_token"))
    decoder = {"mask_token": rest.pop("mask_token")}
    for name, value in rest.items():
        old = next(prefix for prefix in _DECODER if name.startswith(prefix))
        decoder[_DECODER[old] + name.removeprefix(old)] = value
    note = "SSAT, with its head" if "head.weight" in state else "MAE, without a head"
    return Converted(encoder, decoder, note=note)
