"""CvT as Microsoft publishes it: stages of embedding and blocks, a class token in the last (Wu et al., 2021)."""

from collections.abc import Mapping, Set

from torch import Tensor

from ssat_probe.formats import Converted


def matches(names: Set[str]) -> bool:
    """Whether these are the names of Microsoft's CvT, which are also those of ours.

    Args:
        names: Of a state dict.

    Returns:
        True for ``stage0`` with an embedding and a convolutional projection.
    """
    return {"stage0.patch_embed.proj.weight", "stage0.blocks.0.attn.conv_proj_q.conv.weight"} <= names


def convert(state: Mapping[str, Tensor]) -> Converted:
    """All tensors under their own names, running statistics of the batch norms among them.

    Args:
        state: Tensors by name.

    Returns:
        With the head where there is one; the official files hold no mask token.
    """
    return Converted(dict(state), norm_eps=1e-5, note="keys on every second place")
