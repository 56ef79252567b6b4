"""Record: how a table was made, in plain data beside it, and how checkpoints are named in both."""

import dataclasses
import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssat_probe.reuse import asked, plain
from ssat_probe.sample import Sample
from ssat_probe.source import Source

if TYPE_CHECKING:
    from ssat_probe.subject import Subject

RECORDED_PACKAGES = ("ssat-probe", "torch", "timm", "numpy", "scipy", "pandas", "matplotlib")


def record_of(
    probe: Any, sample: Sample, seen: list[dict[str, Any]], device: str, seconds: float, source: Source = Source()
) -> dict[str, Any]:
    """How a table was made, as plain data.

    Args:
        probe: A probe or a relation, with its options.
        sample: Which images.
        seen: What was measured, from ``seen_of``.
        device: Where.
        seconds: How long it took.
        source: What was said about foreign weights.

    Returns:
        For the json beside the table.
    """
    import torch

    from ssat_probe.measures.processes import place

    return {
        **asked(probe, sample, source),
        "checkpoints": seen,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in RECORDED_PACKAGES},
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": place()[1],
        "seconds": round(seconds, 3),
    }


def distinct_label(label: str, path: Path, taken: Sequence[str]) -> str:
    """Name of a checkpoint among others, where several may be of one run.

    Args:
        label: Its own.
        path: Of its file.
        taken: Names of the others.

    Returns:
        Its own if it is free, else with the file's stem behind it, else with the whole path.
    """
    with_stem = f"{label} ({path.stem})"
    return label if label not in taken else with_stem if with_stem not in taken else f"{label} ({path})"


def seen_of(subject: "Subject", path: Path | str, label: str) -> dict[str, Any]:
    """What a record says about a checkpoint and the images it was shown.

    Args:
        subject: The checkpoint under the microscope.
        path: Of its file; empty for one without.
        label: In the table.

    Returns:
        Plain data.
    """
    seen = {
        "checkpoint": label,
        "path": str(path),
        "hash": subject.checkpoint.hash,
        "images": subject.fingerprint,
        "num_images": subject.num_images,
    }
    report = getattr(subject.checkpoint, "report", None)  # of foreign weights
    return seen if report is None else seen | {"loading": plain(dataclasses.asdict(report))}


def folder_name(paths: Sequence[Path]) -> str:
    """Name of a folder for the results of some checkpoints: the same for the same ones, another for others.

    Args:
        paths: Checkpoints.

    Returns:
        Their stems with their folders for up to three, else their number; then the beginning of a hash of the paths.
    """
    digest = hashlib.sha256("\n".join(str(path.resolve()) for path in paths).encode()).hexdigest()[:6]
    names = [f"{path.resolve().parent.name}-{path.stem}" for path in paths]
    stem = names[0] if len(names) == 1 else f"{len(names)}-checkpoints"
    return f"{stem}-{digest}"
