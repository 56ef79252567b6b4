"""Trade-off: one measure of an analysis over another, as accuracy over cost."""

import itertools
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from ssat_probe import drawing
from ssat_probe.comparison import axes_of, with_unit
from ssat_probe.point import at, points_over, shown, titled
from ssat_probe.registry import known
from ssat_probe.sweep import places_on

_SMALLEST, _LARGEST = 2.5, 7.0
"Widths of the dots, in points, at the first and the last value of the first axis."

_WIDE = 20.0
"A measure whose means differ by more than this factor is drawn on a logarithmic axis."


def pair_from(values: Any, measures: Collection[str]) -> tuple[str, str]:
    """A pair of measures from an analysis file.

    Args:
        values: What stands there: ``[test accuracy, reconstruction error]``.
        measures: Of the analysis.

    Returns:
        The pair; an unknown measure is a ValueError.

    Raises:
        ValueError: If it is not a pair.
    """
    if not isinstance(values, list) or len(values) != 2:
        raise ValueError(
            f"A trade-off must be two measures, the upright one first, got {values!r}; write [test accuracy, images]."
        )
    upright, level = (known(str(name), measures, "the measures, where a trade-off is asked for") for name in values)
    return upright, level


def draw(compared: DataFrame, pairs: Sequence[tuple[str, str]]) -> Figure:
    """Pairs of measures: a dot per method and point of the sweep, joined along its first axis, along which it grows.

    Bars are 95 % t intervals over seeds, in both directions. Pairs and values of the other axes are panels.

    Args:
        compared: From ``comparison.compare``: a row per method, point and measure.
        pairs: Of measures, the upright one first.

    Returns:
        The figure.
    """
    axes = axes_of(compared)
    facets = points_over(compared, axes[1:])
    places = places_on(compared[axes[0]].dropna()) if axes else {}
    grid = list(itertools.product(pairs, facets))
    columns = len(facets) if len(facets) > 1 else min(2, len(pairs))
    rows = -(-len(grid) // columns)
    with drawing.style():
        figure, panels = drawing.panels(rows, columns, width=min(drawing.PAGE_WIDTH, 3.4 * columns), height=2.6 * rows)
        for ax, ((y, x), facet) in zip(panels, grid, strict=False):
            here = at(compared, facet)
            sizes = here[axes[0]].map(places).fillna(0.0) / max(1, len(places) - 1) if axes else 0.0
            _panel(ax, here.assign(size=_SMALLEST + (_LARGEST - _SMALLEST) * sizes), y, x, axes[:1])
            drawing.label_axes(ax, _label(compared, x), _label(compared, y), titled(facet))
        for ax in panels[len(grid) :]:
            ax.set_axis_off()
        grows = f"; dots grow along {axes[0].replace('_', ' ')}: {', '.join(map(shown, places))}" if axes else ""
        drawing.legend_below(figure, f"mean over seeds with its 95 % t interval{grows}")
    return figure


def _label(compared: DataFrame, measure: str) -> str:
    """Name and unit."""
    return textwrap.fill(with_unit(measure, compared[compared["measure"] == measure]["unit"].iloc[0]), 26)


def _panel(ax: Axes, rows: DataFrame, y: str, x: str, axis: Sequence[str]) -> None:
    """Both measures of all methods, at one value of the other axes."""
    keys = ["method", "size", *axis]
    both = pd.merge(rows[rows["measure"] == x], rows[rows["measure"] == y], on=keys, suffixes=("_x", "_y"), sort=False)
    both = both.dropna(subset=["mean_x", "mean_y"])
    for method, group in both.groupby("method", sort=False):
        look, group = drawing.LOOKS[str(method)], group.sort_values("size", kind="stable")
        means = group["mean_x"], group["mean_y"]
        ax.errorbar(
            *means, _bars(group, "y"), _bars(group, "x"),
            color=look.colour, linestyle=look.linestyle, capsize=2, elinewidth=0.6,
        )  # fmt: skip
        label = drawing.METHOD_LABELS[str(method)]
        ax.scatter(*means, group["size"] ** 2, color=look.colour, marker=look.marker, label=label, zorder=3)
    if len(both) and both["mean_x"].min() > 0 and both["mean_x"].max() > _WIDE * both["mean_x"].min():
        ax.set_xscale("log")


def _bars(rows: DataFrame, side: str) -> Any:
    """Lengths of the bars below and above; none where one seed has no interval."""
    low, mean, high = (rows[f"{name}_{side}"].to_numpy(dtype=float) for name in ("low", "mean", "high"))
    return None if pd.isna(low).all() else [pd.Series(mean - low).fillna(0), pd.Series(high - mean).fillna(0)]
