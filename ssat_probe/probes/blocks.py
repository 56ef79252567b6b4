"""Curvature of each block of a transformer: ends and negative energy of the diagonal blocks of one Hessian."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.registry import known
from ssat_probe.table import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from ssat_probe.subject import Subject

LOSSES = ("cross_entropy", "reconstruction", "joint")
_SHOWN = {
    "lambda_max": "largest eigenvalue [loss]",
    "lambda_min": "smallest eigenvalue [loss]",
    "negative_energy": "negative energy Σ|λ₋| / Σ|λ|",
}


@dataclass(frozen=True)
class Probe:
    """Curvature of each block of a transformer: ends and negative energy of the diagonal blocks of one Hessian.

    The runs of all blocks go in step and share each forward and first backward pass.
    """

    loss: str = "cross_entropy"
    "Whose Hessian: cross_entropy, reconstruction or joint."
    steps: int = 40
    "Lanczos steps per block."
    seed: int = 0
    "Of the start vectors."

    split: ClassVar[str] = "train"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("block", "", "part of the model: embedding, blocks.0, ..., norm, head; all for the whole"),
        Column("place", "", "of the block in the model, from 0; -1 for the whole"),
        Column("quantity", "", "what the row holds"),
        Column("index", "", "rank from 1, step from 0; 0 for single quantities"),
        Column("tau", "", "threshold as a share of the block's largest eigenvalue; empty where there is none"),
        Column("value", "", "the quantity, in `unit`; empty if its bracket is too wide to give one number"),
        Column("low", "", "lower end of what is certain; empty where nothing is"),
        Column("high", "", "upper end of what is certain, and for a check the largest error allowed; or empty"),
        Column("standard_error", "", "chance error of the random start vector, in `unit`, or empty"),
        Column("converged", "", "1 if the residual is small, or a check passed; empty where it does not apply"),
        Column("unit", "", "of value, low, high; 'loss' is loss per squared parameter unit"),
    )

    @property
    def num_steps(self) -> int:
        """Steps of all runs together."""
        return self.steps

    def measure(self, subject: "Subject", on_step: Callable[[int], None] | None = None) -> "DataFrame":
        """Certified ends, negative part and trace of every block.

        Args:
            subject: Model, images and losses.
            on_step: Called after each step with the number so far.

        Returns:
            Loss and certificate of the whole, then the rows of each block in the order of the model.

        Raises:
            ValueError: If an option is out of range, or the operator fails its certificate.
        """
        import pandas as pd

        from ssat_probe.curvature import SizedBatches
        from ssat_probe.measures import spectrum
        from ssat_probe.measures.blocks import BlockOperator, block_runs, grouped
        from ssat_probe.measures.certificate import certify

        known(self.loss, LOSSES, "losses")
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}. Take the default.")
        everything = subject.parameters(self.loss)
        groups = {label: {name: everything[name] for name in names} for label, names in grouped(everything).items()}
        operator = BlockOperator(groups, lambda batch: subject.loss(batch, self.loss), SizedBatches(subject.batches))
        certificate, evaluation = certify(operator), operator.evaluate()
        runs = block_runs(operator, self.steps, seed=self.seed, on_step=on_step)
        facts = spectrum.facts(certificate, evaluation, operator)
        rows: list[dict[str, Any]] = [{"block": "all", "place": -1} | row for row in facts]
        for place, (label, run) in enumerate(runs.items()):
            kept = spectrum.distance_kept([run], certificate.noise)
            own = [*spectrum.ends([run]), *spectrum.negative_part([run], kept), spectrum.trace_row([run])]
            own += [{"quantity": "num_parameters", "value": run.size}]
            own += [row for row in spectrum.coefficients([run]) if row["quantity"] != "node"]
            rows += [{"block": label, "place": place} | row for row in own]
        names = [column.name for column in Probe.columns]
        table = pd.DataFrame([{"index": 0, "unit": ""} | row for row in rows], columns=names)
        return table.astype({name: float for name in names[4:-1]})

    def draw(self, table: "DataFrame") -> "Figure":
        """Ends and negative energy along the depth of the model.

        Args:
            table: What `measure` gave for one or more checkpoints, with the identity columns.

        Returns:
            Three panels, a line per method.
        """
        from ssat_probe import drawing

        names = table[table["place"] >= 0].drop_duplicates("place").sort_values("place")
        labels = [str(name).removeprefix("blocks.") for name in names["block"]]
        with drawing.style():
            figure, axes = drawing.panels(1, len(_SHOWN), height=2.6)
            for ax, (quantity, label) in zip(axes, _SHOWN.items(), strict=True):
                rows = table[table["quantity"] == quantity]
                drawn = drawing.lines_with_band(ax, rows, "place", "value")
                ax.set_xticks(names["place"].tolist(), labels, rotation=90)
                drawing.label_axes(ax, "part of the model", label)
            axes[0].set_yscale("log")
            _scale_smallest(axes[1], table)
            drawing.legend_below(figure, drawing.band_note(drawn))
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """Ends and negative energy of every block.

        Args:
            table: What `measure` gave, with the identity columns.

        Returns:
            One row per checkpoint and block; a star marks an end that has not converged.
        """
        from pandas import DataFrame

        rows = []
        for (checkpoint, block), one in table[table["place"] >= 0].groupby(["checkpoint", "block"], sort=False):
            row: dict[str, Any] = {"checkpoint": checkpoint, "block": block}
            for quantity in ("num_parameters", *_SHOWN):
                entry = one[one["quantity"] == quantity].iloc[0]
                row[quantity] = f"{entry['value']:.4g}" + ("*" if entry["converged"] == 0 else "")
            rows.append(row)
        return DataFrame(rows)


def _scale_smallest(ax: "Axes", table: "DataFrame") -> None:
    """Logarithmic below zero, linear within a thousandth of the lowest one, with room below it."""
    import numpy as np

    bulk = 10.0 ** np.ceil(np.log10(max(1e-3 * _largest(table), 1e-12)))
    smallest = table.loc[table["quantity"] == "lambda_min", "value"]
    low, high = min(smallest.min(), -bulk), max(smallest.max(), 0.0)
    ax.set_yscale("symlog", linthresh=bulk)
    ax.set_yticks([0.0, *(-bulk * 10.0 ** np.arange(np.ceil(np.log10(-low / bulk)) + 1))])
    ax.set_ylim(2 * low, high + bulk / 2)


def _largest(table: "DataFrame") -> float:
    """Size of the most negative end, for an axis that is linear below a thousandth of it."""
    return float(table.loc[table["quantity"] == "lambda_min", "value"].abs().max())
