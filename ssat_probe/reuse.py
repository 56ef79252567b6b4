"""When a folder already holds what a measurement would give, and what is left to be done if it nearly does."""

import dataclasses
import json
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssat_probe.sample import Sample
from ssat_probe.source import Source
from ssat_probe.table import read_table

if TYPE_CHECKING:
    from pandas import DataFrame


def is_up_to_date(
    probe: Any,
    paths: Sequence[Path],
    sample: Sample,
    out: Path,
    name: str = "",
    source: Source = Source(),
    but: Collection[str] = (),
) -> bool:
    """Whether a folder holds this probe's complete table for these very weights, images, options and version.

    Args:
        probe: With its options.
        paths: Checkpoints.
        sample: Which images.
        out: The folder.
        name: Of the files; empty means the probe's.
        source: What is said about foreign weights.
        but: Options that may be others.

    Returns:
        True if measuring again would give what is there.
    """
    from ssat_probe.subject import Subject

    record = _record(out / f"{name or name_of(probe)}.json")
    found = {"source": plain(dataclasses.asdict(Source()))} | record  # earlier versions did not record it
    usual = {field.name: field.default for field in dataclasses.fields(probe)}  # of options younger than the table
    usual = {name: value for name, value in usual.items() if value is not dataclasses.MISSING}
    found["options"] = plain(usual) | found.get("options", {})
    for key, value in asked(probe, sample, source).items():
        there, wanted = (_without(one, but) if key == "options" else one for one in (found.get(key, {}), value))
        if there != wanted:
            return False
    if record.get("versions", {}).get("ssat-probe") != version("ssat-probe"):
        return False
    seen = [(entry["hash"], entry["images"]) for entry in record["checkpoints"] if entry["path"]]
    subjects = (Subject.of(path, sample, probe.split, source) for path in paths)
    return seen == [(subject.checkpoint.hash, subject.fingerprint) for subject in subjects]


def redrawn(
    probe: Any, paths: Sequence[Path], sample: Sample, out: Path, name: str = "", source: Source = Source()
) -> "tuple[DataFrame, dict[str, Any]] | None":
    """Table and record from those in a folder, where all that is measured stands there and nothing need be done again.

    Args:
        probe: With its options; one without ``redrawn`` options is measured always.
        paths: As for `is_up_to_date`.
        sample: As for `is_up_to_date`.
        out: As for `is_up_to_date`.
        name: As for `is_up_to_date`.
        source: As for `is_up_to_date`.

    Returns:
        None if it must be measured: also where a file that an option names is gone.
    """
    named = [value for value in dataclasses.asdict(probe).values() if isinstance(value, Path)]
    if not hasattr(probe, "redrawn") or not all(path.exists() for path in named):
        return None
    if not is_up_to_date(probe, paths, sample, out, name, source, probe.redrawn):
        return None
    path = out / f"{name or name_of(probe)}.csv"
    record = _record(path.with_suffix(".json"))
    return probe.redraw(read_table(path)), record | {"options": plain(dataclasses.asdict(probe))}


def asked(probe: Any, sample: Sample, source: Source = Source()) -> dict[str, Any]:
    """All that the user chose, but the checkpoints.

    Args:
        probe: With its options.
        sample: Which images.
        source: What is said about foreign weights.

    Returns:
        For a record, as plain data.
    """
    return {
        "probe": name_of(probe),
        "options": plain(dataclasses.asdict(probe)),
        "sample": plain(dataclasses.asdict(sample)) | {"split": sample.split or probe.split},
        "source": plain(dataclasses.asdict(source)),
    }


def name_of(probe: Any) -> str:
    """Name of a probe or relation: that of its file.

    Args:
        probe: Of a module of ``probes`` or ``relations``.

    Returns:
        Such as ``hessian``.
    """
    return type(probe).__module__.rpartition(".")[2]


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back.

    Args:
        values: What JSON does not know is written as text.

    Returns:
        The same for the same values, whether they were written and read or not.
    """
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return result


def _record(path: Path) -> dict[str, Any]:
    """Of a complete table; empty if there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if path.with_suffix(".csv").is_file() and isinstance(record, dict) else {}


def _without(options: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}
