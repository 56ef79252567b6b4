"""Spectrum of the features: singular values of the patch tokens of an image, per block."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.paired import Paired
from ssat_probe.table import Column, with_difference, with_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.observation import Observation
    from ssat_probe.subject import Subject

_EQUAL = "undefined where all tokens are equal"
_MEASURES = (
    Column("log_value", "ln", f"ln of a singular value of the tokens' covariance (parity cl_vs_mim); {_EQUAL}"),
    Column("energy_share", "", f"that singular value / sum of all; {_EQUAL}"),
)
_NAMES = tuple(column.name for column in _MEASURES)

# Singular values of a covariance below this share of the largest are rounding; they are drawn there.
_LEAST = 1e-12

# Blocks drawn, evenly over the depth; more panels would not be legible.
_MOST_PANELS = 3


@dataclass(frozen=True)
class Probe(Paired):
    """Spectrum of the features: singular values of the patch tokens of an image, per block."""

    standardize: bool = False
    "Centre each channel over the positions of an image and divide by its deviation there, so that few do not rule."
    untrained_twin: bool = True
    "Also measure the untrained network of the same architecture and seed, as a reference; =false leaves it out."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("block", "", "transformer block whose output is looked at, 0 next to the input; -1 before the first"),
        Column("rank", "", "place of the singular value, 1 the largest"),
        *(column for one in _MEASURES for column in with_spread(one)),
        *(column for one in _MEASURES for column in with_difference(one)),
        Column("num_images", "", "number of images"),
    )

    @property
    def policy(self) -> str:
        """Of what the measures are taken."""
        return "tokens patch, standardised" if self.standardize else "tokens patch"

    def observe(self, subject: "Subject") -> "Observation":
        """Means over the images."""
        from ssat_probe import observation

        return observation.of_features(
            subject, lambda tokens: _measured(tokens, self.standardize), lambda site: site.name in ("embed", "mlp")
        )

    def tabulate(self, seen: "Observation", first: "Observation | None") -> "DataFrame":
        """One row per block and singular value."""
        from pandas import DataFrame

        rows: list[dict[str, Any]] = []
        for site, one in seen.statistics.items():
            count = len(one.mean("log_value"))
            other = first.statistics[site] if first else None
            if other is not None and len(other.mean("log_value")) != count:  # another width
                other = None
            for place in range(count):
                row: dict[str, Any] = {"block": site.block, "rank": place + 1, "num_images": seen.num_images}
                for name in _NAMES:
                    row |= one.spread(name, place)
                rows.append(row | one.differences(_NAMES, other, place))
        return DataFrame(rows)[[column.name for column in self.columns]]

    def draw(self, table: "DataFrame") -> "Figure":
        """Singular values by rank, a panel each for the beginning, the middle and the end.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            At most three panels.
        """
        import numpy as np
        from matplotlib.ticker import MaxNLocator

        from ssat_probe import drawing

        blocks = np.sort(table["block"].unique())
        shown = blocks[np.unique(np.linspace(0, len(blocks) - 1, min(_MOST_PANELS, len(blocks))).round().astype(int))]
        with drawing.style():
            figure, axes = drawing.panels(1, len(shown))
            for ax, block in zip(axes, shown, strict=True):
                rows = table[table["block"] == block]
                drawn = drawing.lines_with_band(ax, rows, "rank", "log_value", marker="")
                ax.xaxis.set_major_locator(MaxNLocator(integer=True))
                title = "Before the first block" if block < 0 else f"After block {block}"
                drawing.label_axes(ax, "rank", "ln singular value of the covariance", title)
            drawing.legend_below(figure, drawing.band_note(drawn))
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """How much the first directions hold.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            One row per checkpoint and block.
        """
        from pandas import DataFrame

        rows = []
        for (checkpoint, block), one in table.groupby(["checkpoint", "block"], sort=False):
            shares = one.sort_values("rank")["energy_share"]
            row = {"checkpoint": checkpoint, "block": block, "energy of the first direction": shares.iloc[0]}
            rows.append(row | {"of the first three": shares.iloc[:3].sum(skipna=False)})
        return DataFrame(rows)


def _measured(tokens: "Tensor", is_standardized: bool) -> "dict[str, Tensor]":
    """Each measure per image and rank."""
    from ssat_probe.measures import tokens as measures

    count = tokens.shape[1]
    values = measures.singular_values(measures.standardized(tokens) if is_standardized else tokens)
    energies = values.square()
    floor = energies.amax(-1, keepdim=True) * _LEAST
    return {
        "log_value": (energies.maximum(floor) / (count - 1)).log(),
        "energy_share": energies / energies.sum(-1, keepdim=True),
    }
