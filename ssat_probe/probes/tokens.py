"""How alike tokens, and images, become over the depth: cosine similarity and ranks."""

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.paired import Paired
from ssat_probe.table import Column, with_difference, with_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.capture import Site
    from ssat_probe.measures.scatter import JackknifedSingularValues
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
_ALIKE = "undefined where all images are equal"
_OF_IMAGES = (
    Column(
        "image_effective_rank", "", f"effective rank of the images' mean patch tokens, centred over images; {_ALIKE}"
    ),
    Column("image_energy_rank", "", f"their energy rank; {_ALIKE}"),
    Column("image_stable_rank", "", f"their stable rank; {_ALIKE}"),
)
_PAIRED = ("cosine", "effective_rank", "residual")


@dataclass(frozen=True)
class Probe(Paired):
    """How alike tokens, and images, become over the depth: cosine similarity and ranks."""

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
        *(column for one in _OF_IMAGES for column in with_spread(one, "jackknife")),
        Column("image_ceiling", "", "largest possible rank of the images: min(images - 1, channels)"),
        Column("undefined", "", "fraction of images without ranks, because their tokens are equal up to rounding"),
        Column("num_tokens", "", "number of patch tokens"),
        Column("num_images", "", "number of images"),
    )

    @property
    def policy(self) -> str:
        """Of what the measures are taken."""
        return "tokens patch, standardised" if self.standardize else "tokens patch"

    def observe(self, subject: "Subject") -> "Observation":
        """Means over the images, and besides, by site, what makes the ranks of the images."""
        from ssat_probe import observation
        from ssat_probe.measures.scatter import JackknifedSingularValues

        images: dict[Site, JackknifedSingularValues] = defaultdict(JackknifedSingularValues)
        seen = observation.of_features(
            subject,
            lambda tokens: _measured(tokens, self.standardize),
            lambda site: site.name in ("embed", "mlp"),
            also=lambda site, tokens, ids: images[site].add(ids, tokens.mean(1)),
        )
        seen.besides.update(images)
        return seen

    def tabulate(self, seen: "Observation", first: "Observation | None") -> "DataFrame":
        """One row per block, and one before the first."""
        from pandas import DataFrame

        rows = []
        for site, one in seen.statistics.items():
            row: dict[str, Any] = {"block": site.block, "depth": (site.block + 1) / (len(seen.statistics) - 1)}
            row |= {name: int(one.mean(name)) for name in ("ceiling", "num_tokens")}
            for measure in _MEASURES:
                row |= one.spread(measure.name)
            row |= one.differences(_PAIRED, first.statistics[site] if first else None)
            row |= _ranks_of(seen.besides[site])
            rows.append(row | {"num_images": seen.num_images, "undefined": row["effective_rank_undefined"]})
        return DataFrame(rows)[[column.name for column in self.columns]]

    def draw(self, table: "DataFrame") -> "Figure":
        """Cosine similarity, effective ranks and residual over normalised depth.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            Four panels.
        """
        from ssat_probe import drawing

        titles = {
            "cosine": ("mean cosine of two tokens", "Over-smoothing"),
            "effective_rank_share": ("effective rank / ceiling", "Rank of the tokens"),
            "residual": ("norm about the mean / norm", "Rank-collapse residual"),
            "image_rank_share": ("effective rank / ceiling", "Rank of the images"),
        }
        shown = table.assign(image_rank_share=table["image_effective_rank"] / table["image_ceiling"])
        with drawing.style():
            figure, axes = drawing.panels(2, 2, height=4.6)
            for ax, (name, (label, title)) in zip(axes, titles.items(), strict=True):
                drawn = drawing.lines_with_band(ax, shown, "depth", name)
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
        names += ["image_effective_rank", "image_ceiling"]
        ends = [one.iloc[[0, -1]] for _, one in table.groupby("checkpoint", sort=False)]
        import pandas as pd

        return pd.concat(ends)[names].reset_index(drop=True)


def _ranks_of(images: "JackknifedSingularValues") -> dict[str, float]:
    """Ranks of the mean patch tokens of all images together: one number, no mean over images."""
    from ssat_probe.measures import tokens as measures

    ranks = (measures.effective_rank, measures.energy_rank, measures.stable_rank)
    named = dict(zip((column.name for column in _OF_IMAGES), ranks, strict=True))
    return images.spread(named) | {"image_ceiling": images.whole.ceiling}


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
