"""Spectrum of the loss Hessian: both ends, density, negative part with certified brackets, trace."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.registry import known
from ssat_probe.table import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from ssat_probe.measures.certificate import Certificate
    from ssat_probe.measures.hessian import Evaluation, HessianOperator
    from ssat_probe.measures.lanczos import Krylov
    from ssat_probe.subject import Batch, Subject

LOSSES = ("cross_entropy", "reconstruction", "joint")
TAUS = (1e-3, 1e-2)  # thresholds as shares of the largest eigenvalue; CURVATURE notes 8.3 (c)
NUM_ENDS = 10  # eigenvalues listed at either end
GUARD = 100, 3  # distance kept from thresholds, in roundings of the largest eigenvalue and in noise floors; no source
WIDEST = 0.1  # a share of eigenvalues that is known no better than this is not given as a number; ours, no source


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

    def measure(self, subject: "Subject", on_step: Callable[[int], None] | None = None) -> "DataFrame":
        """Certified spectrum of the mean loss over the subject's images.

        Args:
            subject: Model, images and losses.
            on_step: Called after each product of a Lanczos run with the number of products so far.

        Returns:
            One row per quantity, then one per eigenvalue listed, quadrature node and Lanczos coefficient.

        Raises:
            ValueError: If an option is out of range, or the operator fails its certificate.
        """
        from ssat_probe.measures.certificate import certify
        from ssat_probe.measures.hessian import HessianOperator
        from ssat_probe.measures.lanczos import lanczos

        known(self.loss, LOSSES, "losses")
        for name, least in (("steps", 2), ("probes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}. Take the default.")
        operator = HessianOperator(
            subject.parameters(self.loss), lambda batch: subject.loss(batch, self.loss), _SizedBatches(subject.batches)
        )
        certificate = certify(operator)
        evaluation = operator.evaluate()

        def step_done(steps: int) -> None:
            if on_step is not None:
                on_step(len(krylovs) * self.steps + steps)

        krylovs: list[Krylov] = []
        with operator:
            for probe in range(self.probes):
                seed = self.seed + 1_000_003 * probe
                options: dict[str, Any] = {"precision": operator.precision, "device": operator.device, "seed": seed}
                krylovs.append(lanczos(operator.product, operator.size, self.steps, on_step=step_done, **options))
        return _table(krylovs, certificate, evaluation, operator)

    def draw(self, table: "DataFrame") -> "Figure":
        """Density, negative part apart, certified shares below zero; both ends and negative energy per method.

        Args:
            table: What `measure` gave for one or more checkpoints, with the identity columns.

        Returns:
            Six panels; methods with several seeds as mean and 95 % interval over seeds.
        """
        from ssat_probe import drawing

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

        rows = []
        for checkpoint, one in table.groupby("checkpoint", sort=False):
            row = {"checkpoint": checkpoint}
            for quantity in ("lambda_max", "lambda_min"):
                entry = _entry(one, quantity)
                row[quantity] = f"{entry['value']:.4g}" + ("" if entry["converged"] == 1 else "*")
            row["lambda_ratio"] = f"{_entry(one, 'lambda_ratio')['value']:.3g}"
            row["negative_energy"] = _plus_minus(_entry(one, "negative_energy"))
            for tau in TAUS:
                row[f"below -{tau:g} λmax"] = _bracket(_entry(one, "mass_below", tau))
            row["near_zero_mass"] = _bracket(_entry(one, "near_zero_mass"))
            row["negative_fraction"] = _bracket(_entry(one, "negative_fraction"))
            row["trace"] = _plus_minus(_entry(one, "trace"))
            rows.append(row)
        return pd.DataFrame(rows)


_NOTE = "thin lines, pale points: seeds; thick lines: mean; bars: 95 % t interval; shading: mean of the bounds"
_SHOWN = {
    "lambda_max": "largest eigenvalue [loss]",
    "lambda_min": "smallest eigenvalue [loss]",
    "negative_energy": "negative energy Σ|λ₋| / Σ|λ|",
}


class _SizedBatches:
    """Batches of a subject with their sizes, readable again and again."""

    def __init__(self, batches: "Callable[[], Iterator[Batch]]") -> None:
        self._batches = batches

    def __iter__(self) -> "Iterator[tuple[Batch, int]]":
        for batch in self._batches():
            yield batch, len(batch.images)


def _table(
    krylovs: "Sequence[Krylov]", certificate: "Certificate", evaluation: "Evaluation", operator: "HessianOperator"
) -> "DataFrame":
    import pandas as pd

    names = [column.name for column in Probe.columns]
    defaults = {"probe": -1, "index": 0, "unit": ""}
    rows = [
        *_ends(krylovs),
        *_negative_part(krylovs, _guard(krylovs, certificate.noise)),
        *_others(krylovs, certificate, evaluation, operator),
        *_coefficients(krylovs),
    ]
    table = pd.DataFrame([defaults | row for row in rows], columns=names)
    return table.astype({name: float for name in names[3:-1]})


def _ends(krylovs: "Sequence[Krylov]") -> list[dict[str, Any]]:
    """Eigenvalues at both ends. A Ritz value never lies outside the eigenvalue of its rank: the outermost is best."""
    from ssat_probe.measures.lanczos import beyond_ends, ritz

    found = [ritz(krylov) for krylov in krylovs]
    num = min(NUM_ENDS, (len(found[0].values) + 1) // 2)
    listed: list[dict[str, Any]] = []
    for quantity, sign in (("top_eigenvalue", 1), ("bottom_eigenvalue", -1)):
        for rank in range(1, num + 1):
            place = -rank if sign == 1 else rank - 1
            one = max(found, key=lambda run: sign * run.values[place])
            value, residual = float(one.values[place]), float(one.residuals[place])
            listed.append(
                {"quantity": quantity, "index": rank, "value": value, "low": value - residual, "high": value + residual}
                | {"residual": residual, "converged": float(one.converged[place]), "unit": "loss"}
            )
    top, bottom = listed[0], listed[num]
    ratio = max(-bottom["value"], 0.0) / top["value"] if top["value"] > 0 else float("nan")
    return [
        top | {"quantity": "lambda_max", "index": 0},
        bottom | {"quantity": "lambda_min", "index": 0},
        {"quantity": "lambda_ratio", "value": ratio},
        {"quantity": "beyond_ends", "value": min(map(beyond_ends, krylovs)), "unit": "loss"},
        *listed,
    ]


def _negative_part(krylovs: "Sequence[Krylov]", guard: float) -> list[dict[str, Any]]:
    """From the most to the least certain: energy, shares beyond thresholds, share near zero, share below zero."""
    from ssat_probe.measures.lanczos import ritz
    from ssat_probe.measures.quadrature import mass, negative_energy

    largest = max(float(ritz(krylov).values[-1]) for krylov in krylovs)
    scale = largest if largest > 0 else max(krylov.scale for krylov in krylovs)
    rows = [{"quantity": "negative_energy"} | asdict(negative_energy(krylovs))]
    for tau in TAUS:
        rows.append({"quantity": "mass_below", "tau": tau} | asdict(mass(krylovs, None, -tau * scale, guard)))
    near_zero = mass(krylovs, -TAUS[0] * scale, TAUS[0] * scale, guard)
    rows.append({"quantity": "near_zero_mass", "tau": TAUS[0]} | asdict(near_zero))
    below = mass(krylovs, None, 0.0, guard)
    refused = {"value": float("nan")} if below.width > WIDEST else {}
    rows.append({"quantity": "negative_fraction", "tau": 0.0} | asdict(below) | refused)
    return rows


def _guard(krylovs: "Sequence[Krylov]", noise: float) -> float:
    """Eigenvalues nearer to a threshold than this may lie on either side of it."""
    return max(GUARD[0] * max(krylov.precision * krylov.scale for krylov in krylovs), GUARD[1] * noise)


def _others(
    krylovs: "Sequence[Krylov]", certificate: "Certificate", evaluation: "Evaluation", operator: "HessianOperator"
) -> list[dict[str, Any]]:
    from ssat_probe.measures.quadrature import trace

    return [
        {"quantity": "trace", "unit": "loss"} | asdict(trace(krylovs)),
        {"quantity": "loss", "value": evaluation.loss, "unit": "loss"},
        {"quantity": "gradient_norm", "value": float(evaluation.gradient.norm()), "unit": "loss"},
        {"quantity": "num_parameters", "value": operator.size},
        {"quantity": "num_images", "value": sum(evaluation.batch_sizes)},
        {"quantity": "num_products", "value": operator.num_products},
        {"quantity": "precision", "value": operator.precision},
        *(
            {"quantity": f"check_{check.name}".replace(" ", "_"), "value": check.measured, "high": check.allowed}
            | {"converged": 1.0}
            for check in certificate.checks
        ),
        {"quantity": "noise_floor", "value": certificate.noise, "unit": "loss"},
    ]


def _coefficients(krylovs: "Sequence[Krylov]") -> Iterator[dict[str, Any]]:
    """Nodes and weights of the quadrature, and the coefficients from which all else can be redone without a product."""
    from ssat_probe.measures.lanczos import ritz

    for probe, krylov in enumerate(krylovs):
        found = ritz(krylov)
        for index, entry in enumerate(zip(found.values, found.residuals, found.converged, found.weights, strict=True)):
            named = dict(zip(("value", "residual", "converged", "weight"), map(float, entry), strict=True))
            yield {"quantity": "node", "probe": probe, "index": index, "unit": "loss"} | named
        for step, alpha in enumerate(krylov.alphas):
            yield {"quantity": "alpha", "probe": probe, "index": step, "value": alpha, "unit": "loss"}
        for step, beta in enumerate(krylov.betas):  # converged: the space was invariant, the coupling is rounding
            flag = {"converged": float(step in krylov.breaks)}
            yield {"quantity": "beta", "probe": probe, "index": step, "value": beta, "unit": "loss"} | flag


def _krylovs(table: "DataFrame") -> "list[Krylov]":
    """The runs of one checkpoint, from its table."""
    import numpy as np

    from ssat_probe.measures.lanczos import Krylov

    size, precision = int(_entry(table, "num_parameters")["value"]), float(_entry(table, "precision")["value"])
    runs = []
    for probe in sorted(table.loc[table["quantity"] == "alpha", "probe"].unique()):
        rows = table[table["probe"] == probe].sort_values("index")
        alphas, betas = (rows[rows["quantity"] == name] for name in ("alpha", "beta"))
        breaks = tuple(np.flatnonzero(betas["converged"].to_numpy() == 1).tolist())
        values = [rows["value"].to_numpy(dtype=float) for rows in (alphas, betas)]
        runs.append(Krylov(values[0], values[1], breaks, size, precision))
    return runs


def _entry(table: "DataFrame", quantity: str, tau: float | None = None) -> "dict[str, Any]":
    """The row of a single quantity of one checkpoint."""
    rows = table[table["quantity"] == quantity]
    if tau is not None:
        rows = rows[rows["tau"] == tau]
    return {str(name): value for name, value in rows.iloc[0].items()}


def _bracket(entry: dict[str, Any]) -> str:
    return f"[{entry['low']:.3g}, {entry['high']:.3g}]"


def _plus_minus(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.3g} ± {entry['standard_error']:.1g}"


def _draw_density(whole: "Axes", negative: "Axes", table: "DataFrame") -> None:
    """Number of eigenvalues per unit, over the whole spectrum and below zero alone: thin per seed, thick their mean."""
    import numpy as np
    from matplotlib.ticker import NullLocator

    from ssat_probe import drawing
    from ssat_probe.measures.quadrature import counts

    low = min(table.loc[table["quantity"] == "lambda_min", "value"].min(), 0.0)
    high = max(table.loc[table["quantity"] == "lambda_max", "value"].max(), 0.0)
    bulk = 1e-3 * max(high, -low) or 1.0  # linear part of the axis: what counts as near zero
    wide = bulk * np.sinh(np.linspace(np.arcsinh(1.4 * low / bulk), np.arcsinh(1.4 * high / bulk), 401))
    for ax, grid in ((whole, wide), (negative, np.linspace(1.15 * low or -bulk, 0, 301))):
        highest = 1.0
        for one in drawing.series(table):
            look: Any = {"color": one.look.colour, "linestyle": one.look.linestyle}
            runs = [_krylovs(rows) for _, rows in one.table.groupby("checkpoint", sort=False)]
            curves = np.array([counts(krylovs, grid, bulk) for krylovs in runs])
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
    from ssat_probe.measures.quadrature import mass

    taus = np.logspace(-4, 0, 41)
    for one in drawing.series(table):
        bounds = []
        for _, rows in one.table.groupby("checkpoint", sort=False):
            largest, noise = (float(_entry(rows, name)["value"]) for name in ("lambda_max", "noise_floor"))
            krylovs = _krylovs(rows)
            guard = _guard(krylovs, noise)
            shares = (mass(krylovs, None, -tau * largest, guard) for tau in taus)
            bounds.append([(share.low, share.high) for share in shares])
        low, high = np.maximum(np.mean(bounds, axis=0).T, 1e-12)
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
