"""One file per layout of foreign weights, each exporting ``matches`` and ``convert``."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ssat_probe import registry

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"Mean and standard deviation of ImageNet's channels, as torchvision states them."

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"Pixels brought to [-1, 1]."


@dataclass(frozen=True)
class Converted:
    """Foreign weights under the names that this package uses, and what the layout implies beyond them."""

    encoder: dict[str, Tensor]
    "Encoder and head under timm's names."
    decoder: dict[str, Tensor] = field(default_factory=dict)
    "Decoder of the masked pass under the names of ``decoders.shallow``."
    dropped: dict[str, str] = field(default_factory=dict)
    "Names in the file that are not wanted, and why."
    norm_eps: float = 1e-6
    "The ε of every LayerNorm."
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    head_dim: int = 0
    "Width of an attention head where the layout fixes it; 0 means that the width of the model tells."
    patches_normed: bool = False
    "The patches' pixels pass a LayerNorm before they are embedded."
    pixels: str = "ImageNet's"
    "As whose the images are normalised, in words."
    note: str = ""
    "What else was assumed because the file does not say it."


def detect(names: Iterable[str]) -> str:
    """Layout of a state dict, from its names alone.

    Args:
        names: Of its tensors, in any order.

    Returns:
        File name in this folder; empty if none or several match.
    """
    names = frozenset(names)
    found = [name for name in registry.names("formats") if registry.load("formats", name).matches(names)]
    return found[0] if len(found) == 1 else ""


def split_off(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict without the entries that begin with one of some prefixes, and those entries.

    Args:
        state: Tensors by name.
        prefixes: Beginnings of names.

    Returns:
        The others, and the ones that begin so.
    """
    off = {name: value for name, value in state.items() if name.startswith(prefixes)}
    return {name: value for name, value in state.items() if name not in off}, off
