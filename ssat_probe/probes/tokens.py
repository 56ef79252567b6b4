"""How alike the tokens of an image become over the depth: cosine similarity and ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ssat_probe.table import Column, with_difference, with_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.capture import Site
    from ssat_probe.subject import Subject

_COSINE = Column("cosine", "", "mean cosine between two different patch tokens: 1 over-smoothed")
_RANK = Column(
    "effective_rank", "", "effective rank of the centred patch tokens, exp H(s / Σs); undefined if all equal"
)


@dataclass(frozen=True)
class Probe:
    """How alike the tokens of an image become over the depth: cosine similarity and ranks."""

    untrained_twin: bool = False
    "Also measure the untrained network of the same architecture and seed, as a reference."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("block", "", "transformer block whose output is looked at, 0 next to the input; -1 before the first"),
        Column("depth", "", "number of blocks passed / number of blocks"),
        *with_spread(_COSINE),
        *with_difference(_COSINE),
        Column("cosine_absolute", "", "mean |cosine| over all pairs, self included (parity anti_oversmoothing)"),
        *with_spread(_RANK),
        *with_difference(_RANK),
        Column("effective_rank_share", "", "effective rank / ceiling; undefined where all tokens are equal"),
        Column("energy_rank", "", "exp H(s² / Σs²), at most the effective rank; undefined where all tokens are equal"),
        Column("stable_rank", "", "Σs² / max s², at most the energy rank; undefined where all tokens are equal"),
        Column("ceiling", "", "largest possible rank: min(patch tokens - 1, channels)"),
        *with_spread(Column("residual", "", "‖tokens - their mean‖ / ‖tokens‖: 0 collapsed to rank one, at most 1")),
        Column("undefined", "", "fraction of images without ranks, because their tokens are equal up to rounding"),
        Column("num_tokens", "", "number of patch tokens"),
        Column("num_images", "", "number of images"),
    )

    def measure(self, subject: "Subject") -> "DataFrame":
        """One row per block, and one before the first.

        Args:
            subject: Its model is in eval mode and has ``blocks`` and ``num_prefix_tokens``.

        Returns:
            The columns of this probe.
        """
        return self._table(_Seen(subject), None)

    def between(self, subjects: "Iterator[tuple[str, Subject]]") -> "list[DataFrame]":
        """As `measure` for each subject, with differences to the first.

        Args:
            subjects: Labels and subjects.

        Returns:
            Their tables.
        """
        seen = [_Seen(subject) for _, subject in subjects]
        return [self._table(one, seen[0] if one is not seen[0] else None) for one in seen]

    def _table(self, seen: "_Seen", first: "_Seen | None") -> "DataFrame":
        from pandas import DataFrame

        last = max(seen.statistics)
        paired = first.statistics if first is not None and first.is_comparable(seen) else {}
        rows = []
        for block, one in seen.statistics.items():
            row = {"block": block, "depth": (block + 1) / (last + 1), "ceiling": seen.ceiling}
            row |= {"num_tokens": seen.num_tokens, "num_images": seen.num_images}
            for name in ("cosine", "effective_rank", "residual"):
                row |= one.spread(name)
            row |= one.differences(("cosine", "effective_rank"), paired.get(block))
            row |= {name: float(one.mean(name)) for name in ("cosine_absolute", "energy_rank", "stable_rank")}
            row |= {"effective_rank_share": row["effective_rank"] / seen.ceiling}
            row |= {"undefined": 1 - float(one.count("effective_rank")) / seen.num_images}
            rows.append(row)
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


class _Seen:
    """What one checkpoint gave, by block."""

    def __init__(self, subject: "Subject") -> None:
        import torch

        from ssat_probe import capture
        from ssat_probe.measures.bootstrap import ImageStatistics

        self.statistics: dict[int, ImageStatistics] = {
            site.block: ImageStatistics() for site in capture.sites(subject.model) if site.name != "attention"
        }
        self.num_images = self.num_tokens = self.ceiling = 0
        self.images = getattr(subject, "fingerprint", "")
        with torch.no_grad():
            for batch in subject.batches():

                def reduce(site: "Site", tokens: "Tensor", ids: "Tensor" = batch.ids) -> None:
                    if site.name != "attention":
                        self._add(site.block, tokens, ids)

                with capture.features(subject.model, reduce):
                    subject.model(batch.images)
                self.num_images += len(batch.images)

    def _add(self, block: int, tokens: "Tensor", ids: "Tensor") -> None:
        from ssat_probe.measures import tokens as measures
        from ssat_probe.measures.features import relative_variance

        values = measures.singular_values(tokens)
        self.num_tokens = tokens.shape[1]
        self.ceiling = measures.rank_ceiling(self.num_tokens, tokens.shape[2])
        self.statistics[block].add(
            ids,
            {
                "cosine": measures.cosine_similarity(tokens),
                "cosine_absolute": measures.absolute_cosine_similarity(tokens),
                "effective_rank": measures.effective_rank(values),
                "energy_rank": measures.energy_rank(values),
                "stable_rank": measures.stable_rank(values),
                "residual": measures.rank_collapse_residual(relative_variance(tokens)),
            },
        )

    def is_comparable(self, other: "_Seen") -> bool:
        """Whether differences to another checkpoint are paired: the same images and as many blocks."""
        return self.images == other.images and self.statistics.keys() == other.statistics.keys()
