"""Paths between checkpoints: straight line with its barrier, and a Bézier curve trained to have a low loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.registry import known
from ssat_probe.table import Column

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from ssat_probe.subject import Subject

LOSSES = ("cross_entropy", "reconstruction", "joint")


@dataclass(frozen=True)
class Relation:
    """Paths between checkpoints: straight line with its barrier, and a Bézier curve trained to have a low loss."""

    points: int = 21
    "Points on each path, both ends included."
    bend_steps: int = 0
    "Steps of the training of the curve's control point; 0 means no curve."
    bend_rate: float = 0.003
    "Learning rate of that training (Adam)."
    loss: str = "cross_entropy"
    "Loss that the curve is to keep low: cross_entropy, reconstruction or joint."
    seed: int = 0
    "Of that training."
    budget_s: float = 600.0
    "Refuse what would take longer than this, estimated from the first points."
    jobs: int = 1
    "Processes that share many points."
    keep: Path | None = None
    "Folder in which points are kept, so that the same command goes on after an interruption; empty means none."

    split: ClassVar[str] = "train"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("quantity", "", "point of a path, or its barrier, or its length"),
        Column("start", "", "checkpoint at which the path begins"),
        Column("end", "", "checkpoint at which it ends"),
        Column("pair", "", "both, in few words"),
        Column("kind", "", "straight or bezier"),
        Column("t", "", "position on the path, 0 at its start, 1 at its end; empty for what is no point"),
        Column("term", "", "loss term or accuracy"),
        Column("value", "", "the quantity; of a barrier the largest excess over the line between the ends' values"),
        Column("standard_error", "", "over images; empty for what is no mean over images"),
        Column("unit", "", "of value and standard error"),
    )

    def num_points(self, num_checkpoints: int) -> int:
        """Points of all paths; a step of a curve's training counts as three, though it takes one batch alone.

        Args:
            num_checkpoints: How many.

        Returns:
            Known before any work.
        """
        num_pairs = num_checkpoints * (num_checkpoints - 1) // 2
        return num_pairs * (self.points * (1 + (self.bend_steps > 0)) + 3 * self.bend_steps)

    def measure(self, subjects: "Sequence[Subject]", labels: Sequence[str]) -> "DataFrame":
        """Paths from each checkpoint to each later one.

        Args:
            subjects: At least two of one architecture.
            labels: Their names.

        Returns:
            Points of every path, and its barrier in each term.

        Raises:
            ValueError: If an option is out of range; checkpoints of different architectures too.
        """
        import itertools

        import numpy as np
        from pandas import DataFrame

        from ssat_probe.between import Together, short_labels

        known(self.loss, LOSSES, "losses")
        if self.points < 3 or self.bend_steps < 0 or not 0 < self.bend_rate < float("inf"):
            raise ValueError(
                "points must be at least 3, bend_steps at least 0 and bend_rate above 0, got "
                f"{self.points}, {self.bend_steps} and {self.bend_rate}."
            )
        together = Together.of(subjects, 2, self.jobs, self.keep)
        shown = short_labels(subjects, labels)
        t = np.linspace(0, 1, self.points)
        rows: list[dict[str, Any]] = []
        for i, j in itertools.combinations(range(len(subjects)), 2):
            names = {"start": labels[i], "end": labels[j], "pair": f"{shown[i]} – {shown[j]}"}
            rows += self._path(together, (i, j), names | {"kind": "straight"}, t)
            if self.bend_steps:
                rows += self._path(together, (i, j), names | {"kind": "bezier"}, t)
        return DataFrame(rows, columns=[column.name for column in self.columns])

    def _path(self, together: Any, ends: tuple[int, int], names: dict[str, str], t: Any) -> list[dict[str, Any]]:
        """Points of one path, its barriers and its length."""
        import itertools

        import numpy as np

        from ssat_probe.measures.landscape import barrier
        from ssat_probe.measures.paths import bend, bezier_weights
        from ssat_probe.terms import value_of

        i, j = ends
        start, end = together.anchors[i], together.anchors[j]
        more = []
        weights = np.zeros((len(t), len(together.anchors)))
        weights[:, i], weights[:, j] = 1 - t, t
        if names["kind"] == "bezier":
            control = bend(
                together.parameters, lambda batch: together.subject.loss(batch, self.loss), together.batches(),
                (start, end), steps=self.bend_steps, rate=self.bend_rate, seed=self.seed,
            )  # fmt: skip
            of_three = bezier_weights(t)
            weights[:, i], weights[:, j] = of_three[:, 0], of_three[:, 2]
            weights, more = np.column_stack([weights, of_three[:, 1]]), [control]
        values = together.values(weights, more)
        vectors = [*together.anchors, *more]
        steps = [sum(w * v for w, v in zip(row, vectors, strict=True) if w) for row in weights]
        length = float(sum((b - a).norm() for a, b in itertools.pairwise(steps)))
        rows = together.rows([names | {"quantity": "point", "t": position} for position in t], values)
        nan = float("nan")
        for term in together.terms.present:
            sign = -1 if term == "accuracy" else 1
            height = barrier(t, sign * value_of(values, term))
            rows.append(names | {"quantity": "barrier", "t": nan, "term": term, "value": height})
        return [*rows, names | {"quantity": "length", "t": nan, "term": "", "value": length}]

    def draw(self, table: "DataFrame") -> "Figure":
        """Loss and accuracy along every path; curves dashed.

        Args:
            table: What `measure` gave.

        Returns:
            Two or three panels; the legend names the pairs and their barriers.
        """
        from ssat_probe import drawing

        labels = {
            "cross_entropy": "cross-entropy [nat]",
            "reconstruction": "reconstruction [pixel²]",
            "accuracy": "accuracy",
        }
        points = table[table["quantity"] == "point"]
        shown = [term for term in labels if (points["term"] == term).any()]
        colours = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#DDCC77", "#44AA99", "#AA4499", "#999933")
        with drawing.style():
            figure, axes = drawing.panels(1, len(shown))
            for ax, term in zip(axes, shown, strict=True):
                for number, (pair, rows) in enumerate(points[points["term"] == term].groupby("pair", sort=False)):
                    for kind, one in rows.groupby("kind", sort=False):
                        look: Any = {"color": colours[number % 9], "linestyle": "-" if kind == "straight" else "--"}
                        ax.plot(one["t"], one["value"], label=f"{pair}, {kind}", **look)
                drawing.label_axes(ax, "position on the path", labels[term])
            drawing.legend_below(figure, "no heads or units permuted")
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """Barriers of each path.

        Args:
            table: What `measure` gave.

        Returns:
            One row per path.
        """
        barriers = table[table["quantity"] == "barrier"]
        shown = barriers.pivot_table(index=["pair", "kind"], columns="term", values="value", sort=False, dropna=False)
        return shown.add_prefix("barrier ").reset_index().rename_axis(columns=None)
