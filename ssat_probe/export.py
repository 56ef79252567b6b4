"""Export: our checkpoints as files that other tools read."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save
from torch import Tensor

from ssat_probe.checkpoint import DECODER_PREFIX, FORMAT, Checkpoint, load_checkpoint, save_tensors
from ssat_probe.registry import known
from ssat_probe.table import write_atomically

Layout = Literal["timm", "mae", "safetensors"]

_MAE = {"embed.": "decoder_embed.", "blocks.": "decoder_blocks.", "norm.": "decoder_norm.", "pred.": "decoder_pred."}


def export(path: Path | str, to: Layout, out: Path | None = None) -> Path:
    """Write a checkpoint's weights under the names that another tool expects.

    Args:
        path: Of a checkpoint of ours.
        to: ``timm``: encoder and head, for ``create_model`` and ``load_state_dict``; ``mae``: the same with the decoder
            under the official names, within ``model``; ``safetensors``: everything, with recipe and facts, which this
            tool reads back as the very checkpoint.
        out: Of the new file; by default beside the checkpoint.

    Returns:
        The new file.

    Raises:
        ValueError: If ``to`` is unknown, the file would replace another kind of file, or there is no decoder to write.
    """
    known(to, get_args(Layout), "what export writes")
    if str(path).startswith("timm:"):
        raise ValueError(f"export writes checkpoints of ssat-probe train, got {path}, which timm has; give a file.")
    checkpoint = load_checkpoint(path)
    ending = {"timm": ".timm.pth", "mae": ".mae.pth", "safetensors": ".safetensors"}[to]
    out = out or checkpoint.path.with_suffix(ending)
    if to != "timm" and (out.suffix == ".safetensors") != (to == "safetensors"):
        raise ValueError(f"out must end as {ending} does for --to {to}, got {out}; choose another name.")
    if out.resolve() == checkpoint.path.resolve():
        raise ValueError(f"out must be another file than the checkpoint, got {out}; choose another name.")
    encoder = {n: v for n, v in checkpoint.state.items() if not n.startswith(DECODER_PREFIX)}
    _check_layout(checkpoint, to, encoder)
    if to == "timm":
        encoder.pop("mask_token", None)  # of Swin's masked pass, which timm has not
    if to == "mae":
        return save_tensors({"model": encoder | _official_decoder(checkpoint), "epoch": checkpoint.epoch}, out)
    if out.suffix != ".safetensors":
        return save_tensors(encoder, out)
    state = checkpoint.state if to == "safetensors" else encoder
    return write_atomically(out, save(_contiguous(state), _facts(checkpoint, is_whole=to == "safetensors")))


def _check_layout(checkpoint: Checkpoint, to: Layout, encoder: dict[str, Tensor]) -> None:
    """Refuse a layout that has no names for this model."""
    is_plain = "blocks.0.attn.qkv.weight" in encoder and "mask_token" not in encoder
    is_cvt = "stage0.patch_embed.proj.weight" in encoder
    if (to == "timm" and is_cvt) or (to == "mae" and not is_plain):
        has = "no CvT" if to == "timm" else "a Vision Transformer alone, whose hidden patches are left out"
        raise ValueError(
            f"{checkpoint.path} must hold a model that {to} has, got {checkpoint.recipe.model}; {to} has {has}: use "
            "--to safetensors" + (", whose names are Microsoft's." if is_cvt else " or --to timm.")
        )


def _official_decoder(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The decoder under the names of the official MAE and SSAT code."""
    if not checkpoint.has_decoder:
        raise ValueError(
            f"{checkpoint.path} must hold a decoder for --to mae, got none; use --to timm, whose names are those of "
            "MAE's files without a decoder."
        )
    written = {}
    for full in checkpoint.state:
        if full.startswith(DECODER_PREFIX):
            name = full.removeprefix(DECODER_PREFIX)
            prefix = next((prefix for prefix in _MAE if name.startswith(prefix)), "")
            new = _MAE[prefix] + name.removeprefix(prefix) if prefix else name
            written["decoder_pos_embed" if name == "pos_embed" else new] = checkpoint.state[full]
    return written


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to(torch.device("cpu")).contiguous() for name, value in state.items()}


def _facts(checkpoint: Checkpoint, *, is_whole: bool) -> dict[str, str]:
    """What safetensors carries beside the tensors: words alone."""
    facts: dict[str, Any] = {
        "format": FORMAT,
        "recipe": checkpoint.recipe.as_dict(),
        "facts": dataclasses.asdict(checkpoint.facts),
        "stage": checkpoint.stage,
        "epoch": checkpoint.epoch,
        "hash": checkpoint.hash,
    }
    return {"format": "pt"} | ({"ssat-probe": json.dumps(facts)} if is_whole else {})
