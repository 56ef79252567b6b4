"""Similarity of representations (CKA) between the blocks of one or several checkpoints."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ssat_probe.registry import known
from ssat_probe.table import Column, with_difference, with_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.drawing import Series
    from ssat_probe.grams import Grams
    from ssat_probe.subject import Subject

    Values = dict[str, Tensor]

_CKA = Column("cka", "", "centred kernel alignment, unbiased: 1 equal but for rotation; undefined if constant")

# Matrices are drawn for the pairs of so many lines; more would not be legible.
_MOST_MATRICES = 3


@dataclass(frozen=True)
class Probe:
    """Similarity of representations (CKA) between the blocks of one or several checkpoints."""

    mode: Literal["gap", "cls", "flatten", "token"] = "gap"
    "Features of an image: mean of its patch tokens, class token, or all patch tokens; token: each patch for itself."
    group: int = 64
    "Images compared at a time, at least 4; what is left over is dropped. Few images make one group."
    grams: Path | None = None
    "Folder that keeps what was seen of each checkpoint: one that is there needs no new pass over the images."
    untrained_twin: bool = True
    "Also measure the untrained network of the same architecture and seed, as a reference; =false leaves it out."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("block", "", "transformer block whose output is compared, 0 next to the input; -1 before the first"),
        Column("other", "", "checkpoint compared with, also the same one"),
        Column("other_block", "", "its block"),
        *with_spread(_CKA),
        *with_spread(Column("cka_shuffled", "", "the same with unrelated images: around 0; undefined if constant")),
        *with_difference(_CKA),
        Column("other_setting", "", "size, grid and preparation of the images before the checkpoint compared with"),
        Column("mode", "", "features of an image: gap, cls, flatten or token"),
        Column("group", "", "images (tokens in mode token) compared at a time"),
        Column("num_images", "", "number of images used"),
    )

    @property
    def policy(self) -> str:
        """Of what the measures are taken."""
        return f"features {self.mode}, groups of {self.group}"

    def measure(self, subject: "Subject") -> "DataFrame":
        """One row per pair of blocks.

        Args:
            subject: Its model is in eval mode and has ``blocks`` and ``num_prefix_tokens``.

        Returns:
            The columns of this probe; ``other`` is the checkpoint's own label.
        """
        return self.between(iter([(subject.checkpoint.label, subject)]))[0]

    def between(self, subjects: "Iterator[tuple[str, Subject]]") -> "list[DataFrame]":
        """One row per pair of blocks of every two checkpoints; each passes over the images once.

        Args:
            subjects: Labels and subjects.

        Returns:
            A table per subject, with all subjects as ``other``.

        Raises:
            ValueError: If the checkpoints see different images, or in mode ``token`` have different grids.
        """
        from ssat_probe import grams

        seen: dict[str, Grams] = {}
        known(self.mode, ("gap", "cls", "flatten", "token"), "modes")
        for label, subject in subjects:
            seen[label] = grams.of(subject, self.mode, self.group, self.grams)
            first = next(iter(seen))
            if seen[label].images != seen[first].images:
                raise ValueError(
                    f"CKA compares the same images, got others for {label} than for {first}. "
                    "Choose one data set and image size for all with --data, or compare fewer checkpoints."
                )
            if self.mode == "token" and seen[label].num_tokens != seen[first].num_tokens:
                raise ValueError(
                    f"CKA of mode 'token' needs equal grids, got {seen[label].num_tokens} tokens of {label} and "
                    f"{seen[first].num_tokens} of {first}. Use mode 'gap'."
                )
        firsts = {label: _compared(seen[first], other) for label, other in seen.items()}
        return [self._table(label, seen, firsts) for label in seen]

    def _table(self, name: str, seen: "dict[str, Grams]", firsts: "dict[str, Values]") -> "DataFrame":
        from pandas import DataFrame

        rows = []
        one, first = seen[name], next(iter(seen))
        for label, other in seen.items():
            values = firsts[label] if name == first else _compared(one, other)
            values = values | _difference(values, firsts[first if label == name else label], one, seen[first])
            rows += [
                {"block": block, "other": label, "other_block": other_block, "other_setting": other.setting}
                | {name: float(value[i, j]) for name, value in values.items() if value.ndim == 2}
                for i, block in enumerate(one.blocks)
                for j, other_block in enumerate(other.blocks)
            ]
        shared = {"mode": self.mode, "group": one.values.shape[-1], "num_images": one.num_images}
        return DataFrame(rows).assign(**shared)[[column.name for column in self.columns]]

    def draw(self, table: "DataFrame") -> "Figure":
        """Matrices of the blocks of every two lines; how each block differs from the first line and from its own end.

        Args:
            table: What `measure` or `between` gave, for one or more checkpoints.

        Returns:
            Matrices, one or two panels of lines, and the scale of colours.
        """
        from ssat_probe import drawing

        drawn = drawing.series(table)
        shown = drawn[:_MOST_MATRICES]
        size = len(shown)
        own = table[table["checkpoint"] == table["other"]]
        own = own[own["other_block"] == own.groupby("checkpoint")["other_block"].transform("max")]
        with drawing.style():
            width = drawing.COLUMN_WIDTH * 1.7 if size == 1 else drawing.PAGE_WIDTH * (1.15 if size == 3 else 1)
            figure, axes = drawing.panels(size, size + 1, width=width, height=2.3 if size == 1 else 1.75 * size)
            matrices = [ax for i, ax in enumerate(axes) if i % (size + 1) < size]
            aside = axes[size :: size + 1]
            for place, ax in enumerate(matrices):
                mesh = _matrix(ax, shown[place // size], shown[place % size])
            lines = drawing.lines_with_band(aside[0], own, "block", "cka")
            drawing.label_axes(aside[0], "block", "CKA with own last block", "Depth")
            for ax in aside[1:]:
                ax.remove()
            if size > 1:
                grid: Any = axes[0].get_subplotspec()
                ax = figure.add_subplot(grid.get_gridspec()[1:, size])
                first = _same_block(table, shown[0])
                drawing.lines_with_band(ax, first, "block", "cka")
                drawing.label_axes(ax, "block", f"CKA with {_short(shown[0].label)}, same block", "Between")
            bar = figure.colorbar(mesh, ax=matrices, shrink=0.6, location="left", aspect=30)
            bar.set_label("CKA")
            left_out = f"; matrices: the first {size} of {len(drawn)}" if size < len(drawn) else ""
            is_mixed = "other_setting" in table and (table["setting"] != table["other_setting"]).any()
            mark = "; settings differ between checkpoints" if is_mixed else ""
            note = (drawing.band_note(lines) + left_out + mark).removeprefix("; ")
            drawing.legend_below(figure, note)
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """Similarity at equal depth and at the end.

        Args:
            table: What `measure` or `between` gave, for one or more checkpoints.

        Returns:
            One row per checkpoint and other.
        """
        from pandas import DataFrame

        rows = []
        for (checkpoint, other), one in table.groupby(["checkpoint", "other"], sort=False):
            same = one[one["block"] == one["other_block"]]
            last = one[(one["block"] == one["block"].max()) & (one["other_block"] == one["other_block"].max())]
            rows.append(
                {
                    "checkpoint": checkpoint,
                    "other": other,
                    "mode": one["mode"].iloc[0],
                    "CKA of equal blocks": same["cka"].mean(),
                    "CKA of the last blocks": last["cka"].mean(),
                    "with unrelated images": one["cka_shuffled"].mean(),
                }
            )
        return DataFrame(rows)


def _compared(one: "Grams", other: "Grams") -> "Values":
    """CKA of every two blocks with its spread, and that with unrelated images."""
    from ssat_probe.measures.similarity import cka, cka_spread, shuffled

    values = {}
    for name, grams in (("cka", other.values), ("cka_shuffled", shuffled(other.values))):
        values[name] = cka(one.values, grams)
        values |= {f"{name}_{end}": value for end, value in cka_spread(one.values, grams, one.ids).items()}
        values[f"{name}_undefined"] = values[name].isnan().double()
    return values


def _difference(mine: "Values", firsts: "Values", one: "Grams", first: "Grams") -> "Values":
    """To the first checkpoint's CKA with the same other, or with itself where this is compared with itself; paired."""
    from torch import full_like, nan

    from ssat_probe.measures.bootstrap import ends

    names = [f"cka_difference{end}" for end in ("", "_low", "_high")]
    if one is first or (one.setting, one.blocks) != (first.setting, first.blocks):
        return dict.fromkeys(names, full_like(mine["cka"], nan))
    low, high = ends(mine["cka_replicates"] - firsts["cka_replicates"])
    return dict(zip(names, (mine["cka"] - firsts["cka"], low, high), strict=True))


