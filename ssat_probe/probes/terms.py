"""Curvature of each term of the loss: cross-entropy, reconstruction, both together; what their top directions share."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.table import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

    from ssat_probe.measures.eigenspaces import Eigenspace
    from ssat_probe.measures.hessian import HessianOperator
    from ssat_probe.subject import Subject

LABELS = {"cross_entropy": "cross-entropy", "reconstruction": "reconstruction", "joint": "joint"}
_PAIRS = {
    ("cross_entropy", "reconstruction"): "CE, rec.",
    ("cross_entropy", "joint"): "CE, joint",
    ("reconstruction", "joint"): "rec., joint",
}
_COLOURS = {"cross_entropy": "#0072B2", "reconstruction": "#D55E00", "joint": "#555555"}
_DASHES = {"cross_entropy": "-", "reconstruction": "--", "joint": ":"}
_NUM_COLUMNS = 3


@dataclass(frozen=True)
class Probe:
    """Curvature of each term of the loss, and what the top directions of the terms have in common.

    All terms at the same weights, images and masks, over the parameters that cross-entropy and reconstruction share:
    the encoder. A checkpoint without a decoder has the cross-entropy alone.
    """

    steps: int = 60
    "Lanczos steps per term: Hessian-vector products, each a pass over all images."
    top: int = 5
    "Eigenvectors of the largest eigenvalues whose spaces are compared."
    seed: int = 0
    "Of the start vector, the same for every term."

    split: ClassVar[str] = "train"
    columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "term",
            "",
            "part of the loss: cross_entropy, reconstruction, or joint, λ of the recipe times the first "
            "plus 1-λ times the second",
        ),
        Column("other", "", "term that it is compared with; empty for a spectrum"),
        Column("quantity", "", "what the row holds"),
        Column("index", "", "rank from 1, step or node from 0; 0 for single quantities"),
        Column("tau", "", "threshold as a share of the largest eigenvalue; empty where there is none"),
        Column("value", "", "the quantity, in `unit`; empty if its bracket is too wide to give one number"),
        Column("low", "", "lower end of what is certain; empty where nothing is"),
        Column("high", "", "upper end of what is certain, and for a check the largest error allowed; or empty"),
        Column("converged", "", "1 if the residual is small, for an overlap if both spaces are; empty elsewhere"),
        Column("unit", "", "of value, low, high; 'loss' is loss per squared parameter unit"),
    )

    @property
    def num_steps(self) -> int:
        """Products of the runs of a checkpoint with a decoder."""
        return len(LABELS) * self.steps

    def measure(self, subject: "Subject", on_step: Callable[[int], None] | None = None) -> "DataFrame":
        """Spectrum of every term, then every pair of top eigenspaces.

        Args:
            subject: Model, images and losses.
            on_step: Called after each product of a run with the number so far.

        Returns:
            Per term the rows of a Lanczos run; per pair ``overlap`` (mean squared cosine of the principal angles),
            ``chance`` (dimension of the spaces over number of parameters) and each ``cosine``; for each top direction
            of the joint loss its ``cross_entropy_share`` of the curvature.

        Raises:
            ValueError: If an option is out of range, or an operator fails its certificate.
        """
        import pandas as pd

        from ssat_probe.curvature import operators, shared_parameters

        for name, least in (("steps", 2), ("top", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}. Take the default.")
        parameters = shared_parameters(subject)
        terms = list(LABELS) if subject.decoder is not None else ["cross_entropy"]
        rows: list[dict[str, Any]] = []
        spaces: dict[str, Eigenspace] = {}
        found: dict[str, HessianOperator] = {}
        for done, term in enumerate(terms):
            _, found[term] = operators(subject, parameters, term)
            before = done * self.steps
            told = None if on_step is None else (lambda step, before=before: on_step(before + step))
            own, spaces[term] = self._spectrum(found[term], told)
            rows += [{"term": term, "other": ""} | row for row in own]
        size = len(next(iter(spaces.values())).vectors[0])
        for one, other in combinations(terms, 2):
            rows += [{"term": one, "other": other} | row for row in _compared(spaces[one], spaces[other], size)]
        if "joint" in spaces:
            weight = subject.checkpoint.recipe.lambda_ends[1]
            rows += _shares(found["cross_entropy"], spaces["joint"], weight)
        names = [column.name for column in Probe.columns]
        table = pd.DataFrame([{"other": "", "index": 0, "unit": ""} | row for row in rows], columns=names)
        return table.astype({name: float for name in names[4:-1]})

    def _spectrum(
        self, operator: "HessianOperator", on_step: Callable[[int], None] | None
    ) -> "tuple[list[dict[str, Any]], Eigenspace]":
        """Rows of a certified run, and the space of its largest eigenvalues."""
        from ssat_probe.measures.certificate import certify
        from ssat_probe.measures.eigenspaces import top_space
        from ssat_probe.measures.methods import Settings, rows_of

        spaces: list[Eigenspace] = []
        settings = Settings(
            self.steps,
            seed=self.seed,
            on_step=on_step,
            on_run=lambda krylov: spaces.append(top_space(krylov, self.top)),
        )
        rows = rows_of("lanczos", operator, certify(operator), operator.evaluate(), settings)
        return [row for row in rows if row["quantity"] != "node"], spaces[0]

    def draw(self, table: "DataFrame") -> "Figure":
        """Spectra of the terms, a panel per method; below, their largest eigenvalue, negative energy and overlap.

        Args:
            table: What `measure` gave for one or more checkpoints, with the identity columns.

        Returns:
            Spectra are of the first seed; dots are checkpoints.
        """
        from ssat_probe import drawing

        shown = drawing.series(table)[:_NUM_COLUMNS]
        with drawing.style():
            figure, axes = drawing.panels(2, _NUM_COLUMNS, height=4.4)
            for ax, one in zip(axes, shown, strict=False):
                first = one.table[one.table["checkpoint"] == one.table["checkpoint"].iloc[0]]
                _draw_spectra(ax, first, one.label)
            for ax in axes[len(shown) : _NUM_COLUMNS]:
                ax.remove()
            largest, energies, overlaps = axes[_NUM_COLUMNS:]
            _draw_terms(largest, table, "lambda_max", "largest eigenvalue [loss]")
            largest.set_ylim(bottom=0)
            _draw_terms(energies, table, "negative_energy", "negative energy Σ|λ₋| / Σ|λ|")
            if (table["quantity"] == "overlap").any():
                _draw_overlaps(overlaps, table)
            else:
                overlaps.remove()
            drawing.legend_below(figure, "spectra: lines are terms, first seed; dots: every checkpoint")
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """One row per checkpoint.

        Args:
            table: What `measure` gave, with the identity columns.

        Returns:
            Largest eigenvalue and negative energy of each term, overlap of each pair beside that of random spaces; a
            star marks what has not converged.
        """
        from pandas import DataFrame

        rows = []
        for checkpoint, one in table.groupby("checkpoint", sort=False):
            row: dict[str, Any] = {"checkpoint": checkpoint}
            for quantity, symbol in (("lambda_max", "λmax"), ("negative_energy", "energy")):
                for term, label in LABELS.items():
                    row[f"{symbol} {label}"] = _cell(one[(one["term"] == term) & (one["quantity"] == quantity)])
            for (term, other), label in _PAIRS.items():
                pair = (one["term"] == term) & (one["other"] == other)
                row[f"overlap {label}"] = _cell(one[pair & (one["quantity"] == "overlap")])
            row["by chance"] = _cell(one[one["quantity"] == "chance"])
            rows.append(row)
        return DataFrame(rows)


def _cell(rows: "DataFrame") -> str:
    """A number as text, empty where there is none."""
    if not len(rows):
        return ""
    entry = rows.iloc[0]
    return f"{entry['value']:.3g}" + ("*" if entry["converged"] == 0 else "")


def _is_with(table: "DataFrame", other: str) -> "Series":
    """Rows that compare with a term; none for an empty name, which csv reads as missing."""
    column = table["other"].astype(object)
    return column.where(column.notna(), "") == other


_SURE = 0.1  # sine of the angle to the true space that an overlap may rest on; ours, no source


def _compared(one: "Eigenspace", other: "Eigenspace", size: int) -> list[dict[str, Any]]:
    """Rows of a pair of spaces."""
    from ssat_probe.measures.eigenspaces import cosines, overlap

    is_sure = float(max(one.error, other.error) <= _SURE)
    angles = cosines(one.vectors, other.vectors)
    return [
        {"quantity": "overlap", "value": overlap(one.vectors, other.vectors), "converged": is_sure},
        {"quantity": "chance", "value": len(angles) / size},
        *({"quantity": "cosine", "index": i, "value": float(x)} for i, x in enumerate(angles, start=1)),
    ]


def _shares(cross_entropy: "HessianOperator", joint: "Eigenspace", weight: float) -> list[dict[str, Any]]:
    """How much of the curvature along each top direction of the joint loss comes from the cross-entropy."""
    parts = [weight * float(vector @ cross_entropy.product(vector)) for vector in joint.vectors]
    pairs = zip(parts, joint.values, strict=True)
    return [
        {"term": "joint", "quantity": "cross_entropy_share", "index": i, "value": part / value}
        for i, (part, value) in enumerate(pairs, start=1)
    ]


def _draw_spectra(ax: "Axes", table: "DataFrame", label: str) -> None:
    """Eigenvalues per unit of each term of one checkpoint."""
    import numpy as np

    from ssat_probe import drawing
    from ssat_probe.measures.spectrum import smoothed

    ends = table.loc[table["quantity"].isin(["lambda_max", "lambda_min"]), "value"]
    low, high = min(ends.min(), 0.0), max(ends.max(), 0.0)
    bulk = 1e-3 * max(high, -low) or 1.0
    grid = bulk * np.sinh(np.linspace(np.arcsinh(1.4 * low / bulk), np.arcsinh(1.4 * high / bulk), 401))
    for term, name in LABELS.items():
        rows = table[(table["term"] == term) & _is_with(table, "")].assign(probe=0)
        if len(rows):
            curve = smoothed(rows, grid, bulk)
            ax.plot(grid, np.maximum(curve, 1e-2), color=_COLOURS[term], linestyle=_DASHES[term], label=name)
    ax.set_xscale("symlog", linthresh=bulk)
    ax.set_yscale("log")
    ax.set_ylim(bottom=1e-2)
    ax.minorticks_off()
    decade = 10.0 ** np.floor(np.log10(max(high, -low, bulk)))
    ax.set_xticks([tick for tick in (-decade, 0.0, decade) if grid[0] <= tick <= grid[-1]])
    drawing.label_axes(ax, "eigenvalue [loss]", "eigenvalues per unit", label)


def _draw_terms(ax: "Axes", table: "DataFrame", quantity: str, label: str) -> None:
    """A dot per checkpoint, in a group per term."""
    _draw_groups(ax, table[table["quantity"] == quantity], [(term, "") for term in LABELS], ["CE", "rec.", "joint"])
    from ssat_probe import drawing

    drawing.label_axes(ax, "term of the loss", label)


def _draw_overlaps(ax: "Axes", table: "DataFrame") -> None:
    """Overlap of each pair of terms, beside that of random spaces."""
    from ssat_probe import drawing

    _draw_groups(ax, table[table["quantity"] == "overlap"], list(_PAIRS), list(_PAIRS.values()))
    chance = table.loc[table["quantity"] == "chance", "value"]
    ax.axhline(chance.mean(), color="black", linestyle=":", linewidth=0.8, label="overlap by chance")
    ax.set_yscale("log")
    drawing.label_axes(ax, "terms compared", "overlap of top eigenspaces")


def _draw_groups(ax: "Axes", rows: "DataFrame", groups: list[tuple[str, str]], labels: list[str]) -> None:
    """Groups of dots along the x axis, one look per line of the figure."""
    import numpy as np

    from ssat_probe import drawing

    drawn = drawing.series(rows) if len(rows) else []
    for place, one in enumerate(drawn):
        offset = 0.2 * (place - (len(drawn) - 1) / 2)
        for x, (term, other) in enumerate(groups):
            own = one.table[(one.table["term"] == term) & _is_with(one.table, other)]["value"]
            spread = x + offset + (np.linspace(-0.06, 0.06, len(own)) if len(own) > 1 else np.zeros(len(own)))
            look: Any = {"color": one.look.colour, "marker": one.look.marker, "linestyle": ""}
            ax.plot(spread, own, alpha=0.7, label=one.label if x == 0 else None, **look)
    ax.set_xticks(range(len(groups)), labels)
    ax.set_xlim(-0.6, len(groups) - 0.4)
