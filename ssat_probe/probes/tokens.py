"""How alike the tokens of an image become over the depth: cosine similarity and ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.table import Column, with_difference, with_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.observation import Observation
    from ssat_probe.subject import Subject

_EQUAL = "undefined where all tokens are equal"
_MEASURES = (
    Column("cosine", "", "mean cosine between two different patch tokens: 1 over-smoothed"),
    Column("cosine_absolute", "", "mean |cosine| over all pairs, self included (parity anti_oversmoothing)"),
    Column("effective_rank", "", f"effective rank of the centred patch tokens, exp H(s / Σs); {_EQUAL}"),
    Column("effective_rank_share", "", f"effective rank / ceiling; {_EQUAL}"),
    Column("energy_rank", "", f"exp H(s² / Σs²), at most the effective rank; {_EQUAL}"),
    Column("stable_rank", "", f"Σs² / max s², at most the energy rank; {_EQUAL}"),
    Column("top_share", "", f"share of the energy in the first direction; {_EQUAL}"),
    Column("residual", "", "‖tokens - their mean‖ / ‖tokens‖: 0 collapsed to rank one, at most 1"),
)
_PAIRED = ("cosine", "effective_rank", "residual")


@dataclass(frozen=True)
class Probe:
    """How alike the tokens of an image become over the depth: cosine similarity and ranks."""

    standardize: bool = False
    "Centre each channel over the positions of an image and divide by its deviation there, so that few do not rule."
    untrained_twin: bool = True
    "Also measure the untrained network of the same architecture and seed, as a reference; =false leaves it out."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("block", "", "transformer block whose output is looked at, 0 next to the input; -1 before the first"),
        Column("depth", "", "number of blocks passed / number of blocks"),
        *(column for one in _MEASURES for column in with_spread(one)),
        *(column for one in _MEASURES if one.name in _PAIRED for column in with_difference(one)),
        Column("ceiling", "", "largest possible rank: min(patch tokens - 1, channels)"),
        Column("undefined", "", "fraction of images without ranks, because their tokens are equal up to rounding"),
        Column("num_tokens", "", "number of patch tokens"),
        Column("num_images", "", "number of images"),
    )

    @property
    def policy(self) -> str:
        """Of what the measures are taken."""
        return "tokens patch, standardised" if self.standardize else "tokens patch"

    def measure(self, subject: "Subject") -> "DataFrame":
        """One row per block, and one before the first.

        Args:
            subject: Its model is in eval mode and has ``blocks`` and ``num_prefix_tokens``.

        Returns:
            The columns of this probe.
        """
        return self._table(self._seen(subject), None)

    def between(self, subjects: "Iterator[tuple[str, Subject]]") -> "list[DataFrame]":
        """As `measure` for each subject, with differences to the first.

        Args:
            subjects: Labels and subjects.

        Returns:
            Their tables.
        """
        seen = [self._seen(subject) for _, subject in subjects]
        return [self._table(one, one.comparable(seen[0])) for one in seen]

    def _seen(self, subject: "Subject") -> "Observation":
        from ssat_probe import observation

        return observation.of_features(
            subject, lambda tokens: _measured(tokens, self.standardize), lambda site: site.name in ("embed", "mlp")
        )

    def _table(self, seen: "Observation", first: "Observation | None") -> "DataFrame":
        from pandas import DataFrame

        rows = []
        for site, one in seen.statistics.items():
            row: dict[str, Any] = {"block": site.block, "depth": (site.block + 1) / (len(seen.statistics) - 1)}
            row |= {name: int(one.mean(name)) for name in ("ceiling", "num_tokens")}
            for measure in _MEASURES:
                row |= one.spread(measure.name)
            row |= one.differences(_PAIRED, first.statistics[site] if first else None)
            rows.append(row | {"num_images": seen.num_images, "undefined": row["effective_rank_undefined"]})
        return DataFrame(rows)[[column.name for column in self.columns]]

    def draw(self, table: "DataFrame") -> "Figure":
        """Cosine similarity, effective rank and residual over normalised depth.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            Three panels.
        """
        from ssat_probe import drawing

        titles = {
            "cosine": ("mean cosine of two tokens", "Over-smoothing"),
            "effective_rank_share": ("effective rank / ceiling", "Rank of the tokens"),
            "residual": ("norm about the mean / norm", "Rank-collapse residual"),
        }
        with drawing.style():
            figure, axes = drawing.panels(1, 3)
            for ax, (name, (label, title)) in zip(axes, titles.items(), strict=True):
                drawn = drawing.lines_with_band(ax, table, "depth", name)
                drawing.keep_within(ax, -1 if name == "cosine" else 0, 1)
                drawing.label_axes(ax, "normalised depth", label, title)
            drawing.legend_below(figure, drawing.band_note(drawn))
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """The tokens before the first and after the last block.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            One row per checkpoint and end.
        """
        names = ["checkpoint", "block", "cosine", "effective_rank", "energy_rank", "stable_rank", "ceiling", "residual"]
        ends = [one.iloc[[0, -1]] for _, one in table.groupby("checkpoint", sort=False)]
        import pandas as pd

        return pd.concat(ends)[names].reset_index(drop=True)


def _measured(tokens: "Tensor", is_standardized: bool) -> "dict[str, Tensor]":
    """Each measure per image."""
    from ssat_probe.measures import tokens as measures
    from ssat_probe.measures.features import relative_variance

    residual = measures.rank_collapse_residual(relative_variance(tokens))
    tokens = measures.standardized(tokens) if is_standardized else tokens
    values = measures.singular_values(tokens)
    ceiling = measures.rank_ceiling(*tokens.shape[1:])
    stable = measures.stable_rank(values)
    return {
        "cosine": measures.cosine_similarity(tokens),
        "cosine_absolute": measures.absolute_cosine_similarity(tokens),
        "effective_rank": measures.effective_rank(values),
        "effective_rank_share": measures.effective_rank(values) / ceiling,
        "energy_rank": measures.energy_rank(values),
        "stable_rank": stable,
        "top_share": 1 / stable,
        "residual": residual,
        "ceiling": residual.new_full((len(tokens),), ceiling),
        "num_tokens": residual.new_full((len(tokens),), tokens.shape[1]),
    }
