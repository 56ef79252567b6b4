"""What is read off a spectrum, as rows of a table: ends, negative part, trace, coefficients; and back."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float64
from pandas import DataFrame
from scipy import stats

from ssat_probe.measures.certificate import Certificate
from ssat_probe.measures.hessian import Evaluation, HessianOperator
from ssat_probe.measures.lanczos import Krylov, beyond_ends, ritz
from ssat_probe.measures.quadrature import counts, deflated, mass, negative_energy, trace

TAUS = (1e-3, 1e-2)  # thresholds as shares of the largest eigenvalue; CURVATURE notes 8.3 (c)
NUM_ENDS = 10  # eigenvalues listed at either end
GUARD = 100, 3  # distance kept from thresholds, in roundings of the largest eigenvalue and in noise floors; no source
NUM_LISTED = 5  # outermost eigenvalues by which an approximation is judged: what PyHessian is usually asked for
BANDWIDTH = 0.1  # least standard deviation of smoothed densities on the asinh axis; tuned, no source
WIDEST = 0.1  # a share of eigenvalues that is known no better than this is not given as a number; ours, no source


def ends(krylovs: Sequence[Krylov]) -> list[dict[str, Any]]:
    """Eigenvalues at both ends. A Ritz value never lies outside the eigenvalue of its rank: the outermost is best."""
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
    beyond = min(map(beyond_ends, krylovs))  # infinite where it says nothing
    ratio = max(-bottom["value"], 0.0) / top["value"] if top["value"] > 0 else float("nan")
    return [
        top | {"quantity": "lambda_max", "index": 0},
        bottom | {"quantity": "lambda_min", "index": 0},
        {"quantity": "lambda_ratio", "value": ratio},
        {"quantity": "beyond_ends", "value": beyond if np.isfinite(beyond) else np.nan, "unit": "loss"},
        *listed,
    ]


def negative_part(krylovs: Sequence[Krylov], guard: float, taus: Sequence[float] = TAUS) -> list[dict[str, Any]]:
    """From the most to the least certain: energy, shares beyond thresholds, share near zero, share below zero."""
    largest = max(float(ritz(krylov).values[-1]) for krylov in krylovs)
    scale = largest if largest > 0 else max(krylov.scale for krylov in krylovs)
    rows = [{"quantity": "negative_energy"} | asdict(negative_energy(krylovs))]
    for tau in taus:
        rows.append({"quantity": "mass_below", "tau": tau} | asdict(mass(krylovs, None, -tau * scale, guard)))
    near_zero = mass(krylovs, -min(taus) * scale, min(taus) * scale, guard)
    rows.append({"quantity": "near_zero_mass", "tau": min(taus)} | asdict(near_zero))
    below = mass(krylovs, None, 0.0, guard)
    refused = {"value": float("nan")} if below.width > WIDEST else {}
    rows.append({"quantity": "negative_fraction", "tau": 0.0} | asdict(below) | refused)
    return rows


def distance_kept(krylovs: Sequence[Krylov], noise: float) -> float:
    """Eigenvalues nearer to a threshold than this may lie on either side of it."""
    return max(GUARD[0] * max(krylov.precision * krylov.scale for krylov in krylovs), GUARD[1] * noise)


def trace_row(krylovs: Sequence[Krylov]) -> dict[str, Any]:
    """Trace with its standard error."""
    return {"quantity": "trace", "unit": "loss"} | asdict(trace(krylovs))


def facts(certificate: Certificate, evaluation: Evaluation, operator: HessianOperator) -> list[dict[str, Any]]:
    """Loss, sizes, and what the certificate measured."""
    return [
        {"quantity": "loss", "value": evaluation.loss, "unit": "loss"},
        {"quantity": "gradient_norm", "value": float(evaluation.gradient.norm()), "unit": "loss"},
        {"quantity": "num_parameters", "value": operator.size},
        {"quantity": "num_images", "value": sum(evaluation.batch_sizes)},
        {"quantity": "num_products", "value": operator.num_products},
        {"quantity": "precision", "value": operator.precision},
        *(
            {"quantity": f"check_{check.name}".replace(" ", "_"), "value": check.measured, "high": check.allowed}
            | {"converged": float("nan") if np.isnan(check.measured) else 1.0}
            for check in certificate.checks
        ),
        {"quantity": "noise_floor", "value": certificate.noise, "unit": "loss"},
    ]


def coefficients(krylovs: Sequence[Krylov]) -> Iterator[dict[str, Any]]:
    """Nodes and weights of the quadrature, and the coefficients from which all else can be redone without a product."""
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


def runs_of(table: DataFrame) -> list[Krylov]:
    """The runs of one checkpoint, from its table."""
    if not (table["quantity"] == "alpha").any():
        return []
    size, precision = int(entry_of(table, "num_parameters")["value"]), float(entry_of(table, "precision")["value"])
    runs = []
    for probe in sorted(table.loc[table["quantity"] == "alpha", "probe"].unique()):
        rows = table[table["probe"] == probe].sort_values("index")
        alphas, betas = (rows[rows["quantity"] == name] for name in ("alpha", "beta"))
        breaks = tuple(np.flatnonzero(betas["converged"].to_numpy() == 1).tolist())
        values = [rows["value"].to_numpy(dtype=float) for rows in (alphas, betas)]
        runs.append(Krylov(values[0], values[1], breaks, size, precision))
    return runs


def entry_of(table: DataFrame, quantity: str, tau: float | None = None) -> dict[str, Any]:
    """The row of a single quantity of one checkpoint."""
    rows = table[table["quantity"] == quantity]
    if tau is not None:
        rows = rows[rows["tau"] == tau]
    return {str(name): value for name, value in rows.iloc[0].items()}


def exact_rows(eigenvalues: Float64[np.ndarray, " eigenvalue"], taus: Sequence[float] = TAUS) -> list[dict[str, Any]]:
    """The same quantities from all eigenvalues: every bracket is a point, but that of the share below zero.

    An eigenvalue within rounding of zero has no sign: `low` counts those surely negative, `high` the doubtful too.

    Args:
        eigenvalues: Of the whole matrix, ascending.
        taus: Thresholds as shares of the largest eigenvalue.

    Returns:
        Rows in the order of the approximate ones, then one row per eigenvalue, the smallest first.
    """
    bottom, top = float(eigenvalues[0]), float(eigenvalues[-1])
    scale = top if top > 0 else float(np.abs(eigenvalues).max())
    absolute = float(np.abs(eigenvalues).sum())
    energy = float(np.abs(eigenvalues[eigenvalues < 0]).sum()) / absolute if absolute > 0 else float("nan")
    rounding = len(eigenvalues) * 2.0**-52 * float(np.abs(eigenvalues).max())
    num = min(NUM_ENDS, (len(eigenvalues) + 1) // 2)

    def known(quantity: str, value: float, index: int = 0, **more: Any) -> dict[str, Any]:
        sure = {"low": value, "high": value, "residual": 0.0, "converged": 1.0, "unit": "loss"}
        return {"quantity": quantity, "value": float(value), "index": index} | sure | more

    def share(quantity: str, tau: float, inside: Any) -> dict[str, Any]:
        return known(quantity, float(np.mean(inside)), tau=tau, unit="", residual=np.nan, converged=np.nan)

    return [
        known("lambda_max", top),
        known("lambda_min", bottom),
        {"quantity": "lambda_ratio", "value": max(-bottom, 0.0) / top if top > 0 else float("nan")},
        *(known("top_eigenvalue", value, i + 1) for i, value in enumerate(eigenvalues[::-1][:num])),
        *(known("bottom_eigenvalue", value, i + 1) for i, value in enumerate(eigenvalues[:num])),
        known("negative_energy", energy, unit="", residual=np.nan, converged=np.nan),
        *(share("mass_below", tau, eigenvalues < -tau * scale) for tau in taus),
        share("near_zero_mass", min(taus), np.abs(eigenvalues) <= min(taus) * scale),
        share("negative_fraction", 0.0, eigenvalues < -rounding) | {"high": float(np.mean(eigenvalues < rounding))},
        known("trace", float(eigenvalues.sum())),
        *(known("eigenvalue", value, i + 1) for i, value in enumerate(eigenvalues)),
    ]


def node_shares(
    values: Float64[np.ndarray, " node"], weights: Float64[np.ndarray, " node"], taus: Sequence[float] = TAUS
) -> list[dict[str, Any]]:
    """Shares beyond thresholds by the weights of a quadrature alone, without a bracket."""
    scale = float(values.max()) if values.max() > 0 else float(np.abs(values).max())
    inside = [("mass_below", tau, values < -tau * scale) for tau in taus]
    inside.append(("near_zero_mass", min(taus), np.abs(values) <= min(taus) * scale))
    return [{"quantity": name, "tau": tau, "value": float(weights @ places)} for name, tau, places in inside]


def measure_of(table: DataFrame) -> tuple[Float64[np.ndarray, " node"], Float64[np.ndarray, " node"]]:
    """Spectrum of one checkpoint and algorithm as places and shares: all eigenvalues, or the quadrature.

    Args:
        table: Rows of one algorithm.

    Returns:
        Ascending places and weights that sum to one; both empty if the algorithm gives no spectrum.
    """
    exact = table[table["quantity"] == "eigenvalue"]
    if len(exact):
        values = np.sort(exact["value"].to_numpy(dtype=float))
        return values, np.full(len(values), 1 / len(values))
    parts = [deflated(krylov) for krylov in runs_of(table)]
    if not parts:
        rows = table[table["quantity"] == "node"]
        values, weights = (rows[name].to_numpy(dtype=float) for name in ("value", "weight"))
    else:
        values = np.concatenate([np.append(part.atoms, part.nodes) for part in parts])
        shares = [np.append(np.ones(len(p.atoms)), p.num_rest * p.weights) / p.size for p in parts]
        weights = np.concatenate(shares) / len(parts)
    order = values.argsort()
    return values[order], weights[order]


def smoothed(
    table: DataFrame, grid: Float64[np.ndarray, " point"], bulk: float, narrowest: float = BANDWIDTH
) -> Float64[np.ndarray, " point"]:
    """Eigenvalues per unit of eigenvalue, on the axis of `counts`, whatever the algorithm.

    Args:
        table: Rows of one checkpoint and algorithm.
        grid: Eigenvalues at which to evaluate.
        bulk: Where the axis turns from linear to logarithmic.
        narrowest: As in `counts`; the width of every curve where all eigenvalues are known.

    Returns:
        Integrates to the number of parameters.
    """
    runs = runs_of(table)
    if runs:
        return counts(runs, grid, bulk, narrowest)
    values, weights = measure_of(table)
    distances = (np.arcsinh(grid / bulk)[:, None] - np.arcsinh(values / bulk)) / narrowest
    total = np.exp(-(distances**2) / 2) @ weights / (narrowest * np.sqrt(2 * np.pi)) / np.hypot(grid, bulk)
    return total * float(entry_of(table, "num_parameters")["value"])


def bounds_below(
    table: DataFrame, taus: Float64[np.ndarray, " threshold"]
) -> tuple[Float64[np.ndarray, " threshold"], Float64[np.ndarray, " threshold"]]:
    """Certain bounds of the share of eigenvalues below -τ times the largest one.

    Args:
        table: Rows of one checkpoint and algorithm.
        taus: Positive.

    Returns:
        Lower and upper bounds; equal where all eigenvalues are known.
    """
    largest = float(entry_of(table, "lambda_max")["value"])
    runs = runs_of(table)
    if not runs:
        values, weights = measure_of(table)
        shares = (values[:, None] < -taus * largest).T @ weights
        return shares, shares
    kept = distance_kept(runs, float(entry_of(table, "noise_floor")["value"]))
    found = [mass(runs, None, -tau * largest, kept) for tau in taus]
    return np.array([one.low for one in found]), np.array([one.high for one in found])


def wasserstein(one: DataFrame, other: DataFrame) -> float:
    """Wasserstein-1 distance of two spectra: mean distance over which eigenvalues must move.

    Args:
        one: Rows of one algorithm.
        other: Rows of another, for the same matrix.

    Returns:
        In units of the eigenvalues; NaN if one of them gives no spectrum.
    """
    (values, weights), (rest, other_weights) = measure_of(one), measure_of(other)
    if not len(values) or not len(rest):
        return float("nan")
    return float(stats.wasserstein_distance(values, rest, weights, other_weights))


def errors(one: DataFrame, exact: DataFrame) -> list[dict[str, Any]]:
    """How wrong an approximation is: each quantity that it gives, against the exact one.

    Args:
        one: Rows of one algorithm.
        exact: Rows of the exact spectrum of the same matrix.

    Returns:
        Rows ``<quantity>_error``: relative for the ends, the trace and the five outermost eigenvalues of either end
        (the worst of those given), plain for shares and energy.
    """
    rows: list[dict[str, Any]] = []
    for quantity in ("lambda_max", "lambda_min", "trace", "negative_energy"):
        found, true = (_value_of(table, quantity) for table in (one, exact))
        rows.append({"quantity": f"{quantity}_error", "value": _error(found, true, quantity != "negative_energy")})
    for quantity in ("top_eigenvalue", "bottom_eigenvalue"):
        ranks = range(1, NUM_LISTED + 1)
        pairs = [(_value_of(one, quantity, index=rank), _value_of(exact, quantity, index=rank)) for rank in ranks]
        defined = [error for error in (_error(found, true, True) for found, true in pairs) if not np.isnan(error)]
        rows.append({"quantity": f"{quantity}_error", "value": max(defined, default=float("nan"))})
    return [*(row for row in rows if not np.isnan(row["value"])), *share_errors(one, exact)]


def share_errors(one: DataFrame, exact: DataFrame, taus: Sequence[float] = TAUS) -> list[dict[str, Any]]:
    """The same for the shares beyond thresholds.

    Args:
        one: As in `errors`.
        exact: As in `errors`.
        taus: The thresholds that both have.

    Returns:
        Rows ``<quantity>_error``.
    """
    pairs = [("mass_below", tau) for tau in taus] + [("near_zero_mass", min(taus))]
    rows: list[dict[str, Any]] = []
    for quantity, tau in pairs:
        found, true = (_value_of(table, quantity, tau=tau) for table in (one, exact))
        rows.append({"quantity": f"{quantity}_error", "tau": tau, "value": _error(found, true, False)})
    return [row for row in rows if not np.isnan(row["value"])]


def _value_of(table: DataFrame, quantity: str, tau: float = float("nan"), index: int = 0) -> float:
    """A single value, NaN where the algorithm does not give it."""
    rows = table[(table["quantity"] == quantity) & (table["index"] == index)]
    rows = rows[rows["tau"].eq(tau) | (rows["tau"].isna() & np.isnan(tau))] if "tau" in rows else rows
    return float(rows["value"].iloc[0]) if len(rows) else float("nan")


def _error(found: float, true: float, relative: bool) -> float:
    return abs(found - true) / (abs(true) if relative else 1.0) if true or not relative else float("nan")


def methods_in(table: DataFrame) -> list[str]:
    """Methods that a comparison holds, in their order; none for the table of one method.

    Args:
        table: Of the Hessian probe.

    Returns:
        What stands before the colon of the quantities.
    """
    names = (str(name).partition(":") for name in table["quantity"].drop_duplicates())
    return list(dict.fromkeys(method for method, colon, _ in names if colon))


def rows_by(table: DataFrame, method: str) -> DataFrame:
    """Rows of one method of a comparison, as if it had run alone.

    Args:
        table: Of the Hessian probe.
        method: One of `methods_in`.

    Returns:
        The rows without the name of the method before the quantity.
    """
    rows = table[table["quantity"].str.startswith(f"{method}:")]
    return rows.assign(quantity=rows["quantity"].str.removeprefix(f"{method}:"))
