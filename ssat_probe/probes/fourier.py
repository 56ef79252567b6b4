"""High spatial frequencies of the feature maps over the depth of the network."""

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

_AMPLITUDE = Column("log_amplitude", "ln", "log amplitude from two thirds of the Nyquist frequency on, minus at 0")
_ENERGY = Column("energy_share", "", "share of the spatially varying energy there; undefined if constant")
_PARK_KIM = Column(
    "park_kim", "ln", "last point of the half diagonal minus the first (parity park_kim); undefined if oblong"
)


@dataclass(frozen=True)
class Probe(Paired):
    """High spatial frequencies of the feature maps over the depth of the network."""

    untrained_twin: bool = True
    "Also measure the untrained network of the same architecture and seed, as a reference; =false leaves it out."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("index", "", "place in the residual stream: 0 for embed, then two per block"),
        Column("block", "", "transformer block, 0 next to the input; -1 for embed"),
        Column("site", "", "embed, or after the attention or the mlp of a block"),
        Column("depth", "", "index / (number of sites - 1): 0 at the input, 1 at the end"),
        *with_spread(_AMPLITUDE),
        *with_difference(_AMPLITUDE),
        *with_spread(_ENERGY),
        *with_difference(_ENERGY),
        Column("energy_share_noise", "", "energy share of noise without spatial structure, on this grid"),
        *with_spread(_PARK_KIM),
        Column("park_kim_frequency", "π", "where that last point lies; their figures say 1; undefined if oblong"),
        Column("grid", "", "rows x columns of patches"),
        Column("is_coarse", "", "yes below 14 x 14 patches: few frequencies, compare with care"),
        Column("undefined", "", "fraction of images whose feature maps are constant up to rounding"),
        Column("num_images", "", "number of images"),
    )
    policy: ClassVar[str] = "tokens patch"

    def observe(self, subject: "Subject") -> "Observation":
        """Means over the images."""
        from ssat_probe import observation

        return observation.of_features(subject, _measured, as_maps=True)

    def tabulate(self, seen: "Observation", first: "Observation | None") -> "DataFrame":
        """One row per site; a grid below 7 x 7 is a ValueError."""
        from pandas import DataFrame

        rows = []
        for site, one in seen.statistics.items():
            row: dict[str, Any] = {"index": site.index, "block": site.block, "site": site.name}
            row |= {"depth": site.index / (len(seen.statistics) - 1), "num_images": seen.num_images}
            row |= _of_grid(*seen.grids[site])
            row |= one.spread("log_amplitude") | one.spread("energy_share") | one.spread("park_kim")
            row |= one.differences(("log_amplitude", "energy_share"), first.statistics[site] if first else None)
            rows.append(row | {"undefined": row["energy_share_undefined"]})
        return DataFrame(rows)[[column.name for column in self.columns]]

    def draw(self, table: "DataFrame") -> "Figure":
        """Log amplitude and energy share over normalised depth; grey where attention acts.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            Two panels.
        """
        from ssat_probe import drawing

        lasts = table.groupby("checkpoint")["index"].max()
        with drawing.style():
            figure, axes = drawing.panels(1, 2)
            for ax, name in zip(axes, ("log_amplitude", "energy_share"), strict=True):
                if lasts.nunique() == 1:
                    last = int(lasts.iloc[0])
                    drawing.shade(ax, [(i / last, (i + 1) / last) for i in range(0, last, 2)], "attention step")
                drawn = drawing.lines_with_band(ax, table, "depth", name)
                ax.margins(x=0.02)
            drawing.keep_within(axes[1], 0, 1)
            coarse = table["grid"][table["is_coarse"] == "yes"].unique()
            note = "energy share of white noise: " + ", ".join(f"{x:.2g}" for x in table["energy_share_noise"].unique())
            note += f"; coarse grid: {', '.join(coarse)}" if len(coarse) else ""
            drawing.label_axes(axes[0], "normalised depth", "Δ log amplitude [ln]", "High frequencies")
            drawing.label_axes(axes[1], "normalised depth", "share of varying energy", "Energy at high frequencies")
            drawing.legend_below(figure, "; ".join(part for part in (drawing.band_note(drawn), note) if part))
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """The feature maps before the first and after the last block.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            One row per checkpoint and end.
        """
        import pandas as pd

        names = ["checkpoint", "block", "site", "log_amplitude", "energy_share", "park_kim", "grid", "is_coarse"]
        ends = [one.iloc[[0, -1]] for _, one in table.groupby("checkpoint", sort=False)]
        return pd.concat(ends)[names].reset_index(drop=True)


def _of_grid(height: int, width: int) -> dict[str, Any]:
    """What the grid alone says."""
    from ssat_probe.measures import fourier as measures

    return {
        "energy_share_noise": measures.white_noise_share(height, width),
        "park_kim_frequency": measures.park_kim_frequency(height) if height == width else float("nan"),
        "grid": f"{height}x{width}",
        "is_coarse": "yes" if min(height, width) < measures.COARSE_GRID else "no",
    }


def _measured(maps: "Tensor") -> "dict[str, Tensor]":
    """Each measure per image."""
    from ssat_probe.measures import fourier as measures

    found = {"log_amplitude": measures.log_amplitude(maps), "energy_share": measures.energy_share(maps)}
    return found | {"park_kim": measures.park_kim(maps)}
