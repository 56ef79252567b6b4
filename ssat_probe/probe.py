"""Probe: what a probe is; run one on checkpoints and keep its table, record and figure together."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ssat_probe import registry, reuse
from ssat_probe.record import distinct_label, record_of, seen_of
from ssat_probe.reuse import name_of, plain
from ssat_probe.sample import Sample
from ssat_probe.source import Source
from ssat_probe.table import Column, read_table, results_in, rows_of, write_atomically, write_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from ssat_probe.subject import Subject

IDENTITY = (
    Column("checkpoint", "", "name of the run that the weights come from"),
    Column("model", "", "encoder"),
    Column("method", "", "scratch, ssl_ft (SSL+FT), ssat (SSAT), or untrained"),
    Column("data", "", "data set of the training"),
    Column("seed", "", "seed of the training"),
    Column("epoch", "", "epochs of the last stage"),
    Column(
        "setting", "", "size and grid of the images, and a hash of their normalisation and preparation: never mixed"
    ),
)
"What a table says about each checkpoint, in front of a probe's own columns."

UNTRAINED = "untrained"
"Method of an untrained twin."

Progress = Callable[[int, int, str], None]


class Probe(Protocol):
    """A measurement: frozen options in, fresh table out; prints nothing, writes nothing, keeps nothing.

    Seven things are optional. A method ``between(subjects)`` gets the labels and subjects of all checkpoints one after
    another and returns their tables in the same order; `measure_all` calls it in place of ``measure``, for probes that
    compare checkpoints. A property ``num_steps`` says how many steps ``measure(subject, on_step=...)`` tells of, where
    one checkpoint takes long; 0 for none. A field ``untrained_twin: bool`` asks `measure_all` to add the untrained
    network of each architecture and seed as if it were one more checkpoint. A property ``policy`` says in a few words
    of what the measures are taken, such as ``queries patch, keys all``. A method ``estimate(subject) -> str`` says what
    measuring one checkpoint costs. A class variable ``resumes = True`` says that ``measure`` takes
    a folder ``unfinished`` for what lets it go on after an interruption; `run` removes it in the end. A class variable
    ``redrawn`` names options that change nothing of what is measured: where a table stands that differs in these alone,
    `run` gives it to a method ``redraw(table) -> table`` instead of measuring. A class variable ``shares = True`` says
    that ``measure`` shares the images between processes that were started together.
    """

    split: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]

    def measure(self, subject: "Subject") -> "DataFrame":
        """The probe's own columns for one subject."""

    def draw(self, table: "DataFrame") -> "Figure":
        """Figure of a table of one or more checkpoints."""

    def summary(self, table: "DataFrame") -> "DataFrame":
        """A few readable rows."""


