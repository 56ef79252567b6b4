"""Figure and terminal rows of spectra: density, negative part apart, certified shares below zero, both ends."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from pandas import DataFrame

from ssat_probe import drawing
from ssat_probe.measures.redrawing import bandwidth_of
from ssat_probe.measures.spectrum import bounds_below, entry_of, methods_in, rows_by, smoothed

_NOTE = "thin lines, pale points: seeds; thick lines: mean; bars: 95 % t interval; shading: mean of the bounds"
_LONE_NOTE, _BARS = "shading: certain bounds", "bars: two standard errors from the choice of images; "
_SHOWN = {
    "lambda_max": "largest eigenvalue [loss]",
    "lambda_min": "smallest eigenvalue [loss]",
    "negative_energy": "negative energy Σ|λ₋| / Σ|λ|",
}


_OF_LISSA = (
    "damping",
    "damping_koh_liang",
    "scale",
    *(f"inverse_residual_{solver}" for solver in ("lissa", "lissa_batches", "cg", "minres")),
)
_SHARES = ("mass_below", "near_zero_mass", "negative_fraction")


def draw(table: DataFrame) -> Figure:
    """Density, negative part apart, certified shares below zero; both ends and negative energy per method.

    Args:
        table: What the Hessian probe gave for one or more checkpoints, with the identity columns.

    Returns:
        Six panels; methods with several seeds as mean and 95 % interval over seeds.
    """
    with drawing.style():
        figure, axes = drawing.panels(2, 3, height=4.4)
        _draw_density(axes[0], axes[1], table)
        _draw_shares(axes[2], table)
        for ax, quantity, title in zip(axes[3:], _SHOWN, _SHOWN.values(), strict=False):
            _draw_points(ax, table, quantity, title)
        alone = (_BARS if table["data_error"].notna().any() else "") + _LONE_NOTE
        drawing.legend_below(figure, _NOTE if max(one.num_seeds for one in drawing.series(table)) > 1 else alone)
    return figure


def summary(table: DataFrame) -> DataFrame:
    """One row per checkpoint, or per checkpoint and method of a comparison.

    Args:
        table: What the Hessian probe gave, with the identity columns.

    Returns:
        Numbers as text: shares of eigenvalues as brackets; a star marks an end that has not converged; behind ± the
            chance error of the start vectors, and the standard error from the choice of images by name.
    """
    rows = []
    for checkpoint, one in table.groupby("checkpoint", sort=False):
        methods = methods_in(one)
        for method in methods:
            by_method = rows_by(one, method)
            costs = {name: _cell(by_method, name) for name in ("wasserstein", "products_used", "seconds")}
            shown = _summary(by_method)
            kept = {name: cell for name, cell in shown.items() if name not in ("lambda_ratio", "trace")}
            rows.append({"checkpoint": checkpoint, "by": method} | kept | costs)
        if not methods:
            rows.append({"checkpoint": checkpoint} | _summary(one))
    return DataFrame(rows).fillna("")  # of methods that do not give a quantity


def _summary(one: DataFrame) -> dict[str, str]:
    """What the terminal shows of one spectrum, or of the ends of mini-batches."""
    if (one["quantity"] == "nep").any():
        shown = ("nep", "ape", "power_nep", "power_ape", "num_batches", "batch_size")
        return {name: _cell(one, name) for name in shown}
    row = {}
    is_lissa = (one["quantity"] == "inverse_residual_lissa").any()  # alone: its shares and trace say little
    for quantity in ("lambda_max", "lambda_min"):
        row[quantity] = _cell(one, quantity, ".4g")
        row[quantity] += _star(one, quantity) + _data_error(one, quantity)
    row["lambda_ratio"] = _cell(one, "lambda_ratio")
    row["negative_energy"] = _cell(one, "negative_energy") + _data_error(one, "negative_energy")
    if is_lissa:
        return row | {name: _cell(one, name) + _star(one, name) for name in _OF_LISSA}
    for tau in one.loc[one["quantity"] == "mass_below", "tau"].sort_values():
        row[f"below -{tau:g} λmax"] = _cell(one, "mass_below", tau=tau)
    row["near_zero_mass"] = _cell(one, "near_zero_mass")
    row["negative_fraction"] = _cell(one, "negative_fraction")
    row["trace"] = _cell(one, "trace") + _data_error(one, "trace")
    return row


def _star(one: DataFrame, quantity: str) -> str:
    """A star at what has not converged."""
    return "*" if (one.loc[one["quantity"] == quantity, "converged"].iloc[:1] == 0).any() else ""


def _cell(one: DataFrame, quantity: str, form: str = ".3g", tau: float | None = None) -> str:
    """A number with its uncertainty where it has one, empty where the method does not give it."""
    if not (one["quantity"] == quantity).any():
        return ""
    entry = entry_of(one, quantity, tau)
    if quantity in _SHARES and entry["low"] == entry["low"]:
        return _bracket(entry)
    if entry["standard_error"] == entry["standard_error"] and quantity in ("negative_energy", "trace"):
        return _plus_minus(entry)
    return f"{entry['value']:{form}}"


def _data_error(one: DataFrame, quantity: str) -> str:
    """What the choice of images adds to the uncertainty, where it is known."""
    errors = one.loc[one["quantity"] == quantity, "data_error"].dropna()
    return f" (data ± {errors.iloc[0]:.1g})" if len(errors) else ""


def _bracket(entry: dict[str, Any]) -> str:
    return f"[{entry['low']:.3g}, {entry['high']:.3g}]"


def _plus_minus(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.3g} ± {entry['standard_error']:.1g}"


def _draw_density(whole: Axes, negative: Axes, table: DataFrame) -> None:
    """Number of eigenvalues per unit, over the whole spectrum and below zero alone: thin per seed, thick their mean."""
    low = min(table.loc[table["quantity"] == "lambda_min", "value"].min(), 0.0)
    high = max(table.loc[table["quantity"] == "lambda_max", "value"].max(), 0.0)
    bulk = 1e-3 * max(high, -low) or 1.0  # linear part of the axis: what counts as near zero
    wide = bulk * np.sinh(np.linspace(np.arcsinh(1.4 * low / bulk), np.arcsinh(1.4 * high / bulk), 401))
    for ax, grid in ((whole, wide), (negative, np.linspace(1.15 * low or -bulk, 0, 301))):
        highest = 1.0
        for one in drawing.series(table):
            look: Any = {"color": one.look.colour, "linestyle": one.look.linestyle}
            spectra = one.table.groupby("checkpoint", sort=False)
            curves = np.array([smoothed(rows, grid, bulk, bandwidth_of(rows)) for _, rows in spectra])
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


def _draw_shares(ax: Axes, table: DataFrame) -> None:
    """Share of eigenvalues below -τ, between its certain bounds; mean of each bound over the seeds of a method."""
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


def _draw_points(ax: Axes, table: DataFrame, quantity: str, label: str) -> None:
    """One point per checkpoint beside the mean over seeds with its 95 % interval; error of the data at lone points."""
    drawn = drawing.dots_by_series(ax, table[table["quantity"] == quantity], "value")
    for place, one in enumerate(drawn):
        if one.num_seeds == 1 and one.table["data_error"].notna().all():
            bars: Any = {"yerr": 2 * one.table["data_error"], "color": one.look.colour, "capsize": 2.5, "fmt": "none"}
            ax.errorbar(place, one.table["value"].iloc[0], **bars)
    ax.axhline(0, color="black", linewidth=0.5, zorder=0)
    drawing.label_axes(ax, "", label)
