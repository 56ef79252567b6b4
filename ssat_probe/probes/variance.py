"""Variance of the feature maps over the depth of the network."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ssat_probe.paired import Paired
from ssat_probe.registry import known
from ssat_probe.table import Column, with_difference, with_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.measures.bootstrap import ImageStatistics
    from ssat_probe.observation import Observation
    from ssat_probe.subject import Subject

# Variances that span more than this factor are drawn on a logarithmic axis.
_WIDE_RANGE = 30

_MEASURES = (
    Column("variance", "activation²", "variance over the positions of an image, mean over channels and images"),
    Column("relative_variance", "", "share of the feature energy that differs over positions: 0 all equal, 1 all"),
)
_NAMES = tuple(column.name for column in _MEASURES)


@dataclass(frozen=True)
class Probe(Paired):
    """Variance of the feature maps over the depth of the network."""

    parity: Literal["", "park_kim"] = ""
    "park_kim: the variance by the operations of Park & Kim's code, in the arithmetic of the model."
    untrained_twin: bool = True
    "Also measure the untrained network of the same architecture and seed, as a reference; =false leaves it out."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("index", "", "place in the residual stream: 0 for embed, then in the order of the forward pass"),
        Column("block", "", "transformer block, 0 next to the input; -1 for embed, the next one for merge"),
        Column("site", "", "embed, after the attention or the mlp of a block, or merge: before a later stage"),
        Column("stage", "", "stage of a hierarchical model, 0 next to the input; values compare within one alone"),
        Column("depth", "", "index / (number of sites - 1): 0 at the input, 1 at the end"),
        *(column for one in _MEASURES for column in with_spread(one)),
        *with_spread(
            Column("gain", "log2", "log2(variance / variance before); undefined at embed and where a stage begins")
        ),
        *(column for one in _MEASURES for column in with_difference(one)),
        Column("num_images", "", "number of images"),
    )

    @property
    def policy(self) -> str:
        """Of what the measures are taken."""
        return f"tokens patch, parity {self.parity}" if self.parity else "tokens patch"

    def observe(self, subject: "Subject") -> "Observation":
        """Means over the images."""
        from ssat_probe import observation
        from ssat_probe.measures.features import both_variances, park_kim_variance

        known(self.parity, ("", "park_kim"), "parities")

        def measure(tokens: "Tensor") -> "dict[str, Tensor]":
            variance, relative = both_variances(tokens)
            variance = park_kim_variance(tokens) if self.parity else variance
            return {"variance": variance, "relative_variance": relative}

        return observation.of_features(subject, measure)

    def tabulate(self, seen: "Observation", first: "Observation | None") -> "DataFrame":
        """One row per site."""
        from pandas import DataFrame

        rows, before, stage = [], None, 0
        for site, one in seen.statistics.items():
            row: dict[str, Any] = {"index": site.index, "block": site.block, "site": site.name, "stage": site.stage}
            row |= {"depth": site.index / (len(seen.statistics) - 1), "num_images": seen.num_images}
            row |= one.spread("variance") | one.spread("relative_variance")
            row |= one.differences(_NAMES, first.statistics[site] if first else None)
            rows.append(row | _gain(before if site.stage == stage else None, one))
            before, stage = one, site.stage
        return DataFrame(rows)[[column.name for column in self.columns]]

    def draw(self, table: "DataFrame") -> "Figure":
        """Variance and relative variance over normalised depth; grey where attention acts, a gap between stages.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            Two panels.
        """
        from pandas import concat

        from ssat_probe import drawing

        column = {column.name: column for column in self.columns}
        orders = {tuple(one.sort_values("index")["site"]) for _, one in table.groupby("checkpoint")}
        borders = _borders(table)
        with drawing.style():
            figure, axes = drawing.panels(1, 2)
            for ax, name in zip(axes, ("variance", "relative_variance"), strict=True):
                if len(orders) == 1:
                    order = next(iter(orders))
                    last = len(order) - 1
                    spans = [((i - 1) / last, i / last) for i, site in enumerate(order) if site == "attention"]
                    drawing.shade(ax, spans, "attention step")
                drawn = drawing.lines_with_band(ax, concat([table, borders]) if len(borders) else table, "depth", name)
                for depth in borders["depth"].unique():
                    ax.axvline(depth, color="0.5", linewidth=0.8, linestyle=":", label="next stage: another grid")
                if table[name].max() > _WIDE_RANGE * table[name].min() > 0:
                    ax.set_yscale("log")
                ax.margins(x=0.02)
            drawing.keep_within(axes[1], 0, 1)
            label = f"variance [{column['variance'].unit}]"
            drawing.label_axes(axes[0], "normalised depth", label, "Feature-map variance")
            drawing.label_axes(axes[1], "normalised depth", "share of energy over positions", "Scale-free form")
            drawing.legend_below(figure, drawing.band_note(drawn))
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """First and last variance, and what attention and MLP do to it on average.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            One row per checkpoint.
        """
        from pandas import DataFrame

        rows = []
        for checkpoint, one in table.groupby("checkpoint", sort=False):
            one = one.sort_values("index")
            gains = one.groupby("site")["gain"].mean()
            rows.append(
                {
                    "checkpoint": checkpoint,
                    "variance at embed": one["variance"].iloc[0],
                    "variance at the end": one["variance"].iloc[-1],
                    "relative at embed": one["relative_variance"].iloc[0],
                    "relative at the end": one["relative_variance"].iloc[-1],
                    "gain per attention": gains["attention"],
                    "gain per mlp": gains["mlp"],
                }
            )
        return DataFrame(rows)


def _gain(before: "ImageStatistics | None", after: "ImageStatistics") -> dict[str, float]:
    """Gain of variance over a step with its spread; undefined at the beginning of a stage."""
    from ssat_probe.measures.bootstrap import ends
    from ssat_probe.measures.features import gain

    if before is None:
        return dict.fromkeys(("gain", "gain_sd", "gain_low", "gain_high"), math.nan) | {"gain_undefined": 1.0}
    value = float(gain(before.mean("variance"), after.mean("variance")))
    gains = gain(before.replicates("variance"), after.replicates("variance"))
    low, high = ends(gains)
    # Resamples deviate by 1/√images of what each image adds to the gain, to first order.
    squares = (gains - gains.nanmean()).square().nanmean() * after.count("variance")
    spread = {"gain_sd": float(squares.sqrt()), "gain_low": float(low), "gain_high": float(high)}
    return {"gain": value, "gain_undefined": float(math.isnan(value))} | spread


def _borders(table: "DataFrame") -> "DataFrame":
    """A row without values between the stages of each checkpoint, so that no line runs across."""
    from pandas import concat

    if "stage" not in table or table["stage"].max() == 0:
        return table.iloc[:0]
    rows = []
    for _, one in table.groupby("checkpoint", sort=False):
        one = one.sort_values("index")
        begins = one["stage"].diff() > 0
        middle = (one["depth"] + one["depth"].shift()) / 2
        rows.append(one.assign(depth=middle, **dict.fromkeys(_NAMES, float("nan")))[begins])
    return concat(rows)
