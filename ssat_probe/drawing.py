"""Shared pieces of every figure: one style, one look per method, lines with bands, files on disk."""

import io
import itertools
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pandas import DataFrame

from ssat_probe.measures.statistics import t_interval
from ssat_probe.table import Column, write_atomically

COLUMN_WIDTH = 3.35  # inches, one column of a two-column page
PAGE_WIDTH = 6.9  # inches, both columns

_STYLE: Any = {  # matplotlib types the keys as one long Literal
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "figure.dpi": 100,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "grid.alpha": 0.6,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.2,
    "pdf.fonttype": 42,  # text stays text
    "ps.fonttype": 42,
    "savefig.dpi": 200,
    "svg.hashsalt": "ssat-probe",
    "xtick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.labelsize": 7,
    "ytick.major.width": 0.6,
}


@dataclass(frozen=True)
class Look:
    """How one line of a figure looks."""

    colour: str
    marker: str
    linestyle: str


# Colours of Okabe & Ito (2008), told apart with any colour vision; marker and dashes say it again.
LOOKS = {
    "scratch": Look("#009E73", "s", ":"),
    "ssl_ft": Look("#0072B2", "^", "--"),
    "ssat": Look("#D55E00", "o", "-"),
    "untrained": Look("#7f7f7f", "x", "-."),
}
METHOD_LABELS = {"scratch": "scratch", "ssl_ft": "SSL+FT", "ssat": "SSAT", "untrained": "untrained"}

# "Muted" scheme of Tol (2021). Nine colours, ten markers, four dashes: the first 36 lines differ in colour and dashes.
_COLOURS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#DDCC77", "#44AA99", "#AA4499", "#999933")
_MARKERS = "os^DvP<X>p"
_DASHES = ("-", "--", "-.", ":")

# Letters of a name below its dots.
_MOST_LETTERS = 10

# Markers of a line; more of them hide its dashes.
_MOST_MARKERS = 16

_NEUTRAL = "#e8e8e8"


@dataclass(frozen=True)
class Series:
    """Rows of a table that make one line: one checkpoint, or the seeds of one method."""

    label: str
    look: Look
    table: DataFrame
    num_seeds: int


def style() -> AbstractContextManager[None]:
    """The style of all figures, as a context; global settings are as before when it ends."""
    return mpl.rc_context(_STYLE)


