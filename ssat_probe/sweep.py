"""Sweep: which trainings a grid makes, and their measures over it."""

import itertools
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from ssat_probe import drawing
from ssat_probe.comparison import axes_of, with_unit
from ssat_probe.effect import without_effect
from ssat_probe.point import at, named, points_over, shown, titled
from ssat_probe.recipe import Recipe

GAPS = ("", "NA", "N/A", "n/a", "<NA>", "NaN", "nan", "None", "NULL", "null")
"Text that pandas reads back from a table as missing."

Point = dict[str, Any]
"Where a training stands: its value, or the name of its alternative, on each axis that changes it."


@dataclass(frozen=True)
class Planned:
    """A training of an analysis, and where it stands on the axes of its sweep."""

    recipe: Recipe
    point: Point

    @property
    def folder(self) -> str:
        """Name of the folder of this point, ``lambda_weight=0.1``; empty where nothing varies."""
        return ",".join(f"{word(axis)}={word(value)}" for axis, value in self.point.items())

    @property
    def name(self) -> str:
        """Of the training within its analysis: point and run."""
        return "/".join(filter(None, (self.folder, self.recipe.name)))


def planned(
    shared: Mapping[str, Any],
    models: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[str],
    vary: Mapping[str, Any],
    source: str,
    fixed: Mapping[str, Any] | None = None,
) -> list[Planned]:
    """Trainings of an analysis: every combination, but each training once.

    An axis of ``vary`` is a field of the recipe with a list of values, or a name with alternatives, each of which sets
    some fields: ``{lambda_weight: [0.1, 0.5], length: {short: {epochs: 10}, long: {epochs: 100}}}``. A method on which
    an axis has no effect (λ on training from scratch) is trained once for all of its values.

    Args:
        shared: Fields of all recipes.
        models: Encoders.
        seeds: Of the trainings.
        methods: Of the trainings.
        vary: The axes.
        source: Where all this was written; goes into messages.
        fixed: Values that win over those that are set, to try a sweep out; the axes stay those of the whole.

    Returns:
        In the order of models, points, seeds, methods; an unknown field or a value out of range is a ValueError.

    Raises:
        ValueError: If two alternatives differ in nothing but signs.
    """
    axes = {str(name): alternatives(str(name), values, source) for name, values in vary.items()}
    cells: dict[str, Planned] = {}
    for model, choice, seed, method in itertools.product(
        models, [dict(zip(axes, one, strict=True)) for one in itertools.product(*axes.values())], seeds, methods
    ):
        base = {**shared, "model": model, "method": method, "seed": seed}
        point = {axis: choice[axis] for axis in axes if _acts(base, axes[axis].values(), source)}
        changes = {name: value for axis in point for name, value in axes[axis][choice[axis]].items()}
        small = fixed or {}
        cell = Planned(_effective(_shrunk(base, small), _shrunk(changes, small), source), point)
        other = cells.setdefault(cell.name, cell)
        if other.recipe != cell.recipe:
            raise ValueError(
                f"The alternatives of {source} must differ in their letters, got two whose folder is {cell.folder!r}; "
                "rename one."
            )
    return list(cells.values())


def alternatives(axis: str, values: Any, source: str) -> dict[Any, dict[str, Any]]:
    """What each value of an axis sets.

    Args:
        axis: Its name.
        values: What the file says there: values of the field of this name, or alternatives.
        source: Where it was written; goes into messages.

    Returns:
        Fields, by the value's name in tables.

    Raises:
        ValueError: If it is neither, says a value twice, or has one that a table would lose.
    """
    if isinstance(values, list) and values and all(not isinstance(value, dict) for value in values):
        pairs = [(named(value), {axis: value}) for value in values]
    elif isinstance(values, dict) and values and all(map(_are_fields, values.values())):
        pairs = [(named(name), fields) for name, fields in values.items()]
    else:
        raise ValueError(
            f"The axis {axis!r} of {source} must be a list of values, or alternatives that each set fields, got "
            f"{values!r}; write lambda_weight: [0.1, 0.5], or length: {{short: {{epochs: 10}}, long: {{epochs: 99}}}}."
        )
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"The axis {axis!r} of {source} must have each value once, got {values!r}; leave one out.")
    if gaps := [name for name, _ in pairs if name in GAPS]:
        raise ValueError(
            f"The axis {axis!r} of {source} must have values that a table can tell from a gap, got {gaps[0]!r}; call "
            "it none or by another name."
        )
    return dict(pairs)


