"""DINO's student or teacher: a backbone under timm's names with a projection head (Caron et al., 2021)."""

from collections.abc import Mapping, Set

from torch import Tensor

from ssat_probe.formats import Converted


def matches(names: Set[str]) -> bool:
    """Whether there is a backbone of its own below ``backbone.``.

    Args:
        names: Of a state dict.

    Returns:
        True for timm's names behind ``backbone.``.
    """
    return {"backbone.patch_embed.proj.weight", "backbone.blocks.0.attn.qkv.weight"} <= names


def convert(state: Mapping[str, Tensor]) -> Converted:
    """The backbone; the projection head is no classifier and is dropped.

    Args:
        state: Tensors by name.

    Returns:
        Without a head.
    """
    encoder = {n.removeprefix("backbone."): value for n, value in state.items() if n.startswith("backbone.")}
    dropped = {n: "projection head of the training, no classifier" for n in state if n.startswith("head.")}
    kept = {n: value for n, value in state.items() if not n.startswith(("backbone.", "head."))}
    return Converted(encoder | kept, dropped=dropped)
