"""Weights that a training begins with, from a checkpoint of any kind that is known."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from ssat_probe.assembly import HEAD_NAMES, Report, fill, patch_grid, resampled_positions
from ssat_probe.checkpoint import DECODER_PREFIX
from ssat_probe.foreign import TIMM, open_weights
from ssat_probe.formats import Converted
from ssat_probe.source import Source
from ssat_probe.table import write_atomically

FRESH = "the head is learnt anew"
MASK_TOKEN, UNMASKED = "mask_token", "hidden patches are left out here"


def begin_from(encoder: nn.Module, path: str, record: Path | None) -> Report:
    """Fill an encoder with the weights of a checkpoint; its head stays as it is.

    Positions and patch embeddings of another size are resampled, and a patch embedding of colours is summed for grey
    images, which then look to it as colours that are equal. What became of each tensor is written down.

    Args:
        encoder: Of the training, with fresh weights.
        path: Of our checkpoint, a file of another tool, or ``timm:NAME?pretrained``.
        record: File for the report and the hash of the weights; none where another process writes it.

    Returns:
        The report.

    Raises:
        ValueError: If the weights are none, do not fill the encoder, or tensors are left over.
    """
    if path.startswith(TIMM) and not path.endswith("?pretrained"):
        raise ValueError(
            f"--init-from must name weights that were trained, got {path!r}, which are random; use {path}?pretrained, "
            "or leave it out."
        )
    attention: Any = getattr(getattr(encoder, "blocks", [None])[0], "attn", None)  # files do not say how many heads
    heads = 0 if path.startswith(TIMM) else getattr(attention, "num_heads", 0)
    try:  # nothing is shown to the file's model, so no normalisation matters
        found = open_weights(path, Source(resize=True, heads=heads, mean=(0.0,), std=(1.0,)))
    except ValueError as error:
        if "--heads" not in str(error):
            raise
        raise ValueError(
            f"--init-from {path} must be weights of the model that is trained, got ones whose width its {heads} "
            "attention heads do not divide; choose the model that they are of."
        ) from error
    wanted = encoder.state_dict()
    of_encoder = {name: value for name, value in found.state.items() if not name.startswith(DECODER_PREFIX)}
    dropped = {name: FRESH for name in of_encoder if name.startswith(HEAD_NAMES)}
    dropped |= dict.fromkeys({MASK_TOKEN} & of_encoder.keys() - wanted.keys(), UNMASKED)
    body = {name: value for name, value in of_encoder.items() if name not in dropped}
    resized = _of_other_channels(body, wanted) | _of_other_grid(body, found.encoder(), encoder)
    given = Converted(encoder=body, dropped=dropped)
    layout = getattr(getattr(found, "report", None), "layout", "ssat-probe")
    report = fill(encoder, given, layout, "", Source(resize=True, allow_partial=True))
    report = dataclasses.replace(report, resized=report.resized | resized)
    missing = [name for name in report.missing if not name.startswith((*HEAD_NAMES, MASK_TOKEN))]
    if missing or report.unexpected:
        raise ValueError(
            f"--init-from {path} must fill the encoder, got weights that leave {len(missing)} of its tensors "
            f"({', '.join(missing[:3]) or 'none'}) and have {len(report.unexpected)} too many "
            f"({', '.join(report.unexpected[:3]) or 'none'}); choose the model that they are of."
        )
    content = {"path": path, "hash": found.hash, "report": dataclasses.asdict(report)}
    if record is not None:
        write_atomically(record, json.dumps(content, indent=2) + "\n")
    return report


def _of_other_channels(body: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Make the first convolution one of grey images where it is one of colours; which was changed, and how."""
    stem = next((name for name in body if name.endswith("patch_embed.proj.weight")), "")
    if not stem or stem not in wanted or wanted[stem].shape[1] != 1 or body[stem].shape[1] != 3:
        return {}
    body[stem] = adapt_input_conv(1, body[stem])
    return {stem: "3 channels to their sum"}


def _of_other_grid(body: dict[str, Tensor], theirs: nn.Module, encoder: nn.Module) -> dict[str, str]:
    """Resample positions whose grid is known not to be the encoder's; which were, and from which to which."""
    if "pos_embed" not in body or "pos_embed" not in encoder.state_dict():
        return {}
    old, new = patch_grid(theirs), patch_grid(encoder)
    if old == new:
        return {}
    num_prefix = body["pos_embed"].shape[1] - math.prod(old)
    body["pos_embed"] = resampled_positions(body["pos_embed"], new, num_prefix, old)
    return {"pos_embed": f"a grid of {old[0]}x{old[1]} to {new[0]}x{new[1]}"}
