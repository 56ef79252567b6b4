"""Spectrum of the loss Hessian: both ends, density, negative part with certified brackets, trace."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.registry import known
from ssat_probe.table import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch.nn import Parameter

    from ssat_probe.measures.hessian import HessianOperator
    from ssat_probe.subject import Batch, Subject

LOSSES = ("cross_entropy", "reconstruction", "joint")
MATRICES = ("hessian", "gauss_newton")


@dataclass(frozen=True)
class Probe:
    """Spectrum of the loss Hessian: both ends, density, negative part with certified brackets, trace."""

    loss: str = "cross_entropy"
    "Whose Hessian: cross_entropy, reconstruction or joint."
    steps: int = 80
    "Lanczos steps per probe vector: Hessian-vector products, each a pass over all images."
    probes: int = 1
    "Random start vectors; more of them for the trace, more steps for everything else."
    seed: int = 0
    "Of the start vectors."
    method: str = "lanczos"
    "How: lanczos, exact (small models or blocks), lissa, batches (ends per mini-batch) or pyhessian."
    compare: tuple[str, ...] = ()
    "Methods to put side by side instead, with products, seconds and distance to the exact spectrum."
    params: tuple[str, ...] = ()
    "Patterns of the parameters looked at, as 'blocks.5.*' or '*.attn.q.*'; none means all."
    matrix: str = "hessian"
    "hessian, or gauss_newton: its positive semi-definite part."
    memory: float = 2.0
    "GiB that a dense matrix may take."

    split: ClassVar[str] = "train"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("quantity", "", "what the row holds"),
        Column("probe", "", "start vector, from 0; -1 for what all of them give together"),
        Column(
            "index", "", "rank of an eigenvalue from its end, from 1; node or step, from 0; 0 for single quantities"
        ),
        Column("tau", "", "threshold as a share of the largest eigenvalue; empty where there is none"),
        Column("value", "", "the quantity, in `unit`; empty if its bracket is too wide to give one number"),
        Column("low", "", "lower end of what is certain: of value ± residual, or of the bracket of a share"),
        Column("high", "", "upper end of what is certain; for a check, the largest error allowed"),
        Column("standard_error", "", "chance error of the random start vectors, in `unit`"),
        Column("residual", "", "an eigenvalue lies within this distance of the value, in `unit`"),
        Column(
            "converged", "", "1 if the residual is small (or a check passed), 0 if not; empty where it does not apply"
        ),
        Column("weight", "", "of a quadrature node: share of the probe's mass"),
        Column("unit", "", "of value, low, high, standard_error, residual; 'loss' is loss per squared parameter unit"),
    )

    @property
    def num_steps(self) -> int:
        """Products that a run will take and tell of; 0 where the method does not know beforehand."""
        return self.steps * self.probes if self.method == "lanczos" and not self.compare else 0

    def measure(self, subject: "Subject", on_step: Callable[[int], None] | None = None) -> "DataFrame":
        """Certified spectrum of the mean loss over the subject's images.

        Args:
            subject: Model, images and losses.
            on_step: Called after each product of a Lanczos run with the number of products so far.

        Returns:
            One row per quantity, then one per eigenvalue listed, quadrature node and Lanczos coefficient. An option
            out of range or an operator that fails its certificate is a ValueError.
        """
        import pandas as pd

        from ssat_probe.measures.certificate import certify
        from ssat_probe.measures.methods import Settings, compared, rows_of

        self._check()
        subject = _in_float64(subject) if "exact" in (self.method, *self.compare) else subject
        everything = subject.parameters(self.loss)
        plain, operator = self._operators(subject, everything)
        certificate, evaluation = certify(operator), plain.evaluate()
        max_bytes = int(self.memory * 2**30)
        settings = Settings(self.steps, self.probes, self.seed, max_bytes, tuple(everything.values()), on_step)
        if self.compare:
            rows = compared(self.compare, operator, certificate, evaluation, settings)
        else:
            rows = rows_of(self.method, operator, certificate, evaluation, settings)
        names = [column.name for column in Probe.columns]
        defaults = {"probe": -1, "index": 0, "unit": ""}
        table = pd.DataFrame([defaults | row for row in rows], columns=names)
        return table.astype({name: float for name in names[3:-1]})

    def _check(self) -> None:
        """Refuse options that are out of range, before anything is computed."""
        from ssat_probe.measures.methods import METHODS

        known(self.loss, LOSSES, "losses")
        known(self.matrix, MATRICES, "matrices")
        for method in (self.method, *self.compare):
            known(method, METHODS, "methods")
        for name, least in (("steps", 2), ("probes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}. Take the default.")
        if not self.memory > 0:
            raise ValueError(f"memory must be more than 0 GiB, got {self.memory}. Take the default.")
        if self.matrix == "gauss_newton" and self.loss != "cross_entropy":
            raise ValueError(
                f"The Gauss-Newton matrix must be of the loss cross_entropy, got {self.loss!r}. Take --matrix hessian."
            )
        if self.matrix == "gauss_newton" and {"pyhessian"} & {self.method, *self.compare}:
            raise ValueError("PyHessian knows the matrix hessian only, got 'gauss_newton'. Leave pyhessian out.")

    def _operators(
        self, subject: "Subject", everything: "dict[str, Parameter]"
    ) -> "tuple[HessianOperator, HessianOperator]":
        """Hessian of the loss, for loss and gradient, and the matrix that is looked at: often the same."""
        from ssat_probe.measures.gauss_newton import cross_entropy_output, gauss_newton
        from ssat_probe.measures.hessian import HessianOperator
        from ssat_probe.measures.selection import selected

        parameters, coordinates = selected(everything, self.params)
        batches = _SizedBatches(subject.batches)
        plain = HessianOperator(
            parameters, lambda batch: subject.loss(batch, self.loss), batches, coordinates=coordinates
        )
        if self.matrix == "hessian":
            return plain, plain
        return plain, gauss_newton(
            parameters,
            lambda batch: cross_entropy_output(subject.model(batch.images)),
            batches,
            coordinates=coordinates,
        )

    def draw(self, table: "DataFrame") -> "Figure":
        """Density, negative part apart, certified shares below zero; both ends and negative energy per method.

        Args:
            table: What `measure` gave for one or more checkpoints, with the identity columns.

        Returns:
            Six panels; methods with several seeds as mean and 95 % interval over seeds.
        """
        from ssat_probe import curvature_drawing, drawing
        from ssat_probe.measures.spectrum import methods_in

        if methods_in(table) or not (table["quantity"].isin(["alpha", "eigenvalue"])).any():
            return curvature_drawing.draw(table)
        with drawing.style():
            figure, axes = drawing.panels(2, 3, height=4.4)
            _draw_density(axes[0], axes[1], table)
            _draw_shares(axes[2], table)
            for ax, quantity, title in zip(axes[3:], _SHOWN, _SHOWN.values(), strict=False):
                _draw_points(ax, table, quantity, title)
            drawing.legend_below(figure, _NOTE if max(one.num_seeds for one in drawing.series(table)) > 1 else "")
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """One row per checkpoint: both ends, then the negative part from the most to the least certain quantity.

        Args:
            table: What `measure` gave, with the identity columns.

        Returns:
            Shares of eigenvalues as brackets; a star marks an end that has not converged.
        """
        import pandas as pd

        from ssat_probe.measures.spectrum import methods_in, rows_by

        rows = []
        for checkpoint, one in table.groupby("checkpoint", sort=False):
            methods = methods_in(one)
            for method in methods:
                by_method = rows_by(one, method)
                costs = {name: _cell(by_method, name) for name in ("wasserstein", "products_used", "seconds")}
                shown = _summary(by_method)
                del shown["lambda_ratio"], shown["trace"]
                rows.append({"checkpoint": checkpoint, "by": method} | shown | costs)
            if not methods:
                rows.append({"checkpoint": checkpoint} | _summary(one))
        return pd.DataFrame(rows)


_NOTE = "thin lines, pale points: seeds; thick lines: mean; bars: 95 % t interval; shading: mean of the bounds"
_SHOWN = {
    "lambda_max": "largest eigenvalue [loss]",
    "lambda_min": "smallest eigenvalue [loss]",
    "negative_energy": "negative energy Σ|λ₋| / Σ|λ|",
}


_SHARES = ("mass_below", "near_zero_mass", "negative_fraction")


class _SizedBatches:
    """Batches of a subject with their sizes, readable again and again."""

    def __init__(self, batches: "Callable[[], Iterator[Batch]]") -> None:
        self._batches = batches

    def __iter__(self) -> "Iterator[tuple[Batch, int]]":
        for batch in self._batches():
            yield batch, len(batch.images)


def _in_float64(subject: "Subject") -> "Subject":
    """The same subject with a copy of its model in float64."""
    import copy
    import dataclasses

    import torch

    if next(subject.model.parameters()).dtype == torch.float64:
        return subject
    decoder = None if subject.decoder is None else copy.deepcopy(subject.decoder).double()
    model = copy.deepcopy(subject.model).double()
    return dataclasses.replace(subject, model=model, decoder=decoder, dtype=torch.float64)


def _summary(one: "DataFrame") -> dict[str, str]:
    """What the terminal shows of one spectrum, or of the ends of mini-batches."""
    from ssat_probe.measures.spectrum import TAUS, entry_of

    if (one["quantity"] == "nep").any():
        shown = ("nep", "ape", "power_nep", "power_ape", "num_batches", "batch_size")
        return {name: _cell(one, name) for name in shown}
    row = {}
    for quantity in ("lambda_max", "lambda_min"):
        row[quantity] = _cell(one, quantity, ".4g")
        if row[quantity] and entry_of(one, quantity)["converged"] != 1:
            row[quantity] += "*"
    row["lambda_ratio"] = _cell(one, "lambda_ratio")
    row["negative_energy"] = _cell(one, "negative_energy")
    for tau in TAUS:
        row[f"below -{tau:g} λmax"] = _cell(one, "mass_below", tau=tau)
    row["near_zero_mass"] = _cell(one, "near_zero_mass")
    row["negative_fraction"] = _cell(one, "negative_fraction")
    row["trace"] = _cell(one, "trace")
    return row


def _cell(one: "DataFrame", quantity: str, form: str = ".3g", tau: float | None = None) -> str:
    """A number with its uncertainty where it has one, empty where the method does not give it."""
    from ssat_probe.measures.spectrum import entry_of

    if not (one["quantity"] == quantity).any():
        return ""
    entry = entry_of(one, quantity, tau)
    if quantity in _SHARES and entry["low"] == entry["low"]:
        return _bracket(entry)
    if entry["standard_error"] == entry["standard_error"] and quantity in ("negative_energy", "trace"):
        return _plus_minus(entry)
    return f"{entry['value']:{form}}"


def _bracket(entry: dict[str, Any]) -> str:
    return f"[{entry['low']:.3g}, {entry['high']:.3g}]"


def _plus_minus(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.3g} ± {entry['standard_error']:.1g}"


def _draw_density(whole: "Axes", negative: "Axes", table: "DataFrame") -> None:
    """Number of eigenvalues per unit, over the whole spectrum and below zero alone: thin per seed, thick their mean."""
    import numpy as np
    from matplotlib.ticker import NullLocator

    from ssat_probe import drawing
    from ssat_probe.measures.spectrum import smoothed

    low = min(table.loc[table["quantity"] == "lambda_min", "value"].min(), 0.0)
    high = max(table.loc[table["quantity"] == "lambda_max", "value"].max(), 0.0)
    bulk = 1e-3 * max(high, -low) or 1.0  # linear part of the axis: what counts as near zero
    wide = bulk * np.sinh(np.linspace(np.arcsinh(1.4 * low / bulk), np.arcsinh(1.4 * high / bulk), 401))
    for ax, grid in ((whole, wide), (negative, np.linspace(1.15 * low or -bulk, 0, 301))):
        highest = 1.0
        for one in drawing.series(table):
            look: Any = {"color": one.look.colour, "linestyle": one.look.linestyle}
            spectra = one.table.groupby("checkpoint", sort=False)
            curves = np.array([smoothed(rows, grid, bulk) for _, rows in spectra])
            highest = max(highest, curves.max())
            if len(curves) > 1:
                ax.plot(grid, curves.T, linewidth=0.5, alpha=0.5, **look)
            ax.plot(grid, curves.mean(axis=0), label=one.label, **look)
            smallest = one.table.loc[one.table["quantity"] == "lambda_min", "value"]
            ax.plot(smallest, [1e-2] * len(smallest), marker=3, linestyle="", color=one.look.colour, clip_on=False)
        ax.set_yscale("log")
        ax.set_ylim(1e-2, 3 * highest)
        ax.set_xlim(grid[0], grid[-1])
    whole.set_xscale("symlog", linthresh=bulk)
    top = int(np.floor(np.log10(max(high, -low, bulk))))
    decades = 10.0 ** np.arange(top, np.log10(bulk), -2)
    whole.set_xticks(sorted({0.0, *decades[decades < high], *-decades[decades < -low]}))
    whole.xaxis.set_minor_locator(NullLocator())
    whole.axvline(0, color="black", linewidth=0.5, zorder=0)
    drawing.label_axes(whole, "eigenvalue [loss]", "eigenvalues per unit", "Spectrum")
    drawing.label_axes(negative, "eigenvalue [loss]", "eigenvalues per unit", "Negative part alone")


def _draw_shares(ax: "Axes", table: "DataFrame") -> None:
    """Share of eigenvalues below -τ, between its certain bounds; mean of each bound over the seeds of a method."""
    import numpy as np

    from ssat_probe import drawing
    from ssat_probe.measures.spectrum import bounds_below

    taus = np.logspace(-4, 0, 41)
    for one in drawing.series(table):
        bounds = [bounds_below(rows, taus) for _, rows in one.table.groupby("checkpoint", sort=False)]
        low, high = np.maximum(np.mean(bounds, axis=0), 1e-12)
        ax.fill_between(taus, low, high, color=one.look.colour, alpha=0.25, linewidth=0)
        ax.plot(taus, (low + high) / 2, color=one.look.colour, linestyle=one.look.linestyle, label=one.label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(1e-5, 1)
    drawing.label_axes(ax, "τ / largest eigenvalue", "share of eigenvalues below -τ", "Certified bounds")


def _draw_points(ax: "Axes", table: "DataFrame", quantity: str, label: str) -> None:
    """One point per checkpoint beside the mean over seeds with its 95 % interval."""
    from ssat_probe import drawing

    drawn = drawing.dots_by_series(ax, table[table["quantity"] == quantity], "value")
    if any(len(one.label) > 10 for one in drawn):
        ax.set_xticks(range(len(drawn)), [""] * len(drawn))  # the legend names them
    ax.axhline(0, color="black", linewidth=0.5, zorder=0)
    drawing.label_axes(ax, "", label)
