"""Loss on a plane through checkpoints: through three, or through the principal components of a trajectory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.table import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from ssat_probe.subject import Subject


@dataclass(frozen=True)
class Relation:
    """Loss on a plane through checkpoints: through three, or through the principal components of a trajectory."""

    points: int = 21
    "Points along each axis."
    margin: float = 0.25
    "How far the picture reaches beyond the checkpoints, as a share of their span."
    budget_s: float = 600.0
    "Refuse what would take longer than this, estimated from the first points."
    jobs: int = 1
    "Processes that share many points."
    keep: Path | None = None
    "Folder in which points are kept, so that the same command goes on after an interruption; empty means none."

    split: ClassVar[str] = "train"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("quantity", "", "surface, checkpoint (its own loss), projection (the plane's loss there), or a fact"),
        Column("checkpoint", "", "name of the checkpoint; empty for the surface"),
        Column("label", "", "the same in few words"),
        Column("run", "", "run that the checkpoint is of"),
        Column("x", "", "Euclidean coordinate; empty for facts"),
        Column("y", "", "Euclidean coordinate; empty for facts"),
        Column("term", "", "loss term or accuracy; empty for facts"),
        Column(
            "value",
            "",
            "the quantity; explained_x and _y: share of the squared distances; residual: distance off the plane",
        ),
        Column("standard_error", "", "over images; empty for what is no mean over images"),
        Column("unit", "", "of value and standard error"),
    )

    def num_points(self, num_checkpoints: int) -> int:
        """Points of the surface, and each checkpoint by itself and where it is projected.

        Args:
            num_checkpoints: How many.

        Returns:
            Known before any work.
        """
        return self.points**2 + 2 * num_checkpoints

    def measure(self, subjects: "Sequence[Subject]", labels: Sequence[str]) -> "DataFrame":
        """Surface on the plane, and the checkpoints beside what the plane says of them.

        Args:
            subjects: Three, which lie on the plane; or more, which are projected on that of their principal components.
            labels: Their names.

        Returns:
            One row per point and term, and facts of the plane.

        Raises:
            ValueError: If an option is out of range; checkpoints of different architectures or on a line too.
        """
        import numpy as np
        from pandas import DataFrame

        from ssat_probe.between import Together, short_labels
        from ssat_probe.measures.paths import plane_of_three, principal_plane

        if self.points < 3 or not 0 <= self.margin < float("inf"):
            raise ValueError(f"points must be at least 3 and margin at least 0, got {self.points} and {self.margin}.")
        together = Together.of(subjects, 3, self.jobs, self.keep)
        plane = plane_of_three(together.anchors) if len(subjects) == 3 else principal_plane(together.anchors)
        low, high = plane.coordinates.min(axis=0), plane.coordinates.max(axis=0)
        reach = self.margin * (high - low).max()
        xs, ys = (np.linspace(low[axis] - reach, high[axis] + reach, self.points) for axis in (0, 1))
        grid = [{"quantity": "surface", "x": x, "y": y} for y in ys for x in xs]
        runs = [one.checkpoint.recipe.name for one in subjects]
        named = [
            {"checkpoint": label, "label": short, "run": run, "x": x, "y": y}
            for label, short, run, (x, y) in zip(
                labels, short_labels(subjects, labels), runs, plane.coordinates, strict=True
            )
        ]
        rows = together.rows(grid, together.values(np.array([plane.weights(one["x"], one["y"]) for one in grid])))
        own = together.values(np.eye(len(subjects)))
        rows += together.rows([one | {"quantity": "checkpoint"} for one in named], own)
        projected = together.values(np.array([plane.weights(one["x"], one["y"]) for one in named]))
        rows += together.rows([one | {"quantity": "projection"} for one in named], projected)
        rows += [one | {"quantity": "residual", "value": r} for one, r in zip(named, plane.residuals, strict=True)]
        rows += [
            {"quantity": f"explained_{axis}", "value": share} for axis, share in zip("xy", plane.explained, strict=True)
        ]
        table = DataFrame(rows, columns=[column.name for column in self.columns])
        texts = ["checkpoint", "label", "run", "term", "unit"]
        return table.astype({name: object for name in texts}).fillna(dict.fromkeys(texts, ""))

    def draw(self, table: "DataFrame") -> "Figure":
        """Labelled contours of each term with all checkpoints marked; those of one run joined in their order.

        Args:
            table: What `measure` gave.

        Returns:
            A panel each for cross-entropy, reconstruction and accuracy; a unit is as long on both axes, and the last
            checkpoint of a run is the large one.
        """
        from ssat_probe import drawing
        from ssat_probe.landscape_drawing import LABELS, contours, levels_of

        surface = table[table["quantity"] == "surface"]
        terms = [term for term in ("cross_entropy", "reconstruction", "accuracy") if (surface["term"] == term).any()]
        with drawing.style():
            figure, axes = drawing.panels(1, len(terms), height=2.6, width=drawing.PAGE_WIDTH)
            for ax, term in zip(axes, terms, strict=True):
                points = surface[surface["term"] == term]
                contours(ax, points, term, levels_of(points["value"], term))
                self._mark(ax, table[(table["quantity"] == "checkpoint") & (table["term"] == term)])
                ax.set_aspect("equal")
                drawing.label_axes(ax, "distance", "distance", LABELS[term])
            residuals = table.loc[table["quantity"] == "residual", "value"]
            shares = [float(table.loc[table["quantity"] == f"explained_{axis}", "value"].iloc[0]) for axis in "xy"]
            note = f"axes hold {shares[0]:.0%} and {shares[1]:.0%} of the squared distances; " + (
                f"off the plane by up to {residuals.max():.3g}; large: ends"
                if residuals.max() > 1e-6
                else "all points on the plane"
            )
            drawing.legend_below(figure, note)
        return figure

    def _mark(self, ax: "Axes", marked: "DataFrame") -> None:
        """Checkpoints of each run, the last one large."""
        for number, (_, run) in enumerate(marked.groupby("run", sort=False)):
            first, last = run["label"].iloc[0], run["label"].iloc[-1]
            text = first if len(run) == 1 else f"{first} to {last.rpartition(' ')[2]}"
            look: Any = {"marker": "o^sDvP<X>"[number % 9], "markeredgecolor": "black", "color": "white"}
            look["markerfacecolor"] = _COLOURS[number % len(_COLOURS)]
            if len(run) > 1:
                ax.plot(run["x"].iloc[-1:], run["y"].iloc[-1:], markersize=7, **look)
            ax.plot(run["x"], run["y"], label=text, markersize=4, linewidth=0.8, **look)

    def summary(self, table: "DataFrame") -> "DataFrame":
        """Own loss of each checkpoint, the plane's where it is projected, and its distance from the plane.

        Args:
            table: What `measure` gave.

        Returns:
            One row per checkpoint.
        """
        from pandas import DataFrame

        rows = []
        for checkpoint, one in table[table["checkpoint"] != ""].groupby("checkpoint", sort=False):
            loss = one[one["term"] == "cross_entropy"].set_index("quantity")["value"]
            residual = one.loc[one["quantity"] == "residual", "value"].iloc[0]
            values = {"cross-entropy": loss["checkpoint"], "on the plane": loss["projection"], "off-plane": residual}
            rows.append({"checkpoint": checkpoint} | values)
        return DataFrame(rows)


_COLOURS = ("#009E73", "#0072B2", "#D55E00", "#CC79A7", "#F0E442", "#56B4E9")
