"""Consistency: what an analysis file says in one place must fit what it says in the others."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ssat_probe import probe
from ssat_probe.cell import Measurement
from ssat_probe.comparison import RESULTS, Claim, Measure
from ssat_probe.effect import without_effect
from ssat_probe.registry import known
from ssat_probe.results import COSTS
from ssat_probe.sweep import Planned

FILES = ("analysis", "claims", "comparison", "cost", "init", "log", "recipe", "report", "sweep", "tradeoff")
"What a training and an analysis write beside the tables of probes, without ending."

ADDED = ("sd", "undefined", "value", "definition", "policy", "size")
"Columns that rows of measures and drawings add to those of a table."


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


def check_names(
    axes: Mapping[str, Mapping[Any, Collection[str]]],
    measures: Collection[str],
    measurements: Sequence[Measurement],
    source: str,
) -> None:
    """Refuse names under which something else is kept: a file beside a probe's table, a column beside an axis.

    Args:
        axes: Of the sweep: fields that each alternative sets.
        measures: Names of measures.
        measurements: Probes of the analysis.
        source: Where all this was written; goes into messages.

    Raises:
        ValueError: If there is one.
    """
    for one in measurements:
        if not re.fullmatch(r"[\w-]+", one.name) or one.name.lower() in FILES or one.name.endswith("_rows"):
            raise ValueError(
                f"The probes of {source} must be named in letters, digits, - and _, and not as a file of its own "
                f"({', '.join(FILES)}, ..._rows), got {one.name!r}; rename it, and say with probe: which it is."
            )
    tables = {one.name: [column.name for column in (*probe.IDENTITY, *one.probe.columns)] for one in measurements}
    tables |= {
        "the comparison": ["checkpoint", "method", "seed", *RESULTS, *ADDED],
        "cost": [*COSTS, "peak_memory_bytes"],
    }
    setters: dict[str, str] = {}
    for axis, alternatives in axes.items():
        fields = {field for one in alternatives.values() for field in one}
        for field in sorted(fields & setters.keys()):
            raise ValueError(
                f"The axes of {source} must set different fields, got {setters[field]!r} and {axis!r} which both set "
                f"{field}; say it on one of them."
            )
        setters |= dict.fromkeys(fields, axis)
        for table in [name for name, columns in tables.items() if axis in columns]:
            raise ValueError(
                f"The axes of {source} must not be named as a column of a table, got {axis!r}, which {table} has; "
                f"models, methods and seeds have lists of their own, and others may be written as "
                f"'my {axis}: {{a: {{{axis}: ...}}, b: ...}}'."
            )
        for field in sorted(fields & {"method", "seed"}):
            raise ValueError(
                f"The axis {axis!r} of {source} must not set {field}, got an alternative that does; methods and seeds "
                "have lists of their own."
            )
    for name in measures:
        if name in ("checkpoint", "method", "seed", *axes):
            raise ValueError(
                f"The measures of {source} must not be named as what they are compared by, got {name!r}; rename it."
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
            known(str(axis), axes, f"the axes of the sweep, where claim {claim.claim!r} is made")
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
