"""SimMIM's pre-training files: a Swin Transformer below ``encoder.``, a decoder of one layer (Xie et al., 2022)."""

import dataclasses
from collections.abc import Mapping, Set

from torch import Tensor

from ssat_probe.formats import Converted, split_off, swin

_PREFIX = "encoder."


def matches(names: Set[str]) -> bool:
    """Whether there are a Swin Transformer below ``encoder.`` and a mask token in it.

    Args:
        names: Of a state dict.

    Returns:
        True for a pre-training file with a Swin Transformer; SimMIM's ViT has other names.
    """
    inner = {name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)}
    return swin.matches(inner) and "mask_token" in inner


def convert(state: Mapping[str, Tensor]) -> Converted:
    """The encoder as timm's; the decoder is dropped.

    Args:
        state: Tensors by name.

    Returns:
        Without a head.
    """
    rest, inner = split_off(state, (_PREFIX,))
    encoder, decoder = split_off(rest, ("decoder.",))
    found = swin.convert({name.removeprefix(_PREFIX): value for name, value in inner.items()})
    dropped = {_PREFIX + name: why for name, why in found.dropped.items()}
    dropped |= dict.fromkeys(decoder, "decoder of the masked pass, which takes its mask tokens from the encoder")
    return dataclasses.replace(found, encoder=found.encoder | encoder, dropped=dropped)
