"""Consistency: what an analysis file says in one place must fit what it says in the others."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ssat_probe.effect import without_effect
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
