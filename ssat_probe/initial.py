"""Weights that a training begins with, from a checkpoint of any kind that is known."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

from ssat_probe.assembly import HEAD_NAMES, Report, fill
from ssat_probe.checkpoint import DECODER_PREFIX
from ssat_probe.foreign import open_weights
from ssat_probe.formats import Converted
from ssat_probe.source import Source
from ssat_probe.table import write_atomically

FRESH = "the head is learnt anew"


def begin_from(encoder: nn.Module, path: str, record: Path) -> Report:
    """Fill an encoder with the weights of a checkpoint; its head stays as it is.

    Positions and patch embeddings of another size are resampled. What became of each tensor is written down.

    Args:
        encoder: Of the training, with fresh weights.
        path: Of our checkpoint, a file of another tool, or ``timm:NAME?pretrained``.
        record: File for the report and the hash of the weights.

    Returns:
        The report.

    Raises:
        ValueError: If the weights do not fill the encoder, or tensors are left over.
    """
    heads: Any = getattr(getattr(encoder, "blocks", [None])[0], "attn", None)  # files do not say how many there are
    channels = getattr(getattr(getattr(encoder, "patch_embed", None), "proj", None), "in_channels", 3)
    unused = (0.0,) * channels, (1.0,) * channels  # nothing is shown to the file's model, so no normalisation matters
    found = open_weights(path, Source(resize=True, heads=getattr(heads, "num_heads", 0), mean=unused[0], std=unused[1]))
    of_encoder = {name: value for name, value in found.state.items() if not name.startswith(DECODER_PREFIX)}
    classifier = {name: FRESH for name in of_encoder if name.startswith(HEAD_NAMES)}
    body = {name: value for name, value in of_encoder.items() if name not in classifier}
    given = Converted(encoder=body, dropped=classifier)
    layout = getattr(getattr(found, "report", None), "layout", "ssat-probe")
    report = fill(encoder, given, layout, "", Source(resize=True, allow_partial=True))
    missing = [name for name in report.missing if not name.startswith((*HEAD_NAMES, "mask_token"))]
    if missing or report.unexpected:
        raise ValueError(
            f"--init-from {path} must fill the encoder, got weights that leave {len(missing)} of its tensors "
            f"({', '.join(missing[:3]) or 'none'}) and have {len(report.unexpected)} too many "
            f"({', '.join(report.unexpected[:3]) or 'none'}); choose the model that they are of."
        )
    content = {"path": path, "hash": found.hash, "report": dataclasses.asdict(report)}
    write_atomically(record, json.dumps(content, indent=2) + "\n")
    return report