def word(value: Any) -> str:
    """A value as part of a folder's name.

    Args:
        value: Of an axis.

    Returns:
        Letters, digits, signs of numbers, and ``_`` for all else.
    """
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")


def _are_fields(values: Any) -> bool:
    """Whether an alternative sets something."""
    return isinstance(values, dict) and bool(values) and all(isinstance(name, str) for name in values)


def _shrunk(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with the fixed values in place of their own."""
    return {name: fixed.get(name, value) for name, value in values.items()}


def _acts(base: Mapping[str, Any], alternatives: Iterable[Mapping[str, Any]], source: str) -> bool:
    """Whether any alternative of an axis changes this training."""
    recipe = Recipe.from_dict(dict(base), source)
    return any(_effective(base, changes, source) != recipe for changes in alternatives)


def _effective(base: Mapping[str, Any], changes: Mapping[str, Any], source: str) -> Recipe:
    """Recipe with the changes, without those that have no effect on it, be their value the default or not."""
    idle = without_effect(Recipe.from_dict({**base, **changes}, source), changes)
    return Recipe.from_dict({**base, **{name: value for name, value in changes.items() if name not in idle}}, source)


def draw(compared: DataFrame) -> Figure:
    """Each measure over the first axis of a sweep: a line per method, a panel in its row per value of the other axes.

    A method on which the axis has no effect is a level line. Bands and bars are 95 % t intervals over seeds.

    Args:
        compared: From ``comparison.compare``: a row per method, point and measure.

    Returns:
        The figure.
    """
    axes = axes_of(compared)
    first, others = axes[0], axes[1:]
    facets = points_over(compared, others)
    measures = list(dict.fromkeys(compared["measure"]))
    places = places_on(compared[first].dropna())
    with drawing.style():
        width = min(drawing.PAGE_WIDTH, 3.4 * len(facets))
        figure, panels = drawing.panels(len(measures), len(facets), width=width, height=1.75 * len(measures))
        for ax, (measure, facet) in zip(panels, itertools.product(measures, facets), strict=True):
            rows = at(compared[compared["measure"] == measure], facet)
            for method, group in rows.groupby("method", sort=False):
                _line(ax, str(method), group, first, places)
            label = textwrap.fill(with_unit(measure, rows["unit"].iloc[0] if len(rows) else ""), 26)
            drawing.label_axes(ax, first.replace("_", " "), label, titled(facet))
            ax.set_xticks(list(places.values()), [shown(value) for value in places])
        drawing.legend_below(
            figure, "mean over seeds with its 95 % t interval; a level line does not depend on the axis"
        )
    return figure


def places_on(values: "pd.Series[Any]") -> dict[Any, float]:
    """Where the values of an axis stand; evenly, since grids are seldom linear.

    Args:
        values: As often as they come.

    Returns:
        0, 1, 2 and so on, in the order of the numbers, or in which the names come.
    """
    seen = list(dict.fromkeys(values))
    if all(isinstance(value, int | float) for value in seen):
        seen.sort()
    return {value: float(place) for place, value in enumerate(seen)}


def _line(ax: Axes, method: str, rows: DataFrame, axis: str, places: Mapping[Any, float]) -> None:
    """One method in one panel."""
    look = drawing.LOOKS[method]
    options: Any = {"color": look.colour, "linestyle": look.linestyle, "label": drawing.METHOD_LABELS[method]}
    level = rows[rows[axis].isna()]
    if len(level):
        one = level.iloc[0]
        ax.axhline(one["mean"], **options)
        if not pd.isna(one["low"]):
            ax.axhspan(one["low"], one["high"], color=look.colour, alpha=0.10, linewidth=0)
        return
    rows = rows.assign(place=[places[value] for value in rows[axis]]).sort_values("place")
    spread = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
    errors = None if rows["low"].isna().all() else [part.fillna(0).to_numpy() for part in spread]
    ax.errorbar(rows["place"], rows["mean"], errors, marker=look.marker, capsize=2, **options)
