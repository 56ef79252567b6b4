"""Figures of the Hessian probe beyond one spectrum per checkpoint: methods side by side, ends of mini-batches."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from ssat_probe import drawing
from ssat_probe.measures.redrawing import bandwidth_of
from ssat_probe.measures.spectrum import entry_of, measure_of, methods_in, rows_by, smoothed

_LOOKS: dict[str, dict[str, Any]] = {  # colours of Okabe & Ito (2008); the reference is a grey area
    "exact": {"color": "#555555", "marker": "s", "linestyle": "-"},
    "lanczos": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "lissa": {"color": "#D55E00", "marker": "^", "linestyle": "--"},
    "pyhessian": {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
}
_LABELS = {"exact": "exact", "lanczos": "Lanczos", "lissa": "LiSSA", "pyhessian": "PyHessian"}
_NUM_COLUMNS = 3
_LEAST = 0.1  # eigenvalues per bin at the foot of the spectra
_NOTHING = 1e-12  # of the largest eigenvalue: an end of a convex part is zero but for rounding


def draw(table: DataFrame) -> Figure:
    """Figure of a comparison of methods, of the ends of mini-batches, or of a method without a certified spectrum.

    Args:
        table: Of the Hessian probe, with the identity columns.

    Returns:
        Spectra over the exact one with the errors of each method; or distributions with NEP and APE.
    """
    with drawing.style():
        if (table["quantity"] == "nep").any():
            return _batches(table)
        if not methods_in(table):
            method = "lissa" if (table["quantity"] == "damping").any() else "pyhessian"
            table = table.assign(quantity=method + ":" + table["quantity"])
        return _comparison(table)


def _comparison(table: DataFrame) -> Figure:
    """Two rows of spectra, one column per method of training (its first seed); a row of errors over all checkpoints."""
    shown = drawing.series(table)[:_NUM_COLUMNS]
    is_alone = len(shown) == 1  # then spectrum and negative part stand beside each other
    figure, axes = drawing.panels(2 if is_alone else 3, _NUM_COLUMNS, height=4.4 if is_alone else 6.4)
    below = 1 if is_alone else _NUM_COLUMNS
    for column, one in enumerate(shown):
        first = one.table[one.table["checkpoint"] == one.table["checkpoint"].iloc[0]]
        _spectra(axes[column], axes[below + column], first, one.label)
    used = {place + column for column in range(len(shown)) for place in (0, below)}
    for place, ax in enumerate(axes[:-_NUM_COLUMNS]):
        if place not in used:
            ax.remove()
    methods = [method for method in _LOOKS if method in methods_in(table)]
    errors, energies, costs = axes[-_NUM_COLUMNS:]
    _errors(errors, table, methods)
    _energies(energies, table, methods)
    _costs(costs, table, methods)
    drawing.legend_below(figure, "spectra: first seed; dots: every checkpoint")
    return figure


def _spectra(whole: Axes, negative: Axes, table: DataFrame, label: str) -> None:
    """Eigenvalues per bin: exact ones as a histogram, what each method says as a line; below, the negative part."""
    ends = [float(entry_of(table, f"{m}:lambda_max")["value"]) for m in methods_in(table) if _has(table, m)]
    bottoms = table.loc[table["quantity"].str.endswith(":lambda_min"), "value"]
    high, low = max([*ends, 0.0]), min([*bottoms, 0.0])
    low = low if low < -_NOTHING * high else 0.0
    bulk = 1e-3 * max(high, -low) or 1.0
    _spectrum(whole, table, 1.5 * low, 1.5 * high or bulk, bulk)
    _spectrum(negative, table, 1.2 * low or -bulk, 0.0, -1e-3 * low or bulk)
    drawing.label_axes(whole, "eigenvalue [loss]", "eigenvalues per bin", f"{label}: spectrum")
    drawing.label_axes(negative, "eigenvalue [loss]", "eigenvalues per bin", f"{label}: negative part")


def _spectrum(ax: Axes, table: DataFrame, low: float, high: float, bulk: float) -> None:
    """One axis, linear within ``bulk`` of zero and logarithmic outside, with bins of equal width on it."""
    first, last = float(np.arcsinh(low / bulk)), float(np.arcsinh(high / bulk))
    places = np.linspace(first, last, 501)
    grid, highest = bulk * np.sinh(places), 1.0
    width = 2 * bandwidth_of(table)  # of a bin on the asinh axis
    for method in [method for method in _LOOKS if method in methods_in(table)]:
        rows, look = rows_by(table, method), _LOOKS[method]
        if method == "pyhessian":
            points = rows.loc[rows["quantity"].isin(["top_eigenvalue", "bottom_eigenvalue"]), "value"]
            inside = points[(points >= low) & (points <= high)]
            ax.plot(inside, [1] * len(inside), **{**look, "linestyle": ""}, label="PyHessian")
        elif method == "exact":
            values, _ = measure_of(rows)
            edges = np.linspace(first, last, 2 + int((last - first) / width))
            numbers, _ = np.histogram(np.arcsinh(values / bulk), bins=edges)
            highest = max(highest, numbers.max())
            ax.stairs(numbers, bulk * np.sinh(edges), baseline=_LEAST, fill=True, color="#bbbbbb", label="exact")
        else:
            curve = width * np.hypot(grid, bulk) * smoothed(rows, grid, bulk, width / 2)
            highest = max(highest, curve.max())
            ax.plot(grid, curve, color=look["color"], linestyle=look["linestyle"], label=_LABELS[method])
    ax.set_ylim(_LEAST, 3 * highest)  # before the scale, which warns of a part without eigenvalues
    ax.set_yscale("log")
    ax.set_xscale("asinh", linear_width=bulk)
    ax.minorticks_off()
    decades = [sign * 10.0**power for power in range(-9, 7, 2 if high > 0 else 1) for sign in (-1, 1)]
    ax.set_xticks([0.0, *(tick for tick in decades if 2 * bulk <= abs(tick) and _holds(tick, grid))])
    ax.set_xlim(low, high)


def _holds(value: float, grid: np.ndarray) -> bool:
    """Whether a value lies within the ends of a grid."""
    return bool(grid[0] <= value <= grid[-1])


def _has(table: DataFrame, method: str) -> bool:
    return bool((table["quantity"] == f"{method}:lambda_max").any())


def _pairs(table: DataFrame, method: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """The quantity by a method and by the exact one, per checkpoint that has both; without exact, by itself twice."""
    one = table[table["quantity"] == f"{method}:{quantity}"].groupby("checkpoint", sort=False)["value"].first()
    exact = table[table["quantity"] == f"exact:{quantity}"].groupby("checkpoint", sort=False)["value"].first()
    exact = exact if len(exact) else one
    both = one.index.intersection(exact.index)
    return one[both].to_numpy(dtype=float), exact[both].to_numpy(dtype=float)


def _errors(ax: Axes, table: DataFrame, methods: list[str]) -> None:
    """Relative error of both ends, a dot per checkpoint; of an end at zero relative to the other end."""
    scales = [np.abs(_pairs(table, "exact", quantity)[1]) for quantity in ("lambda_max", "lambda_min")]
    for place, quantity in enumerate(("lambda_max", "lambda_min")):
        for offset, method in enumerate(method for method in methods if method != "exact"):
            found, exact = _pairs(table, method, quantity)
            least = _NOTHING * np.max([np.abs(exact), *(one for one in scales if len(one) == len(exact))], axis=0)
            errors = np.maximum(np.abs(found - exact) / np.maximum(np.abs(exact), np.maximum(least, 1e-300)), 1e-16)
            x = place + 0.22 * (offset - 1) + np.linspace(-0.06, 0.06, len(errors))
            ax.plot(x, errors, **{**_LOOKS[method], "linestyle": ""}, alpha=0.7)
        ax.axvline(place + 0.5, color="white")
        ax.set_xticks([0, 1], ["λmax", "λmin"])
    ax.set_yscale("log")
    drawing.label_axes(ax, "end of the spectrum", "relative error", "Ends against exact")


def _energies(ax: Axes, table: DataFrame, methods: list[str]) -> None:
    """Negative energy of each method against the exact one."""
    seen = []
    for method in methods:
        found, exact = _pairs(table, method, "negative_energy")
        if method != "exact" and len(found):
            ax.plot(exact, found, **{**_LOOKS[method], "linestyle": ""}, alpha=0.7)
            seen += [*found, *exact]
    if seen:
        ends = [0.95 * min(seen), 1.05 * max(seen)]
        ax.plot(ends, ends, color="black", linewidth=0.6, zorder=0)
    drawing.label_axes(ax, "exact", "by the method", "Negative energy Σ|λ₋| / Σ|λ|")


def _costs(ax: Axes, table: DataFrame, methods: list[str]) -> None:
    """Products of each method, with the seconds written beside; medians, so that one that was held up counts once."""
    products = [table[table["quantity"] == f"{method}:products_used"]["value"].median() for method in methods]
    seconds = [table[table["quantity"] == f"{method}:seconds"]["value"].median() for method in methods]
    ax.barh(range(len(methods)), np.nan_to_num(products), color=[_LOOKS[method]["color"] for method in methods])
    for place, (used, spent) in enumerate(zip(products, seconds, strict=True)):
        if np.isfinite(used):
            ax.text(
                used, place, f" {spent:.2g} s" if np.isfinite(spent) else "", va="center", fontsize=7, in_layout=False
            )
    ax.set_yticks(range(len(methods)), [_LABELS[method] for method in methods])
    if np.isfinite(products).any():
        ax.set_xscale("log")
    ax.margins(x=0.35)
    ax.invert_yaxis()
    drawing.label_axes(ax, "Hessian-vector products", "method", "Cost (medians)")


def _batches(table: DataFrame) -> Figure:
    """Distribution of the ends over mini-batches, and NEP and APE beside those of signed power iteration."""
    figure, axes = drawing.panels(1, 3, height=2.6)
    ends = table.loc[table["quantity"].isin(["batch_max", "batch_min"])]
    bins = np.linspace(ends["value"].min(), ends["value"].max(), 41)
    for one in drawing.series(table):
        for quantity in ("batch_max", "batch_min"):
            values = one.table.loc[one.table["quantity"] == quantity, "value"]
            label = one.label if quantity == "batch_max" else None
            look: Any = {"color": one.look.colour, "linestyle": "-" if label else ":"}
            axes[0].hist(values, bins=bins.tolist(), histtype="step", density=True, label=label, **look)
    drawing.label_axes(axes[0], "eigenvalue [loss]", "share of mini-batches per unit", "λmax (solid), λmin (dotted)")
    for ax, quantity, title in zip(axes[1:], ("nep", "ape"), ("NEP", "APE [loss]"), strict=True):
        drawing.dots_by_series(ax, table[table["quantity"] == quantity], "value")
        if quantity == "nep":
            ax.set_ylim(-0.01, max(0.1, 1.1 * float(table.loc[table["quantity"] == "nep", "value"].max())))
        drawing.label_axes(ax, "", title)
    drawing.legend_below(figure)
    return figure
