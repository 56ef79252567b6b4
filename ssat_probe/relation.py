"""Relation: what lies between checkpoints of one architecture; measured on all of them together."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ssat_probe import registry
from ssat_probe.record import distinct_label, record_of, seen_of
from ssat_probe.reuse import name_of
from ssat_probe.sample import Sample
from ssat_probe.table import Column, read_table, results_in, write_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from ssat_probe.subject import Subject


class Relation(Protocol):
    """As a probe, but of several checkpoints at once; its table has no identity columns."""

    split: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]

    @property
    def budget_s(self) -> float:
        """Seconds that it may take."""

    @property
    def jobs(self) -> int:
        """Processes that share the points."""

    def num_points(self, num_checkpoints: int) -> int:
        """Points of parameter space at which it looks at the images."""

    def measure(self, subjects: "Sequence[Subject]", labels: Sequence[str]) -> "DataFrame":
        """The table for these subjects, whose names are the labels."""

    def draw(self, table: "DataFrame") -> "Figure":
        """Figure of a table, also of one read back from csv."""

    def summary(self, table: "DataFrame") -> "DataFrame":
        """A few readable rows."""


def make(name: str, **options: Any) -> Relation:
    """Relation by name.

    Args:
        name: File name in ``relations``.
        options: Its fields.

    Returns:
        The relation; an unknown name or option is a ValueError with the nearest valid one.
    """
    kind = registry.load("relations", name).Relation
    fields = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        registry.known(option, fields, f"the options of {name}")
    relation: Relation = kind(**options)
    return relation


def measure_all(
    relation: Relation, paths: Sequence[Path], sample: Sample, say: Callable[[str], None] = lambda line: None
) -> tuple["DataFrame", dict[str, Any]]:
    """Table of a relation between some checkpoints, and the record of how it was made.

    Args:
        relation: With its options.
        paths: Checkpoints, in order.
        sample: Which images.
        say: Told what the measurement will cost, before it begins.

    Returns:
        The table, and the record as plain data; checkpoints of different architectures are a ValueError, and so is more
        than the relation's budget.
    """
    from ssat_probe.subject import Subject

    started = time.monotonic()
    subjects = [Subject.of(path, sample, relation.split) for path in paths]
    labels: list[str] = []
    for subject, path in zip(subjects, paths, strict=True):
        labels.append(distinct_label(subject.checkpoint.label, path, labels))
    num, seconds = relation.num_points(len(subjects)), _seconds_per_point(relation, subjects[0])
    _refuse_too_much(relation, num, seconds)
    say(f"{name_of(relation)}: {num} points of {seconds:.3g} s: about {num * seconds:.0f} s")
    table = relation.measure(subjects, labels)
    seen = [seen_of(*one) for one in zip(subjects, paths, labels, strict=True)]
    return table, record_of(relation, sample, seen, str(subjects[0].device), time.monotonic() - started)


def run(
    relation: Relation,
    paths: Sequence[Path],
    sample: Sample,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
) -> "DataFrame":
    """Measure, and write ``<relation>.csv``, ``.json``, ``.png`` and ``.pdf`` into a folder.

    Args:
        relation: With its options.
        paths: Checkpoints, in order.
        sample: Which images.
        out: The folder.
        say: Told what the measurement will cost, before it begins.

    Returns:
        The table.
    """
    from ssat_probe import drawing
    from ssat_probe.subject import refuse_idle_data_dir

    refuse_idle_data_dir(paths, sample)
    with results_in(out):
        table, record = measure_all(relation, paths, sample, say)
    path = write_table(table, out / f"{record['probe']}.csv", record)
    drawing.save(relation.draw(read_table(path)), path.with_suffix(""))
    return table


def draw(name: str, table: "DataFrame") -> "Figure":
    """Figure of a relation's table, also of one read back from csv.

    Args:
        name: Of the relation.
        table: What ``measure_all`` gave.

    Returns:
        The figure.

    Raises:
        ValueError: If a column is missing.
    """
    relation = make(name)
    for column in relation.columns:
        if column.name not in table:
            raise ValueError(
                f"A table of {name} must have a column {column.name!r}, got none; pass one that {name} wrote."
            )
    return relation.draw(table)


def _seconds_per_point(relation: Relation, subject: "Subject") -> float:
    from ssat_probe.grid import pace_of
    from ssat_probe.terms import Terms

    return pace_of(Terms(subject, subject.parameters("cross_entropy")), max(relation.jobs, 1)).seconds


def _refuse_too_much(relation: Relation, num: int, seconds: float) -> None:
    """Refuse before any work."""
    if num * seconds > relation.budget_s:
        raise ValueError(
            f"What is looked at must fit into budget_s, {relation.budget_s:g} s, got {num} points that would take "
            f"{num * seconds:.0f} s; take fewer points, images or checkpoints, or more budget_s."
        )