def _same_block(table: "DataFrame", first: "Series") -> "DataFrame":
    """Rows that compare a block with the same one of the first line, of other checkpoints where it has several."""
    rows = table[(table["block"] == table["other_block"]) & table["other"].isin(first.table["checkpoint"])]
    return rows[rows["other"] != rows["checkpoint"]] if first.num_seeds > 1 else rows


def _matrix(ax: "Axes", one: "Series", other: "Series") -> "QuadMesh":
    """Mean CKA over the pairs of checkpoints of two lines, unless these are the same checkpoint."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    rows = one.table[one.table["other"].isin(other.table["checkpoint"])]
    if one.label == other.label and one.num_seeds > 1 and (rows["other"] != rows["checkpoint"]).any():
        rows = rows[rows["other"] != rows["checkpoint"]]
    values = rows.pivot_table(index="block", columns="other_block", values="cka", aggfunc="mean", dropna=False)
    edges = [np.append(axis[:1].to_numpy() - 0.5, axis.to_numpy() + 0.5) for axis in (values.columns, values.index)]
    mesh = ax.pcolormesh(*edges, values.to_numpy(dtype=float), cmap="cividis", vmin=0, vmax=1)
    ax.grid(visible=False)
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.set_xlabel(f"block, {_short(other.label)}")
    ax.set_ylabel(f"block, {_short(one.label)}")
    return mesh


def _short(label: str) -> str:
    return label if len(label) <= 14 else f"…{label[-13:]}"
