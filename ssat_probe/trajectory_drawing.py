"""Figure of curvature along trainings: both ends of the spectrum and negative energy over the epochs."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame, Series

from ssat_probe import drawing

PANELS = {
    "lambda_max": "largest eigenvalue [loss]",
    "lambda_min": "smallest eigenvalue [loss]",
    "negative_energy": "negative energy Σ|λ₋| / Σ|λ|",
}
EDGE = "edge_of_stability"
CUT = 0.25  # bands may reach so far beyond the seeds, as a share of their range; those of few seeds would hide them
ROOM = 2.5  # the edge is in the picture where it is at most so many times the largest value; tuned
_EDGE_NOTE = "dashed: 2 (1 + momentum) / learning rate"
_NO_EDGE_NOTE = "no 2 / learning rate: AdamW's bound is of the preconditioned Hessian"


def is_trajectory(table: DataFrame) -> bool:
    """Whether a table of the Hessian probe holds several epochs of one run.

    Args:
        table: With the identity columns.

    Returns:
        True if some run does.
    """
    if "epoch" not in table:
        return False
    return bool((table.groupby(_runs(table))["epoch"].nunique() > 1).any())


def draw(table: DataFrame) -> Figure:
    """Both ends and negative energy over the epochs, one line per method with its interval over seeds.

    Args:
        table: What the Hessian probe gave for checkpoints along one run or several, with the identity columns.

    Returns:
        Three panels. Hollow: not converged in some seed. Dashed beside the largest eigenvalue: the curvature that the
        steps of gradient descent bear, where the table has it.
    """
    runs = _runs(table)
    is_first = runs.str.endswith("-pretrain")
    names = table["method"].map(lambda name: drawing.METHOD_LABELS.get(name, name)) + ", pre-training"
    along = table.assign(checkpoint=runs, at=table["epoch"].astype(float), method=table["method"].mask(is_first, names))
    along = along.drop(columns="epoch")
    with drawing.style():
        figure, axes = drawing.panels(1, 3, height=2.3)
        for ax, (quantity, label) in zip(axes, PANELS.items(), strict=True):
            drawn = _draw_lines(ax, along[along["quantity"] == quantity])
            if quantity == "lambda_max":
                _draw_edge(ax, along[along["quantity"] == EDGE])
            _scale_epochs(ax, sorted(set(along["at"])))
            drawing.label_axes(ax, "epochs", label)
        axes[1].axhline(0, color="black", linewidth=0.5, zorder=0)
        notes = ["thin: seeds, thick: mean with 95 % t interval"] if max(one.num_seeds for one in drawn) > 1 else []
        notes += ["hollow: not converged", _EDGE_NOTE if (along["quantity"] == EDGE).any() else _NO_EDGE_NOTE]
        drawing.legend_below(figure, "; ".join(notes))
    return figure


def _runs(table: DataFrame) -> Series:
    """Run and stage of each row: the checkpoint's name without the path that tells snapshots apart."""
    return table["checkpoint"].astype(str).str.replace(r" \(.*\)$", "", regex=True)


def _draw_lines(ax: Axes, rows: DataFrame) -> list[drawing.Series]:
    """Each seed, and their mean with its interval; hollow where a seed's value has not converged."""
    drawn = drawing.lines_with_band(ax, rows, "at", "value")
    for one in drawn:
        at = one.table.groupby("at")
        thin: Any = {"color": one.look.colour, "linestyle": one.look.linestyle, "linewidth": 0.5, "alpha": 0.6}
        if one.num_seeds > 1:
            ax.plot(one.table.pivot_table(index="at", columns="checkpoint", values="value"), **thin)
        open_at = at["value"].mean()[at["converged"].min() == 0]
        look: Any = {"color": one.look.colour, "marker": one.look.marker, "markerfacecolor": "white"}
        ax.plot(open_at.index, open_at, linestyle="", **look)
    low, high = rows["value"].min(), rows["value"].max()
    drawing.keep_within(ax, low - CUT * (high - low), high + CUT * (high - low))
    return drawn


def _draw_edge(ax: Axes, rows: DataFrame) -> None:
    """What the steps bear, per method, which does not stretch the axis much beyond what is there."""
    low, high = ax.get_ylim()
    for one in drawing.series(rows) if len(rows) else []:
        edge = one.table.groupby("at")["value"].mean()
        ax.plot(edge.index, edge, linestyle="--", color="black", linewidth=1.0, label=f"edge of stability, {one.label}")
        high = max([high, *(1.05 * value for value in edge if value < ROOM * high)])
    ax.set_ylim(low, high)


def _scale_epochs(ax: Axes, epochs: list[float]) -> None:
    """Logarithm of epochs + 1, as snapshots lie; ticks at those that are far enough from the one before."""
    ax.set_xscale("function", functions=(np.log1p, np.expm1))
    ticks = epochs[:1]
    for epoch in epochs:
        if np.log1p(epoch) - np.log1p(ticks[-1]) > np.log1p(epochs[-1]) / 7:
            ticks.append(epoch)
    ax.set_xticks(ticks, [f"{tick:g}" if tick == int(tick) else f"{tick:.2g}" for tick in ticks])
    ax.set_xlim(-0.2, 1.2 * epochs[-1])
