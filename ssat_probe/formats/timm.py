"""Vision Transformers under timm's names; also MAE (light and fine-tuned), DeiT and DINO backbones."""

from collections.abc import Mapping, Set

from torch import Tensor

from ssat_probe.formats import Converted

_OWN = ("backbone.", "decoder_", "encoder.", "student.", "teacher.")


def matches(names: Set[str]) -> bool:
    """Whether these are timm's names, without a decoder.

    Args:
        names: Of a state dict.

    Returns:
        True for ``patch_embed.proj`` and ``blocks.0.attn.qkv`` at the top.
    """
    needed = {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"}
    is_video = "blocks.0.attn.q_bias" in names and "cls_token" not in names
    return needed <= names and not is_video and not any(name.startswith(_OWN) for name in names)


def convert(state: Mapping[str, Tensor]) -> Converted:
    """The names as they are.

    Args:
        state: Tensors by name.

    Returns:
        The same tensors; DINOv2's mask token, which no image pass uses, is dropped.
    """
    dropped = {"mask_token": "used by masked pre-training alone"} if "mask_token" in state else {}
    kept = {name: value for name, value in state.items() if name not in dropped}
    return Converted(kept, dropped=dropped)
