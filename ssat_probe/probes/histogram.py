"""Distribution of the attention weights, per block."""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from ssat_probe.paired import Paired
from ssat_probe.table import Column, with_difference, with_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.geometry import Rows
    from ssat_probe.observation import Observation, Sum, Values
    from ssat_probe.subject import Subject

_SHARE = Column("share", "", "share of the weights in the bin; sums to 1 over the bins of a block")
_MASS = Column("mass", "", "share of the attention that the weights in the bin hold")
_NAMES = ("share", "mass")

# Weights per decade below which nothing is drawn: one in a thousand.
_LEAST_DENSITY = 1e-3

# Blocks drawn, evenly over the depth; more panels would not be legible.
_MOST_PANELS = 6


@dataclass(frozen=True)
class Probe(Paired):
    """Distribution of the attention weights, per block."""

    untrained_twin: bool = True
    "Also measure the untrained network of the same architecture and seed, as a reference; =false leaves it out."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("block", "", "transformer block, 0 next to the input"),
        Column("log_weight", "log10", "middle of the bin of weight x number of keys: 0 is uniform attention"),
        *with_spread(_SHARE),
        Column("density", "1/decade", "share / width of the bin"),
        *with_spread(_MASS),
        *with_difference(_SHARE),
        *with_difference(_MASS),
        Column("num_images", "", "number of images"),
    )
    policy: ClassVar[str] = "queries patch, keys patch"

    def observe(self, subject: "Subject") -> "Observation":
        """Means over the images; queries and keys are patch tokens, rows renormalised over these."""
        from ssat_probe import capture, geometry, observation

        blocks = capture.blocks_with(subject.model, "patch")
        return observation.of_attention(subject, lambda one: _sums(geometry.arranged(one)), _shares, blocks)

    def tabulate(self, seen: "Observation", first: "Observation | None") -> "DataFrame":
        """One row per block and bin."""
        from pandas import DataFrame

        from ssat_probe.measures.histogram import EDGES

        rows = []
        for block, one in seen.statistics.items():
            other = first.statistics[block] if first else None
            for i, (low, high) in enumerate(pairwise(EDGES)):
                row = {"block": block, "log_weight": (low + high) / 2, "num_images": seen.num_images}
                row |= one.spread("share", i) | one.spread("mass", i) | one.differences(_NAMES, other, i)
                rows.append(row | {"density": row["share"] / (high - low)})
        return DataFrame(rows)[[column.name for column in self.columns]]

    def draw(self, table: "DataFrame") -> "Figure":
        """Density of the weights on a logarithmic axis, a panel per block.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            Up to six panels, evenly over the depth.
        """
        import numpy as np

        from ssat_probe import drawing

        blocks = np.sort(table["block"].unique())
        blocks = blocks[np.unique(np.linspace(0, len(blocks) - 1, min(_MOST_PANELS, len(blocks))).round().astype(int))]
        seen = table[table["share"] > 0]["log_weight"]
        columns = min(3, len(blocks))
        with drawing.style():
            figure, axes = drawing.panels(-(-len(blocks) // columns), columns, height=2.1 * -(-len(blocks) // columns))
            for ax, block in zip(axes, blocks, strict=False):
                ax.axvline(0, color="0.5", linewidth=1, label="uniform attention")
                drawn = drawing.lines_with_band(ax, table[table["block"] == block], "log_weight", "density", marker="")
                ax.set_xlim(seen.min() - 0.25, max(seen.max(), 0) + 0.25)
                ax.set_yscale("log")
                ax.set_ylim(_LEAST_DENSITY, 10)
                drawing.label_axes(ax, "log10(weight × keys)", "weights per decade", f"Block {block}")
            for ax in axes[len(blocks) :]:
                ax.remove()
            drawing.legend_below(figure, drawing.band_note(drawn))
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """Tails of the distribution.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            One row per checkpoint and block.
        """
        from pandas import DataFrame

        rows = []
        for (checkpoint, block), one in table.groupby(["checkpoint", "block"], sort=False):
            low, high = one["log_weight"] < -1, one["log_weight"] > 1
            rows.append(
                {
                    "checkpoint": checkpoint,
                    "block": block,
                    "weights below 1/10 of uniform": one["share"][low].sum(),
                    "weights above 10 x uniform": one["share"][high].sum(),
                    "attention these hold": one["mass"][high].sum(),
                }
            )
        return DataFrame(rows)


def _sums(seen: "Rows") -> "dict[str, Tensor | Sum]":
    """Weights and mass per image and bin, of a chunk."""
    from ssat_probe.measures.heads import log_weights
    from ssat_probe.measures.histogram import histogram_sums
    from ssat_probe.observation import Sum

    counts, mass = histogram_sums(log_weights(seen.rows, are_scores=seen.has_scores))
    return {"share": Sum(counts), "mass": Sum(mass)}


def _shares(values: "Values") -> "tuple[Values, Values]":
    """Shares per image and bin."""
    return {name: value / value.sum(-1, keepdim=True) for name, value in values.items()}, {}
