"""Figures of the landscape probe: lines with bands, contours and surfaces in three dimensions, on shared scales."""

import itertools
import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy import ndarray
from pandas import DataFrame, Series

from ssat_probe import drawing

LEVELS = tuple(mantissa * 10.0**power for power in range(-5, 7) for mantissa in (1, 2, 5))
MOST_OTHERS = 4  # more panels of other terms would hide the first
DECADES = 30.0  # values that span more than this factor are drawn on a logarithmic axis

_TERMS = ("cross_entropy", "reconstruction")  # beside the loss whose parameters move
_TITLES = {
    "random": "random directions",
    "top": "eigenvector of λmax",
    "top2": "eigenvector of second largest λ",
    "bottom": "eigenvector of λmin",
    "bottom2": "eigenvector of second smallest λ",
    "gradient": "gradient",
}
LABELS = {
    "cross_entropy": "cross-entropy [nat]",
    "reconstruction": "reconstruction [pixel²]",
    "joint": "joint loss [weighted]",
    "l2": "L2 term [loss]",
    "accuracy": "accuracy",
}


def draw(table: DataFrame) -> Figure:
    """Lines of the terms apart, then a surface per checkpoint (or first seed of a method) on one shared scale.

    Args:
        table: Of the landscape probe, for one or more checkpoints, with the identity columns.

    Returns:
        Each surface as labelled contours, those of the loss that was chosen in three dimensions as well; dashed is
        where the quadratic of the Hessian reaches the level in the legend.
    """
    loss = _loss_of(table)
    terms = list(dict.fromkeys((loss, *_TERMS)))
    keys = [("random", term) for term in (*terms, "l2")] + [(kind, loss) for kind in _TITLES if kind != "random"]
    lines = [key for key in keys if not _line(table, *key).empty]
    drawn = drawing.series(table)
    shown = [loss] if len(drawn) > MOST_OTHERS else [*terms, "accuracy"]
    surfaces = [[(term, one) for one in drawn if not _points(one.table, "surface", term).empty] for term in shown]
    levels = {term: levels_of(_points(table, "surface", term)["value"], term) for term in shown if surfaces[0]}
    blocks: list[list[Any]] = [lines, surfaces[0], *surfaces]  # each begins a row, so that surfaces stand side by side
    starts = [0, *itertools.accumulate(-(-len(block) // 3) * 3 for block in blocks)]
    with drawing.style():
        figure, axes = drawing.panels(starts[-1] // 3, 3, height=2.15 * (starts[-1] // 3))
        for ax, key in zip(axes, lines, strict=False):
            _draw_lines(ax, _line(table, *key), *key)
        for start, block in [(starts[1], blocks[1]), *zip(starts[3:], blocks[3:], strict=False)]:
            for ax, (term, one) in zip(axes[start:], block, strict=False):
                _draw_contours(ax, one, term, levels[term], _quadratic_level(table, term))
        for ax, (term, one) in zip(axes[starts[2] :], blocks[2], strict=False):
            _draw_solid(figure, ax, one, term, levels[term])
        for start, block, end in zip(starts, blocks, starts[1:], strict=False):
            for ax in axes[start + len(block) : end]:
                ax.remove()
        drawing.legend_below(figure, _note(table))
    return figure


def _points(table: DataFrame, quantity: str, term: str) -> DataFrame:
    return table[(table["quantity"] == quantity) & (table["term"] == term)]


def _line(table: DataFrame, kind: str, term: str) -> DataFrame:
    rows = _points(table, "line", term)
    directions = rows["direction"].astype(str)
    return rows[directions.str.startswith(kind) if kind == "random" else directions == kind]


def _loss_of(table: DataFrame) -> str:
    """The term whose parameters moved and whose Hessian was looked at."""
    return str(table.loc[table["quantity"] == "curvature", "term"].iloc[0])


def _note(table: DataFrame) -> str:
    """What bands and dashed curves are."""
    note = "inner bands: directions and seeds, outer: parts of the images too; 1 = as long as the weights"
    level = _quadratic_level(table, _loss_of(table))
    return note if level is None else f"{note}; dashed: quadratic of the Hessian at {level:g}"


def _quadratic_level(table: DataFrame, term: str) -> float | None:
    """The contour at which quadratic and surface are compared: the first well above all centres; none off a loss."""
    if term == "accuracy":
        return None
    highest = _points(table, "centre", term)["value"].max()
    return next((level for level in LEVELS if level > 1.5 * highest), None)


def _draw_lines(ax: Axes, rows: DataFrame, kind: str, term: str) -> None:
    """Mean over directions and seeds, their range, and around it that of the means over parts of the images."""
    for one in drawing.series(rows):
        points = one.table.groupby("x")
        values = points["value"].agg(["mean", "min", "max"])
        look: Any = {"color": one.look.colour, "linestyle": one.look.linestyle}
        low, high = points["low"].min(), points["high"].max()  # empty for the L2 term, which no image enters
        ax.fill_between(values.index, low, high, color=one.look.colour, alpha=0.1, linewidth=0)
        ax.fill_between(values.index, values["min"], values["max"], color=one.look.colour, alpha=0.2, linewidth=0)
        ax.plot(values.index, values["mean"], label=one.label, **look)
    finite = rows["value"].dropna()
    if len(finite) and finite.min() > 0 and finite.max() > DECADES * finite.min():
        ax.set_yscale("log")
    drawing.label_axes(ax, "relative distance" if kind == "random" else "distance", LABELS[term], _TITLES[kind])


def levels_of(values: Series, term: str) -> list[float]:
    """Contour levels that span values: 1, 2, 5, ... of a loss, equal steps of the accuracy or of a narrow range.

    Args:
        values: Of all surfaces that share the levels.
        term: Of a loss, or ``accuracy``.

    Returns:
        Two at least, ascending.
    """
    values = values.dropna()
    if term == "accuracy":
        return _equal_steps(values.min(), max(values.max(), values.min() + 0.05))
    low, high = max(values.min(), 1e-5), min(values.max(), 1e6)
    inside = [level for level in LEVELS if low <= level <= high]
    below = [level for level in LEVELS if level < low][-1:]
    above = [level for level in LEVELS if level > high][:1]
    if len(inside) < 3 and high > low:
        return _equal_steps(low, high)
    return below + inside + above


def _equal_steps(low: float, high: float) -> list[float]:
    return [float(level) for level in MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(low, high)]


def contours(ax: Axes, points: DataFrame, term: str, levels: list[float]) -> tuple[ndarray, ndarray]:
    """Draw a surface as labelled contours; what is not finite stays a hole.

    Args:
        ax: Where.
        points: Rows with ``x``, ``y`` and ``value``, one per point of a grid.
        term: Of a loss, or ``accuracy``.
        levels: From `levels_of`.

    Returns:
        Coordinates of the columns and of the rows.
    """
    x, y, z = _grid(points)
    shown = np.ma.masked_invalid(z)
    ax.contourf(x, y, shown, levels, norm=_norm_of(term, levels), cmap="viridis", extend="both")
    lines = ax.contour(x, y, shown, levels, colors="white", linewidths=0.4)
    ax.clabel(lines, fontsize=5, fmt="%.3g", colors="white")
    ax.grid(visible=False)
    return x, y


def _norm_of(term: str, levels: list[float]) -> Normalize:
    """From levels to colours: logarithmic of a loss."""
    return (Normalize if term == "accuracy" else LogNorm)(levels[0], levels[-1])


def _grid(points: DataFrame) -> tuple[ndarray, ndarray, ndarray]:
    """Coordinates of the columns, of the rows, and the values; not-finite ones stay holes."""
    grid = points.pivot_table(index="y", columns="x", values="value", dropna=False)
    x, y, z = (np.asarray(part, dtype=float) for part in (grid.columns, grid.index, grid))
    return x, y, np.where(np.isfinite(z), z, np.nan)


def _first(one: drawing.Series) -> tuple[DataFrame, str]:
    """Rows of a method's first checkpoint, and its title."""
    table = one.table[one.table["checkpoint"] == one.table["checkpoint"].iloc[0]]
    return table, one.label + (f", seed {table['seed'].iloc[0]}" if one.num_seeds > 1 else "")


def _draw_contours(ax: Axes, one: drawing.Series, term: str, levels: list[float], level: float | None) -> None:
    """Labelled contours, the checkpoint at the centre, and the Hessian's quadratic where it is of this term."""
    table, title = _first(one)
    points = _points(table, "surface", term)
    ends = contours(ax, points, term, levels)
    first, _, second = str(points["direction"].iloc[0]).partition(" ")
    if level is not None:
        _draw_quadratic(ax, table, term, level, (first, second), ends)
    ax.plot(0, 0, marker="+", color="white", markersize=6)
    drawing.label_axes(ax, first, second, f"{title}\n{LABELS[term]}")


def _draw_solid(figure: Figure, place: Axes, one: drawing.Series, term: str, levels: list[float]) -> None:
    """The surface in three dimensions, heights and colours shared by all; logarithmic where they span decades."""
    table, title = _first(one)
    points = _points(table, "surface", term)
    x, y, z = _grid(points)
    is_log = levels[-1] > DECADES * levels[0]
    height = np.log10 if is_log else np.asarray
    norm = _norm_of(term, levels)
    subplot = place.get_subplotspec()
    place.remove()
    ax: Any = figure.add_subplot(subplot, projection="3d", computed_zorder=False)
    shown = np.clip(z, levels[0], levels[-1])
    colours = matplotlib.colormaps["viridis"](norm(np.nan_to_num(shown, nan=levels[-1])))
    ax.plot_surface(*np.meshgrid(x, y), height(shown), facecolors=colours, rstride=1, cstride=1, shade=False)
    centre = float(_points(table, "centre", term)["value"].iloc[0])
    ax.plot(
        [0], [0], height([max(centre, levels[0])]), marker="o", color="white", markeredgecolor="black", markersize=3
    )
    ax.set_zlim(height(levels[0]), height(levels[-1]))
    if is_log:
        powers = range(math.ceil(np.log10(levels[0])), math.floor(np.log10(levels[-1])) + 1)
        ax.set_zticks(list(powers), [f"{10.0**power:g}" for power in powers])
    ax.tick_params(labelsize=5, pad=-3)
    first, _, second = str(points["direction"].iloc[0]).partition(" ")
    drawing.label_axes(ax, first, second, f"{title}\n{LABELS[term]}")
    ax.xaxis.labelpad = ax.yaxis.labelpad = -8


def _draw_quadratic(
    ax: Axes, table: DataFrame, term: str, level: float, pair: tuple[str, str], ends: tuple[ndarray, ndarray]
) -> None:
    """Where centre + slope + curvature / 2 of the plane reaches the level."""
    facts = table[(table["term"] == term) & table["quantity"].isin(("slope", "curvature", "mixed_curvature"))]
    keys = zip(facts["quantity"], facts["direction"], strict=True)
    values: dict[tuple[str, str], float] = dict(zip(keys, facts["value"].astype(float), strict=True))
    first, second = pair
    mixed = values.get(("mixed_curvature", " ".join(pair)))
    if mixed is None:
        return
    fine = [np.linspace(end[0], end[-1], 201) for end in ends]
    a, b = np.meshgrid(*fine)
    model = values["slope", first] * a + values["slope", second] * b
    model += float(_points(table, "centre", term)["value"].iloc[0])
    model += values["curvature", first] * a**2 / 2 + values["curvature", second] * b**2 / 2 + mixed * a * b
    if model.min() < level < model.max():
        ax.contour(*fine, model, [level], colors="#ffb000", linestyles="dashed", linewidths=0.9)
