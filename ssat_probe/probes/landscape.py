"""Loss landscape: lines and planes around a checkpoint, terms apart, checked against its Hessian; sharpness."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.registry import known
from ssat_probe.table import Column

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from ssat_probe.subject import Subject
    from ssat_probe.surroundings import Settings

LOSSES = ("cross_entropy", "reconstruction", "joint")
DIRECTIONS = ("random", "gradient", "top", "top2", "bottom", "bottom2")
_SCALARS = (
    "sharpness_sam",
    "sharpness_worst",
    "sharpness_average",
    "lowest",
    "roughness",
    "convex_share",
    "flat_share",
)


@dataclass(frozen=True)
class Probe:
    """Loss landscape: lines and planes around a checkpoint, terms apart, checked against its Hessian; sharpness."""

    loss: str = "cross_entropy"
    "Whose parameters move, whose curvature is checked, what scalars are of: cross_entropy, reconstruction or joint."
    lines: tuple[str, ...] = ("random", "top", "bottom", "gradient")
    "Directions of lines: random, gradient; top, top2, bottom, bottom2: eigenvectors from either end of the Hessian."
    plane: tuple[str, ...] = ("random", "random")
    "The two directions of the surface; empty means no surface."
    num_random: int = 4
    "Random directions followed as lines, and of the average sharpness."
    normalisation: str = "filter"
    "Of random directions: filter, layer, park_kim or none."
    vectors: str = "zero"
    "Biases and norms in random directions under filter and layer: zero, scale or keep."
    points: int = 21
    "Points along each axis, an odd number, so that the centre is one of them."
    extent: float = 0.5
    "How far random directions are followed; 1 means as far as the weights are long, filter by filter."
    distance: float = 0.5
    "How far gradient and eigenvectors are followed: Euclidean distance in parameter space."
    radius: float = 0.05
    "Euclidean radius of the ball of the worst-case sharpness; the default of SAM (Foret et al., 2021)."
    noise: float = 0.1
    "Where along random directions, on both sides, the average sharpness is taken."
    flat_within: float = 0.1
    "The flat share of the surface is where the loss is at most this much above the centre's."
    steps: int = 40
    "Lanczos steps for the eigenvectors."
    eigenvectors: Path | None = None
    "Folder in which hessian --vectors kept the eigenvectors; empty: they are found here."
    is_augmented: bool = False
    "Look at images changed as in training, each always in the same way."
    num_batches: int = 8
    "Parts of the images; low and high in the table are the lowest and highest mean over them."
    seed: int = 0
    "Of random directions and of the Lanczos start."
    budget_s: float = 600.0
    "Refuse a grid that would take longer than this per checkpoint, estimated from its first points."
    jobs: int = 1
    "Processes that share the points."
    keep: Path | None = None
    "Folder in which unfinished grids are kept, so that the same command goes on with them; empty means none."

    split: ClassVar[str] = "train"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("quantity", "", "what the row holds: centre, a point of a line or surface, a fact of an axis, a scalar"),
        Column("direction", "", "axis, or both axes of a plane; empty for what has none"),
        Column("x", "", "coordinate along the (first) axis; empty for what is no point"),
        Column("y", "", "coordinate along the second axis; empty off planes"),
        Column("term", "", "loss term: cross_entropy, reconstruction, joint, l2, or accuracy; never summed"),
        Column("value", "", "the quantity; empty where it is undefined (not a finite loss)"),
        Column("standard_error", "", "over images; of sharpness_average over directions; empty for others"),
        Column("low", "", "lowest mean over num_batches parts of the images; empty for what is no point or no mean"),
        Column("high", "", "highest such mean; empty as low"),
        Column("unit", "", "of a point's value, its error, low and high; empty for scalars: unit of the term"),
    )

    def measure(self, subject: "Subject") -> "DataFrame":
        """Points, facts of the axes with their check against the Hessian, and scalars.

        Args:
            subject: Model, images and losses.

        Returns:
            One row per point and term, per fact of an axis, and per scalar; options that cannot be used, a grid over
            the budget or a loss that needs a decoder that is not there are a ValueError.
        """
        from ssat_probe import surroundings

        rows = surroundings.measure(self._settings(), subject)
        return surroundings.table(rows, [column.name for column in self.columns])

    def estimate(self, subject: "Subject") -> str:
        """What measuring one such checkpoint costs.

        Args:
            subject: Model, images and losses.

        Returns:
            Points, products and seconds.
        """
        from ssat_probe import surroundings

        return surroundings.estimate(self._settings(), subject)

    def _settings(self) -> "Settings":
        """The options, checked."""
        from ssat_probe.surroundings import Settings

        self._check()
        return Settings(**{name: getattr(self, name) for name in Settings.__dataclass_fields__})

    def _check(self) -> None:
        from ssat_probe.measures.directions import NORMALISATIONS, VECTORS

        known(self.loss, LOSSES, "losses")
        known(self.normalisation, NORMALISATIONS, "normalisations")
        known(self.vectors, VECTORS, "ways to treat vectors")
        for name in (*self.lines, *self.plane):
            known(name, DIRECTIONS, "directions")
        if len(self.plane) not in (0, 2) or (len(set(self.plane)) == 1 and self.plane[0] != "random"):
            raise ValueError(f"plane must be two different directions or none, got {' '.join(self.plane)!r}.")
        if self.points < 3 or self.points % 2 == 0:
            raise ValueError(f"points must be an odd number of at least 3, got {self.points}.")
        if self.num_random < 1 or self.steps < 2:
            raise ValueError(
                f"num_random must be at least 1 and steps at least 2, got {self.num_random} and {self.steps}."
            )
        if self.jobs < 1 or self.num_batches < 1:
            raise ValueError(f"jobs and num_batches must be at least 1, got {self.jobs} and {self.num_batches}.")
        if self.eigenvectors is not None and self.is_augmented:
            raise ValueError("--eigenvectors are of clean images, got --is-augmented as well; leave one of both out.")
        for name in ("extent", "distance", "noise", "budget_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)}.")

    def draw(self, table: "DataFrame") -> "Figure":
        """Lines of the terms apart, then a surface per checkpoint (or first seed of a method) on one shared scale.

        Each as labelled contours and, for the first term, as a surface in three dimensions.

        Args:
            table: Of one or more checkpoints.

        Returns:
            Contours carry their level; dashed is where the quadratic of the Hessian reaches the level in the legend.
        """
        from ssat_probe import landscape_drawing

        return landscape_drawing.draw(table)

    def summary(self, table: "DataFrame") -> "DataFrame":
        """One row per checkpoint: loss, sharpness, shape of the surface, and how well the Hessian agrees.

        Args:
            table: Of one or more checkpoints.

        Returns:
            Scalars of the loss that was chosen.
        """
        import pandas as pd

        rows = []
        for checkpoint, one in table.groupby("checkpoint", sort=False):
            facts = one[~one["quantity"].isin(("line", "surface", "centre"))]
            first = facts.drop_duplicates("quantity").set_index("quantity")
            centre = one[(one["quantity"] == "centre") & (one["term"] == first["term"].iloc[0])]
            row: dict[str, Any] = {"checkpoint": checkpoint, str(first["term"].iloc[0]): centre["value"].iloc[0]}
            row |= {str(name): first["value"][name] for name in first.index if name in _SCALARS}
            errors = facts.loc[facts["quantity"] == "check_error", "value"]
            rows.append(row | {"largest check error": errors.max()})
        return pd.DataFrame(rows)