def panels(
    rows: int = 1, columns: int = 1, *, width: float = PAGE_WIDTH, height: float = 2.6
) -> tuple[Figure, list[Axes]]:
    """An empty figure with a grid of panels, outside pyplot. Call inside `style`.

    Args:
        rows: Number of rows of panels.
        columns: Number of columns of panels.
        width: Inches, whole figure.
        height: Inches, whole figure.

    Returns:
        The figure and its panels, row by row.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def series(table: DataFrame) -> list[Series]:
    """The lines of a figure: one per method where a method has several seeds, else one per checkpoint.

    Only checkpoints of one method, model, data set and epoch with different seeds are put together. A method has its
    own look as long as it makes one line; otherwise every line has its own look from the palette.

    Args:
        table: A probe's table with the identity columns; other identity columns than ``checkpoint`` may be missing.

    Returns:
        In the order scratch, SSL+FT, SSAT, others, untrained; then in the order of the table.

    Raises:
        ValueError: If there is no column ``checkpoint``, or no row.
    """
    if "checkpoint" not in table or table.empty:
        raise ValueError(
            f"A figure needs rows with a column 'checkpoint', got {len(table)} rows with {', '.join(map(str, table))}. "
            "Pass the table that the probe wrote."
        )
    table = _with_identity(table)
    groups = list(_groups(table))
    methods = [str(rows["method"].iloc[0]) for rows in groups]
    order = sorted(range(len(groups)), key=lambda i: _rank(methods[i]))
    spare = itertools.count()
    result = []
    for i in order:
        is_alone = methods.count(methods[i]) == 1 and methods[i] in LOOKS
        look = LOOKS[methods[i]] if is_alone else _spare_look(next(spare))
        label = METHOD_LABELS[methods[i]] if is_alone else _label(groups[i], methods[i])
        result.append(Series(label, look, groups[i], groups[i]["checkpoint"].nunique()))
    return result


def lines_with_band(ax: Axes, table: DataFrame, x: str, y: str, **line: Any) -> list[Series]:
    """Draw ``y`` over ``x``: one line per method with a 95 % t interval over its seeds, else one per checkpoint.

    Rows of one checkpoint with equal ``x`` (heads, say) are averaged first. Undefined values leave gaps.

    Args:
        ax: Where to draw.
        table: A probe's table with the identity columns.
        x: Column for the x axis, numbers.
        y: Column for the y axis, numbers.
        line: Further settings of `Axes.plot`.

    Returns:
        What was drawn, one entry per line.
    """
    drawn = series(table)
    for place, one in enumerate(drawn):
        values = one.table.pivot_table(index=x, columns="checkpoint", values=y, aggfunc="mean", dropna=False)
        intervals = [t_interval(row) for row in values.to_numpy(dtype=float).tolist()]
        positions = values.index.to_numpy(dtype=float)
        if one.num_seeds > 1:
            low, high = [i.low for i in intervals], [i.high for i in intervals]
            face, edge = (one.look.colour, 0.16), (one.look.colour, 0.6)  # the edge tells overlapping bands apart
            ax.fill_between(positions, low, high, facecolor=face, edgecolor=edge, linewidth=0.5)
        look: dict[str, Any] = {"color": one.look.colour, "marker": one.look.marker, "linestyle": one.look.linestyle}
        step = -(-len(positions) // _MOST_MARKERS)
        look["markevery"] = (place % step, step)  # not all at the same places, so that they do not hide each other
        ax.plot(positions, [i.mean for i in intervals], label=one.label, **look | line)
    return drawn


def dots_by_series(ax: Axes, table: DataFrame, y: str) -> list[Series]:
    """One place on the x axis per line of `series`: a dot per checkpoint, and the mean with its 95 % t interval.

    Places have the names of the lines where these are short; else the legend, which the figure then needs, has them.

    Args:
        ax: Where to draw.
        table: A probe's table with the identity columns; rows of one checkpoint are averaged first.
        y: Column for the y axis, numbers.

    Returns:
        What was drawn, one entry per place.
    """
    drawn = series(table)
    for place, one in enumerate(drawn):
        values = one.table.groupby("checkpoint", sort=False)[y].mean().to_numpy(dtype=float)
        spread = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1)
        look: Any = {"color": one.look.colour, "marker": one.look.marker}
        ax.plot(place + spread, values, linestyle="", alpha=0.55, label=one.label, **look)
        if len(values) > 1:
            mean, low, high = t_interval(values.tolist())
            ax.errorbar(place + 0.25, mean, [[mean - low], [high - mean]], capsize=2.5, **look)
    is_short = all(len(one.label) <= _MOST_LETTERS for one in drawn)
    ax.set_xticks(range(len(drawn)), [one.label if is_short else "" for one in drawn])
    ax.set_xlim(-0.5, len(drawn) - 0.5 + 0.15)
    return drawn


def label_axes(ax: Axes, x: Column | str, y: Column | str, title: str = "") -> None:
    """Write the labels of both axes, with units, and the title.

    Args:
        ax: Whose labels.
        x: A column, or the text itself.
        y: A column, or the text itself.
        title: Above the panel.
    """
    ax.set_xlabel(x.label if isinstance(x, Column) else x)
    ax.set_ylabel(y.label if isinstance(y, Column) else y)
    if title:
        ax.set_title(title, loc="left")


def legend_below(figure: Figure, note: str = "") -> None:
    """One legend for all panels, below them, in as many columns as fit.

    Args:
        figure: Its height grows by what the legend needs, so that the panels keep theirs.
        note: Above the entries, such as what the bands are; in as many lines as it needs.
    """
    entries: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    width, height = figure.get_size_inches()
    columns = max(1, min(len(entries), int(width / (0.5 + 0.062 * max(map(len, entries))))))
    rows = -(-len(entries) // columns)
    note = textwrap.fill(note, int(18 * width))  # letters of 6.5 points
    figure.set_size_inches(width, height + 0.145 * rows + (0.16 + 0.1 * note.count("\n") if note else 0.0))
    title = {"title": note, "title_fontproperties": {"size": 6.5}} if note else {}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, **title)


def band_note(drawn: Sequence[Series]) -> str:
    """What the bands of a figure are, in a few words; empty if there are none.

    Args:
        drawn: What `lines_with_band` gave back.

    Returns:
        For `legend_below`.
    """
    seeds = sorted({one.num_seeds for one in drawn if one.num_seeds > 1})
    if not seeds:
        return ""
    return f"line: mean over {' or '.join(map(str, seeds))} seeds; band: 95 % t interval"


def shade(ax: Axes, spans: Sequence[tuple[float, float]], label: str = "") -> None:
    """Grey bands behind the lines.

    Args:
        ax: Where to draw.
        spans: Begin and end of each band on the x axis.
        label: Entry in the legend, written once.
    """
    for i, (begin, end) in enumerate(spans):
        ax.axvspan(begin, end, color=_NEUTRAL, zorder=0, linewidth=0, label=label if i == 0 else None)


def keep_within(ax: Axes, low: float, high: float) -> None:
    """Cut the y axis where no value can be, though a t interval may reach there.

    Args:
        ax: Whose y axis; drawn already.
        low: Smallest possible value.
        high: Largest possible value.
    """
    margin = 0.03 * (high - low)
    bottom, top = ax.get_ylim()
    ax.set_ylim(max(bottom, low - margin), min(top, high + margin))


def save(figure: Figure, path_stem: Path) -> list[Path]:
    """Write a figure as png (200 dpi) and pdf, whole or not at all, without dates, and close it.

    Args:
        figure: Gone from pyplot afterwards, if it ever was there.
        path_stem: Path without ending; its folder is made, with a ValueError if it cannot be written.

    Returns:
        The two paths.
    """
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": "ssat-probe", "Producer": None},
    }
    contents = {}
    with style():
        for ending, entries in metadata.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending, metadata=entries)
            contents[ending] = buffer.getvalue()
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(figure)
    return [
        write_atomically(path_stem.with_name(f"{path_stem.name}.{ending}"), data) for ending, data in contents.items()
    ]


def _with_identity(table: DataFrame) -> DataFrame:
    """Copy with all identity columns as text; what csv made NaN is empty again."""
    table = table.copy()
    for name in ("checkpoint", "model", "method", "data", "seed", "epoch", "setting"):
        if name in table:
            table[name] = table[name].astype(object).where(table[name].notna(), "").map(str)
        else:
            table[name] = ""
    return table


def _groups(table: DataFrame) -> Iterator[DataFrame]:
    """Rows per line."""
    # Names of checkpoints of a sweep begin with where on its axes they stand, as in "mask_ratio=0.5/vit_nano-...".
    points = table["checkpoint"].str.extract(r"^([\w.+-]+=[^/]*)/", expand=False).fillna("").rename("point")
    keys = [*(table[name] for name in ("model", "data", "method", "epoch", "setting")), points]
    for (_, _, method, *_), rows in table.groupby(keys, sort=False):
        checkpoints = rows.drop_duplicates("checkpoint")
        seeds = checkpoints["seed"]
        if method and len(seeds) > 1 and seeds.is_unique:
            yield rows
        else:
            yield from (one for _, one in rows.groupby("checkpoint", sort=False))


def _rank(method: str) -> int:
    """Untrained networks are what the others are compared with, and come last."""
    order = [name for name in LOOKS if name != "untrained"]
    return order.index(method) if method in order else len(order) + (method == "untrained")


def _spare_look(i: int) -> Look:
    return Look(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)], _DASHES[i % len(_DASHES)])


def _label(rows: DataFrame, method: str) -> str:
    """Name of a line whose method alone would not tell it from others."""
    first = rows.iloc[0]
    readable = METHOD_LABELS.get(method, method)
    if rows["checkpoint"].nunique() > 1:
        point, slash, _ = str(first["checkpoint"]).partition("/")
        epoch = first["epoch"] and f"epoch {first['epoch']}"
        parts = (readable, slash and point, first["model"], first["data"], epoch)
        return ", ".join(part for part in parts if part)
    name = str(first["checkpoint"])
    return name if not method or method in name or readable in name else f"{name} ({readable})"
