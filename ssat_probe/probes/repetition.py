"""How much blocks repeat each other: similarity of the attention maps of every two of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.paired import Paired
from ssat_probe.table import Column, with_difference, with_spread

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.drawing import Series
    from ssat_probe.geometry import Rows
    from ssat_probe.observation import Observation, Values
    from ssat_probe.subject import Subject

_MEASURES = (
    Column("cosine", "", "cosine between rows of attention of the two blocks, heads of the same number: 1 the same"),
    Column("cosine_mean", "", "the same between attention averaged over the heads, which have no common order"),
    Column("correlation", "", "correlation over the keys, heads of the same number: 0 unrelated; undefined where all "
        "weights of a row are equal"),
    Column("correlation_mean", "", "the same between attention averaged over the heads; undefined likewise"),
)  # fmt: skip
_PAIRED = ("cosine", "correlation")

# Weights of all blocks that are compared at a time: a megabyte in float64. Tuned, no source.
_MOST_WEIGHTS = 2**17

# Matrices are drawn for so many lines; more would not be legible.
_MOST_MATRICES = 3


@dataclass(frozen=True)
class Probe(Paired):
    """How much blocks repeat each other: similarity of the attention maps of every two of them."""

    untrained_twin: bool = True
    "Also measure the untrained network of the same architecture and seed, as a reference; =false leaves it out."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("block", "", "transformer block, 0 next to the input"),
        Column("other_block", "", "an earlier one whose patches attend over the same keys"),
        *(column for one in _MEASURES for column in with_spread(one)),
        *(column for one in _MEASURES if one.name in _PAIRED for column in with_difference(one)),
        Column("num_images", "", "number of images"),
    )
    policy: ClassVar[str] = "queries patch, keys patch"

    def observe(self, subject: "Subject") -> "Observation":
        """Means over the images."""
        from ssat_probe import observation

        return observation.of_maps(subject, _pairs)

    def tabulate(self, seen: "Observation", first: "Observation | None") -> "DataFrame":
        """One row per pair of blocks that compare."""
        from pandas import DataFrame

        rows = []
        for place, one in seen.statistics.items():
            row: dict[str, Any] = {"block": place[1], "other_block": place[0], "num_images": seen.num_images}
            for measure in _MEASURES:
                row |= one.spread(measure.name)
            rows.append(row | one.differences(_PAIRED, first.statistics[place] if first else None))
        return DataFrame(rows)[[column.name for column in self.columns]]

    def draw(self, table: "DataFrame") -> "Figure":
        """Neighbouring blocks, blocks over their distance, and matrices of the first lines.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            Three panels of lines, and up to three matrices with their scale of colours.
        """
        import numpy as np
        from matplotlib.ticker import MaxNLocator

        from ssat_probe import drawing

        table = table.assign(distance=table["block"] - table["other_block"])
        neighbours = table[table["distance"] == 1]
        with drawing.style():
            figure, axes = drawing.panels(2, 3, height=4.6)
            lines = (
                (neighbours, "block", "cosine", "block", "cosine with the block before", "Neighbours"),
                (neighbours, "block", "correlation", "block", "correlation with the block before", "Neighbours"),
                (table, "distance", "correlation", "blocks apart", "correlation", "Over the distance"),
            )
            for ax, (rows, x, y, x_label, y_label, title) in zip(axes, lines, strict=False):
                drawn = drawing.lines_with_band(ax, rows, x, y)
                drawing.keep_within(ax, 0 if y == "cosine" else -1, 1)
                ax.xaxis.set_major_locator(MaxNLocator(integer=True))
                drawing.label_axes(ax, x_label, y_label, title)
            shown = drawing.series(table)[:_MOST_MATRICES]
            matrices = [_matrix_of(one) for one in shown]
            largest = max(float(np.nanmax(np.abs(values), initial=0.1)) for values in matrices)
            for ax, one, values in zip(axes[3:], shown, matrices, strict=False):
                mesh = _draw_matrix(ax, values, largest, one.label)
            for ax in axes[3 + len(shown) :]:
                ax.remove()
            figure.colorbar(mesh, ax=axes[3 : 3 + len(shown)], shrink=0.8, aspect=15).set_label("correlation")
            left_out = f"; matrices: the first {len(shown)} of {len(drawn)}" if len(shown) < len(drawn) else ""
            drawing.legend_below(figure, (drawing.band_note(drawn) + left_out).removeprefix("; "))
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """Each block and the one before it.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            One row per checkpoint and block, without blocks that the one before does not compare with.
        """
        names = ["checkpoint", "block", "other_block", *(column.name for column in _MEASURES)]
        latest = table.groupby(["checkpoint", "block"], sort=False)["other_block"].transform("max")
        return table[table["other_block"] == latest][names].reset_index(drop=True)


def _pairs(maps: "Mapping[int, Rows]") -> "dict[tuple[int, int], Values]":
    """Each measure per image, by pair of blocks (earlier, later) whose rows lie over the same keys."""
    found: dict[tuple[int, int], Values] = {}
    for group in _alike(maps):
        means = _of_group([maps[block] for block in group]) if len(group) > 1 else {}
        for j, later in enumerate(group):
            for i, earlier in enumerate(group[:j]):
                found[earlier, later] = {name: value[:, i, j] for name, value in means.items()}
    if not found:
        raise ValueError(
            "Two blocks of the model must attend over the same patches with as many heads, got none; choose a deeper "
            "model, or the probe 'similarity'."
        )
    return {place: found[place] for place in sorted(found, key=lambda place: place[::-1])}


def _of_group(blocks: "Sequence[Rows]") -> "Values":
    """Each measure per image, block and block: means over heads and queries, some queries at a time."""
    shape = blocks[0].rows.shape
    size = max(1, _MOST_WEIGHTS * shape[2] // (len(blocks) * blocks[0].rows.numel()))
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for start in range(0, shape[2], size):
        for name, value in _of_queries(blocks, slice(start, start + size)).items():
            sums[name] = value.flatten(3).nansum(-1) + sums.get(name, 0)
            counts[name] = (~value.isnan()).flatten(3).sum(-1) + counts.get(name, 0)
    return {name: value / counts[name] for name, value in sums.items()}


def _of_queries(blocks: "Sequence[Rows]", queries: slice) -> "Values":
    """(image, block, block, head, query) of each measure."""
    import torch

    from ssat_probe.measures.attention import renormalised, weights_from_scores
    from ssat_probe.measures.repetition import correlation_of_maps, cosine_of_maps

    weights = torch.stack(
        [(weights_from_scores if one.has_scores else renormalised)(one.rows[:, :, queries]) for one in blocks]
    )
    is_valid = blocks[0].is_valid  # the same for all, where they lie in the same windows
    if is_valid is not None:
        is_valid = is_valid.expand(*is_valid.shape[:2], *blocks[0].rows.shape[2:])[:, :, queries]
    values = {}
    for end, each in (("", weights), ("_mean", weights.mean(2, keepdim=True))):
        values[f"cosine{end}"] = cosine_of_maps(each)
        counted = each if is_valid is None else each.masked_fill(~is_valid, torch.nan)
        values[f"correlation{end}"] = correlation_of_maps(counted)
    return values


def _alike(maps: "Mapping[int, Rows]") -> list[list[int]]:
    """Blocks with as many heads whose queries and keys lie at the same places, in the same windows."""
    import torch

    groups: list[list[int]] = []
    for block, one in maps.items():
        for group in groups:
            first = maps[group[0]]
            names = ("query_places", "window_places", "windows")
            is_same = all(torch.equal(getattr(first, name), getattr(one, name)) for name in names)
            if first.rows.shape == one.rows.shape and is_same:
                group.append(block)
                break
        else:
            groups.append([block])
    return groups


def _matrix_of(one: "Series") -> "np.ndarray":
    """Mean correlation of every two blocks over the checkpoints of a line; NaN where they do not compare."""
    import numpy as np

    means = one.table.groupby(["block", "other_block"])["correlation"].mean().reset_index()
    size = int(one.table["block"].max()) + 1
    values = np.full((size, size), np.nan)
    for block, other, value in means.itertuples(index=False):
        values[block, other] = values[other, block] = value
    return values


def _draw_matrix(ax: "Axes", values: "np.ndarray", largest: float, label: str) -> "QuadMesh":
    """Colours from -largest to largest; grey where blocks do not compare."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    from ssat_probe import drawing

    edges = np.arange(len(values) + 1) - 0.5
    mesh = ax.pcolormesh(edges, edges, values, cmap="PuOr_r", vmin=-largest, vmax=largest)
    ax.grid(visible=False)
    ax.set_facecolor("0.8")
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    drawing.label_axes(ax, "block", "block", label if len(label) <= 24 else f"…{label[-23:]}")
    return mesh