def make(name: str, **options: Any) -> Probe:
    """Probe by name.

    Args:
        name: File name in ``probes``.
        options: Its fields.

    Returns:
        The probe; an unknown name or option is a ValueError with the nearest valid one.
    """
    module = registry.load("probes", name)
    fields = [field.name for field in dataclasses.fields(module.Probe)]
    for option in options:
        registry.known(option, fields, f"the options of {name}")
    return module.Probe(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def measure(name: str, checkpoints: Sequence[Path | str], **options: Any) -> "DataFrame":
    """Table of a probe for some checkpoints.

    Args:
        name: Of the probe.
        checkpoints: Paths of ours or of foreign weights, or ``timm:NAME``.
        options: Fields of the probe, of ``Sample`` and of ``Source``.

    Returns:
        Identity columns, then the probe's own; rows of the checkpoints one after another.
    """
    parts: list[Any] = []
    for kind in (Sample, Source):
        fields = {field.name for field in dataclasses.fields(kind)}
        parts.append(kind(**{k: options.pop(k) for k in fields & options.keys()}))
    sample, source = parts
    return measure_all(make(name, **options), [Path(path) for path in checkpoints], sample, source=source)[0]


def draw(name: str, table: "DataFrame") -> "Figure":
    """Figure of a probe's table, also of one read back from csv.

    Args:
        name: Of the probe.
        table: What ``measure`` gave.

    Returns:
        The figure.

    Raises:
        ValueError: If a column that is drawn is missing; those of later versions may be.
    """
    probe = make(name)
    try:
        table["checkpoint"]
        return probe.draw(table)
    except KeyError as error:
        raise ValueError(
            f"A table of {name} must have a column {error}, got none; pass one the probe wrote."
        ) from error


def measure_all(
    probe: Probe,
    paths: Sequence[Path],
    sample: Sample,
    progress: Progress = lambda done, total, text: None,
    source: Source = Source(),
    unfinished: Path | None = None,
) -> tuple["DataFrame", dict[str, Any]]:
    """Table of a probe for some checkpoints, and the record of how it was made.

    Args:
        probe: With its options.
        paths: Checkpoints.
        sample: Which images.
        progress: Told how many checkpoints are done.
        source: What is said about foreign weights.
        unfinished: Folder for what lets an interrupted measurement go on, where the probe can.

    Returns:
        The table with identity columns in front, and the record as plain data.
    """
    import pandas as pd

    started = time.monotonic()
    subjects = _Subjects(paths, sample, probe, progress, source)
    if hasattr(probe, "between"):
        tables = list(probe.between(iter(subjects)))
    else:
        tables = [_measured(probe, subject, label, progress, unfinished) for label, subject in subjects]
    measured = {entry["checkpoint"]: table.attrs for entry, table in zip(subjects.seen, tables, strict=True)}
    tables = [_with_identity(table, one) for table, one in zip(tables, subjects.identities, strict=True)]
    progress(len(paths), len(paths), "")
    record = record_of(probe, sample, subjects.seen, subjects.device, time.monotonic() - started, source)
    if any(measured.values()):
        record["measured"] = plain(measured)
    return pd.concat(tables, ignore_index=True), record


def estimate(
    probe: Probe, paths: Sequence[Path], sample: Sample, source: Source = Source(), out: Path | None = None
) -> str:
    """What a measurement will cost, before it begins.

    Args:
        probe: With its options.
        paths: Checkpoints; the first one is tried.
        sample: Which images.
        source: What is said about foreign weights.
        out: The folder of the results, if what stands there is to be used.

    Returns:
        A line; empty for a probe that does not say.
    """
    if not hasattr(probe, "estimate"):
        return ""
    from ssat_probe.measures.processes import gathered

    if out is not None and all(gathered([reuse.redrawn(probe, paths, sample, out, source=source) is not None])):
        return f"{name_of(probe)}: drawn again from {out / name_of(probe)}.csv, nothing is measured"
    from ssat_probe.subject import Subject

    text: str = probe.estimate(Subject.of(paths[0], sample, probe.split, source))
    return text and f"{name_of(probe)}: {text}, {len(paths)} of them"


def _measured(probe: Probe, subject: "Subject", label: str, progress: Progress, unfinished: Path | None) -> "DataFrame":
    """The probe's table; one that takes minutes a checkpoint says how many of its steps it has done."""
    num_steps: int = getattr(probe, "num_steps", 0)
    options: dict[str, Any] = {}
    if num_steps:
        options["on_step"] = lambda step: progress(min(step, num_steps), num_steps, label)
    if getattr(probe, "resumes", False):
        options["unfinished"] = unfinished
    return probe.measure(subject, **options)


def run(
    probe: Probe,
    paths: Sequence[Path],
    sample: Sample,
    out: Path,
    progress: Progress = lambda done, total, text: None,
    source: Source = Source(),
) -> "DataFrame":
    """Measure or redraw, and write ``<probe>.csv``, ``_rows.csv``, ``.json``, ``.png`` and ``.pdf`` into a folder.

    Args:
        probe: With its options.
        paths: Checkpoints.
        sample: Which images.
        out: The folder.
        progress: Told how many checkpoints are done.
        source: What is said about foreign weights.

    Returns:
        The table.
    """
    from ssat_probe.measures.processes import gathered, place
    from ssat_probe.subject import refuse_idle_data_dir

    refuse_idle_data_dir(paths, sample, source)
    unfinished, (rank, num) = out / f".{name_of(probe)}-unfinished", place()
    with results_in(out):
        found = reuse.redrawn(probe, paths, sample, out, source=source)
        if not all(gathered([found is not None])):
            own = unfinished / f"{rank}of{num}" if num > 1 else unfinished  # they may share a disk or not
            found = measure_all(probe, paths, sample, progress, source, own)
    assert found is not None
    if rank == 0:
        write_results(probe, *found, out)
    gathered([])  # all wait until the results are there
    shutil.rmtree(unfinished, ignore_errors=True)
    return found[0]


def join(probe: Probe, sample: Sample) -> bool:
    """From here on, processes that were started together share the work of a probe.

    Args:
        probe: What will be run.
        sample: On which device.

    Returns:
        Whether this is the process that speaks and writes; it is where there is only one.

    Raises:
        ValueError: If there are several and the probe cannot share.
    """
    from ssat_probe.measures import processes

    processes.join(sample.device)
    rank, num = processes.place()
    if num > 1 and not getattr(probe, "shares", False):
        raise ValueError(
            f"{name_of(probe)} must run in one process, got {num} of them; only hessian shares its images. "
            "Start it without accelerate launch or torchrun."
        )
    return rank == 0


def write_results(probe: Probe, table: "DataFrame", record: dict[str, Any], out: Path, name: str = "") -> None:
    """Write a probe's table, record and figure.

    Args:
        probe: Draws.
        table: Of one or more checkpoints.
        record: How the table was made.
        out: The folder.
        name: Of the files; empty means the probe's.
    """
    from ssat_probe import drawing

    name = name or record["probe"]
    rows = rows_of(table, probe.columns, record["probe"], getattr(probe, "policy", ""))
    if len(rows):
        write_atomically(out / f"{name}_rows.csv", rows.to_csv(index=False))
    write_table(table, out / f"{name}.csv", record)
    drawing.save(probe.draw(read_table(out / f"{name}.csv")), out / name)


class _Subjects:
    """Checkpoints, loaded one at a time; remembers what the table and the record say about each."""

    def __init__(self, paths: Sequence[Path], sample: Sample, probe: Probe, progress: Progress, source: Source) -> None:
        self._paths, self._sample, self._probe, self._progress, self._source = paths, sample, probe, progress, source
        self.identities: list[dict[str, Any]] = []
        self.seen: list[dict[str, Any]] = []
        self.device = ""

    def __iter__(self) -> Iterator[tuple[str, "Subject"]]:
        """Label and subject of each checkpoint, then of the untrained twins if the probe asks for them."""
        from ssat_probe.subject import Subject

        untrained: dict[str, Path] = {}
        for done, path in enumerate(self._paths):
            self._progress(done, len(self._paths), str(path))
            subject = Subject.of(path, self._sample, self._probe.split, self._source)
            label = distinct_label(subject.checkpoint.label, path, [entry["checkpoint"] for entry in self.seen])
            untrained.setdefault(_twin_label(subject), path)
            self._remember(subject, label, str(path), subject.checkpoint.recipe.method)
            yield label, subject
        if getattr(self._probe, "untrained_twin", False):
            for label, path in untrained.items():
                subject = Subject.of(path, self._sample, self._probe.split, self._source).untrained()
                self._remember(subject, label, "", UNTRAINED)
                yield label, subject

    def _remember(self, subject: "Subject", label: str, path: str, method: str) -> None:
        checkpoint = subject.checkpoint
        recipe = checkpoint.recipe
        self.device = str(subject.device)
        self.identities.append(
            {"checkpoint": label, "model": recipe.model, "method": method, "data": recipe.data, "seed": recipe.seed}
            | {"epoch": checkpoint.epoch, "setting": subject.setting}
        )
        self.seen.append(seen_of(subject, path, label))


def _twin_label(subject: "Subject") -> str:
    recipe = subject.checkpoint.recipe
    patch = "x".join(map(str, recipe.patch_size or ()))
    parts = (recipe.model, recipe.data, "untrained", f"patch{patch}", f"seed{recipe.seed or 0}")
    return "-".join(part for part in parts if part)  # of foreign weights neither data nor seed are known


def _with_identity(table: "DataFrame", identity: dict[str, Any]) -> "DataFrame":
    table = table.copy()
    for place, (name, value) in enumerate(identity.items()):
        table.insert(place, name, value)
    return table
