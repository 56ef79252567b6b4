"""Consistency: what an analysis file says in one place must fit what it says in the others."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ssat_probe import probe
from ssat_probe.cell import Measurement
from ssat_probe.comparison import Claim, Measure
from ssat_probe.effect import without_effect
from ssat_probe.registry import known
from ssat_probe.results import COSTS
from ssat_probe.sweep import Planned


def check_recipe(
    shared: Collection[str],
    typed: Collection[str],
    lists: Mapping[str, str],
    axes: Mapping[str, Mapping[Any, Collection[str]]],
    cells: Sequence[Planned],
    source: str,
) -> None:
    """Refuse a field that all trainings are said to share and that changes none of them.

    Args:
        shared: Fields in the recipe of the file and of the command line.
        typed: Those of the command line, which count though their value be the default.
        lists: Fields that the file lists the values of, and where.
        axes: Fields that each alternative of each axis sets.
        cells: What was planned of all this.
        source: Where it was written; goes into messages.

    Raises:
        ValueError: If there is one.
    """
    idle = [without_effect(cell.recipe, typed) for cell in cells]
    set_by_all = {
        field: axis for axis, fields in axes.items() for field in set.intersection(*map(set, fields.values()))
    }
    for field in shared:
        if field in lists:
            why = f"it is what {lists[field]} lists"
        elif field in set_by_all:
            why = f"every alternative of the axis {set_by_all[field]!r} sets it"
        elif all(field in one for one in idle):
            why = idle[0][field]
        else:
            continue
        raise ValueError(
            f"The field {field} of the recipe, in {source} or with --set, must have an effect, got one that has none: "
            f"{why}; leave it out."
        )


def check_axes(axes: Sequence[str], measurements: Sequence[Measurement], source: str) -> None:
    """Refuse an axis that would be named as another column of a table, since it is one of every table.

    Args:
        axes: Of the sweep.
        measurements: Probes of the analysis.
        source: Where the axes were written; goes into messages.

    Raises:
        ValueError: If there is one.
    """
    for axis in axes:
        for one in measurements:
            if axis in [column.name for column in (*probe.IDENTITY, *one.probe.columns)]:
                raise ValueError(
                    f"The axes of {source} must not be named as a column of a table, got {axis!r}, which {one.name} "
                    f"has; models, methods and seeds have lists of their own, and others may be written as "
                    f"'my {axis}: {{a: {{{axis}: ...}}, b: ...}}'."
                )


def check_measure(measure: Measure, measurements: Sequence[Measurement]) -> None:
    """Refuse a measure that no table will have, before hours of training.

    Args:
        measure: Of the analysis; an unknown probe or column is a ValueError.
        measurements: Probes of the analysis.
    """
    columns = {one.name: ["seed", "epoch", *(column.name for column in one.probe.columns)] for one in measurements}
    columns["cost"] = ["seed", *COSTS, "peak_memory_bytes"]
    found = columns[known(measure.probe, columns, f"the probes that measure {measure.name!r} may be of")]
    known(measure.column, found, f"the columns of {measure.probe} that measure {measure.name!r} may be of")


def check_claim(
    claim: Claim,
    measures: Mapping[str, Measure],
    measurements: Sequence[Measurement],
    cells: Sequence[Planned],
    axes: Sequence[str],
) -> None:
    """Refuse a claim that does not compare one training per seed with another.

    Args:
        claim: Of the analysis; a method, an axis or a value on it that the analysis has not is a ValueError.
        measures: Of the analysis.
        measurements: Its probes.
        cells: Its trainings.
        axes: Of its sweep: a claim says where on them both sides stand.

    Raises:
        ValueError: If there are several trainings of a seed where the claim is made.
    """
    probes = {one.name: one.probe for one in measurements}
    has_twins = getattr(probes.get(measures[claim.measure].probe), "untrained_twin", False)
    methods = dict.fromkeys([cell.recipe.method for cell in cells] + [probe.UNTRAINED] * has_twins)
    for method, point in zip(claim.methods, claim.at, strict=True):
        known(method, methods, f"the methods of this analysis, about which claim {claim.claim!r} is made")
        for axis, value in point.items():
            known(axis, axes, f"the axes of the sweep, where claim {claim.claim!r} is made")
            values = list(dict.fromkeys(cell.point[axis] for cell in cells if axis in cell.point))
            if value not in values:  # 40 as text is not the number, and no row would have it
                known(repr(value), map(repr, values), f"the values of {axis}, where claim {claim.claim!r} is made")
        seeds = [
            cell.recipe.seed
            for cell in cells
            if cell.recipe.method == method
            and all(cell.point.get(axis, value) == value for axis, value in point.items())
            and cell.recipe.model == cells[0].recipe.model
        ]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"Claim {claim.claim!r} must be about one training of {method} per seed, got {len(seeds)} of "
                f"{len(set(seeds))} seeds; say where on {', '.join(axes)} with at: {{{axes[0]}: ...}}."
            )
