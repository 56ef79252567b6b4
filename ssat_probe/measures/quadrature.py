"""From the coefficients of a Lanczos run to masses with certified brackets, density, negative energy and trace.

A run from a random unit vector v sees the measure that puts the weight (v·x)² on each eigenvalue with eigenvector x.
Two errors stand between an estimate and the spectrum and are kept apart: the *bracket* says how little the steps of the
run know of this measure (certain, no probability involved); the *standard error* says how far the measure of a random
vector is from the spectrum with its equal weights 1/n (chance, in closed form).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64
from scipy import optimize, stats
from scipy.special import ndtr

from ssat_probe.measures.lanczos import Krylov, ritz

_GUARD = 1e-11  # of the scale: distance kept from thresholds because of float64 rounding in the run and the rules
_FAR = 1e3  # of the scale: how far out Radau's free node may move; further out rounding would exceed the guard
_ONE_FOLD = 10.83  # 99.9 % quantile of χ² with one degree of freedom, the law of n times a simple eigenvalue's weight


@dataclass(frozen=True)
class Estimate:
    """A value, the interval that certainly holds it for the probe vectors used, and the chance error of these."""

    value: float
    low: float
    high: float
    standard_error: float

    @property
    def width(self) -> float:
        """Of the bracket."""
        return self.high - self.low


def distribution(
    krylov: Krylov, thresholds: Float64[np.ndarray, " threshold"], guard: float = 0.0
) -> tuple[Float64[np.ndarray, " threshold"], Float64[np.ndarray, " threshold"]]:
    """Chebyshev-Markov-Stieltjes bracket of the probe's mass below each threshold.

    Gauss-Radau rules with a node prescribed at the threshold: what lies strictly below the node is a lower bound of
    the mass below it, what lies at it or below an upper one. Both are attained by some measure with the same
    coefficients, so nothing narrower is certain.

    Args:
        krylov: The run.
        thresholds: In units of the eigenvalues.
        guard: Uncertainty of the eigenvalues themselves (noise of the products); the bracket holds for thresholds up
            to this far on either side. Rounding is added to it.

    Returns:
        Lower and upper bounds in [0, 1]; mass exactly at a threshold lies between them. Rounding may shift them by up
        to 1e-6 where eigenvalues crowd around a threshold, by less than 1e-9 elsewhere.

    References:
        Golub & Meurant (2010), Matrices, Moments and Quadrature with Applications, 6.2;
        Chen, Trogdon & Ubaru (2021), https://arxiv.org/abs/2105.06595, for spectra.
    """
    guard = guard + max(_GUARD * krylov.scale, np.finfo(float).tiny)
    nodes, values, weights = _rules(krylov, np.asarray(thresholds) - guard, -guard)
    low = np.where(values < nodes[:, None] - guard / 2, weights, 0).sum(axis=1)
    nodes, values, weights = _rules(krylov, np.asarray(thresholds) + guard, guard)
    high = np.where(values < nodes[:, None] + guard / 2, weights, 0).sum(axis=1)
    return np.clip(low, 0, 1), np.clip(np.maximum(low, high), 0, 1)


def mass(krylovs: Sequence[Krylov], above: float | None, below: float | None, guard: float = 0.0) -> Estimate:
    """Share of eigenvalues in an interval.

    Args:
        krylovs: One run per probe vector.
        above: Lower end, None for no end.
        below: Upper end, None for no end.
        guard: As in `distribution`.

    Returns:
        Mean over probes. The value is the middle of the bracket, so it is off by half the width at most. Standard error
        of a mass p seen by a random vector: sqrt(2 p (1 - p) / (n + 2)), largest within the bracket.
    """
    lows, highs = [], []
    for krylov in krylovs:
        ends = np.array([end for end in (above, below) if end is not None])
        low, high = distribution(krylov, ends, guard)
        lows.append((low[-1] if below is not None else 1.0) - (high[0] if above is not None else 0.0))
        highs.append((high[-1] if below is not None else 1.0) - (low[0] if above is not None else 0.0))
    least, most = float(np.clip(np.mean(lows), 0, 1)), float(np.clip(np.mean(highs), 0, 1))
    worst = min(max(least, 0.5), most)  # where p (1 - p) is largest within the bracket
    error = np.sqrt(2 * worst * (1 - worst) / ((krylovs[0].size + 2) * len(krylovs)))
    return Estimate((least + most) / 2, least, most, float(error))


def spectrum_mass(estimate: Estimate, size: int, num_probes: int, level: float = 0.95) -> tuple[float, float]:
    """Interval for the share of *eigenvalues*, from the bracket of the share that random vectors saw.

    The weight of k out of n eigenvalues in a uniformly random unit vector is Beta(k/2, (n-k)/2), so that the exact
    interval of Clopper and Pearson's kind exists and is right for tiny shares too.

    Args:
        estimate: From `mass`.
        size: Number of eigenvalues.
        num_probes: Vectors whose masses were averaged.
        level: Coverage.

    Returns:
        Lower and upper end in [0, 1].
    """
    dof, tail = size * num_probes / 2, (1 - level) / 2

    def solve(seen: float, probability: float) -> float:
        return float(
            optimize.brentq(lambda p: stats.beta.cdf(seen, p * dof, (1 - p) * dof) - probability, 1e-15, 1 - 1e-15)
        )

    low = solve(estimate.low, 1 - tail) if 0 < estimate.low < 1 else float(estimate.low >= 1)
    high = solve(estimate.high, tail) if 0 < estimate.high < 1 else float(estimate.high > 0)
    return min(low, high), max(low, high)


@dataclass(frozen=True)
class Deflated:
    """A run with its converged simple eigenvalues taken out as exact atoms, one eigenvalue each."""

    atoms: Float64[np.ndarray, " atom"]
    atom_weights: Float64[np.ndarray, " atom"]
    "What the start vector gave them."
    nodes: Float64[np.ndarray, " node"]
    weights: Float64[np.ndarray, " node"]
    "Sum to one: shares of the remaining eigenvalues."
    size: int

    @property
    def num_rest(self) -> int:
        """Eigenvalues that are not atoms."""
        return self.size - len(self.atoms)

    def total(self, values: Float64[np.ndarray, " atom"], rest: Float64[np.ndarray, " node"]) -> float:
        """Sum over the spectrum of a function with these values at atoms and nodes."""
        return float(values.sum() + self.num_rest * (self.weights @ rest))

    def variance(self, rest: Float64[np.ndarray, " node"]) -> float:
        """Variance of that sum over random vectors: a quadratic form of a uniform unit vector, in closed form."""
        mean = self.weights @ rest
        spread = self.weights @ (rest - mean) ** 2
        return float(self.num_rest**2 * 2 / (self.num_rest + 2) * spread)


def is_atom(krylov: Krylov) -> Bool[np.ndarray, " step"]:
    """Which Ritz values are known to be one eigenvalue each.

    Their residual has converged, they are not zero, and their weight is one that a simple eigenvalue has (values that
    coincide are judged together; multiple ones keep their random weight, which counts them right on average).

    Args:
        krylov: The run.

    Returns:
        In the order of `ritz`, ascending; all of them if the run spans the whole space.
    """
    found = ritz(krylov)
    if len(found.values) == krylov.size:
        return np.ones_like(found.converged)
    reach = np.add.outer(found.residuals, found.residuals)
    is_same = (np.abs(np.subtract.outer(found.values, found.values)) <= reach) & found.converged
    is_simple = krylov.size * (is_same @ found.weights) < _ONE_FOLD * is_same.sum(axis=1)
    chosen = found.converged & is_simple & (np.abs(found.values) > 10 * krylov.rounding)
    if found.weights[~chosen].sum() < 1e-9:  # nothing is left to estimate the rest from
        return np.zeros_like(chosen)
    return np.asarray(chosen)


def deflated(krylov: Krylov) -> Deflated:
    """Atoms and remaining quadrature of a run.

    Args:
        krylov: The run.

    Returns:
        Atoms, and nodes and weights of the rest.

    References:
        Bhattacharjee et al. (2024), https://arxiv.org/abs/2410.21690, variance-reduced stochastic Lanczos quadrature.
    """
    found, atoms = ritz(krylov), is_atom(krylov)
    rest = found.weights[~atoms]
    return Deflated(
        found.values[atoms],
        found.weights[atoms],
        found.values[~atoms],
        rest / max(rest.sum(), 1e-300),
        krylov.size,
    )


def trace(krylovs: Sequence[Krylov]) -> Estimate:
    """Sum of all eigenvalues.

    Args:
        krylovs: One run per probe vector.

    Returns:
        Mean over probes; no bracket is needed (the mean of a probe's measure is exact after one step), so the ends
        are the value. The standard error is that of what remains after deflation.
    """
    parts = [deflated(krylov) for krylov in krylovs]
    value = float(np.mean([part.total(part.atoms, part.nodes) for part in parts]))
    error = float(np.sqrt(np.mean([part.variance(part.nodes) for part in parts]) / len(parts)))
    return Estimate(value, value, value, error)


def negative_energy(krylovs: Sequence[Krylov]) -> Estimate:
    """Σ|λ₋| / Σ|λ|: share of the curvature that is negative; 0 at a convex point, 1/2 at a balanced saddle.

    Args:
        krylovs: One run per probe vector.

    Returns:
        Ratio of means over probes, with its standard error (linearised). The bracket comes from the extreme measures
        with the coefficients of the run, so it is certain and nothing narrower is. NaN if all eigenvalues are zero.

    References:
        Chebyshev-Markov bounds of (t - x)₊: least where a rule has a node at t (Jensen's case), greatest where it is
        stationary; Karlin & Studden (1966), Tchebycheff Systems, for the theory. Ours, checked by a property test.
    """
    parts = [deflated(krylov) for krylov in krylovs]
    negative = np.mean([part.total(np.maximum(-part.atoms, 0), np.maximum(-part.nodes, 0)) for part in parts])
    absolute = np.mean([part.total(np.abs(part.atoms), np.abs(part.nodes)) for part in parts])
    if not absolute > 0:
        return Estimate(np.nan, np.nan, np.nan, np.nan)
    ratio = float(negative / absolute)
    deviations = [part.variance(np.maximum(-part.nodes, 0) - ratio * np.abs(part.nodes)) for part in parts]
    error = float(np.sqrt(np.mean(deviations) / len(parts)) / absolute)
    bounds = np.mean([_negative_total(*pair) for pair in zip(krylovs, parts, strict=True)], axis=0)
    spread = absolute - 2 * negative  # the trace: Σ|λ| = Σλ + 2 Σ|λ₋|
    low, high = sorted(float(bound / (spread + 2 * bound)) for bound in bounds)
    return Estimate(ratio, min(low, ratio), max(high, ratio), error)


def counts(
    krylovs: Sequence[Krylov], grid: Float64[np.ndarray, " point"], bulk: float, narrowest: float = 0.1
) -> Float64[np.ndarray, " point"]:
    """Smoothed number of eigenvalues per unit of eigenvalue; atoms count one each.

    Smoothed on the axis asinh(λ / bulk), linear near zero and logarithmic outside, where spectra of networks are read.

    Args:
        krylovs: One run per probe vector.
        grid: Eigenvalues at which to evaluate.
        bulk: Where the axis turns from linear to logarithmic.
        narrowest: Standard deviation of the smoothing on that axis: this share of an eigenvalue far out. Tuned, no
            source.

    Returns:
        Mean over probes; integrates to the number of parameters.
    """
    total = np.zeros_like(grid)
    for krylov in krylovs:
        part = deflated(krylov)
        order = part.nodes.argsort()
        nodes, weights = np.arcsinh(part.nodes[order] / bulk), part.num_rest * part.weights[order]
        total += density(nodes, weights, np.arcsinh(grid / bulk), narrowest)
        distances = (np.arcsinh(grid / bulk)[:, None] - np.arcsinh(part.atoms / bulk)) / narrowest
        total += np.exp(-(distances**2) / 2).sum(axis=1) / (narrowest * np.sqrt(2 * np.pi))
    return total / len(krylovs) / np.hypot(grid, bulk)


def density(
    nodes: Float64[np.ndarray, " node"],
    weights: Float64[np.ndarray, " node"],
    grid: Float64[np.ndarray, " point"],
    narrowest: float = 0.0,
) -> Float64[np.ndarray, " point"]:
    """Smoothed density of a quadrature: the mass of each node spread evenly up to halfway to its neighbours.

    The distance between nodes is the resolution that the steps of the run afford, locally: many steps, narrow curves.
    Mass does not leak past the neighbours, so a crowded bulk with few nodes leaves the ends of the spectrum alone.

    Args:
        nodes: Ascending.
        weights: Their mass.
        grid: Where to evaluate.
        narrowest: Standard deviation of a normal smoothing on top.

    Returns:
        Mass per unit of the grid.
    """
    gaps = np.diff(nodes) if len(nodes) > 1 else np.zeros(1)
    least = max(1e-3 * narrowest, np.finfo(float).tiny)
    left = nodes - np.maximum(np.insert(gaps, 0, gaps[0])[: len(nodes)] / 2, least)
    right = nodes + np.maximum(np.append(gaps, gaps[-1])[: len(nodes)] / 2, least)
    if narrowest > 0:
        inside = ndtr((grid[:, None] - left) / narrowest) - ndtr((grid[:, None] - right) / narrowest)
    else:
        inside = ((grid[:, None] >= left) & (grid[:, None] < right)).astype(float)
    return inside @ (weights / (right - left))


def _negative_total(krylov: Krylov, part: Deflated) -> tuple[float, float]:
    """Least and greatest Σ|λ₋| that agree with the coefficients, atoms counted as one eigenvalue each."""
    low, high = _negative_mean(krylov)
    atoms = np.maximum(-part.atoms, 0)
    factor = part.num_rest / max(1 - part.atom_weights.sum(), 1e-300)
    least, most = (float(atoms.sum() + factor * max(mean - part.atom_weights @ atoms, 0)) for mean in (low, high))
    return least, most


def _negative_mean(krylov: Krylov) -> tuple[float, float]:
    """Bracket of the mean of |λ₋| in the probe's measure."""
    # All measures with the coefficients of the run and one node more form a circle: the prescribed node runs through
    # the gap between Ritz values that holds zero. The mean is least with the node at zero, and has one maximum.
    scale = max(krylov.scale, np.finfo(float).tiny)
    inner = np.linalg.eigvalsh(krylov.matrix[: krylov.num_first, : krylov.num_first])
    left, right = inner[inner < 0], inner[inner >= 0]
    if len(left) and len(right):
        a, b = left[-1], right[0]
        shares = np.logspace(-10, np.log10(0.5), 81)
        near = np.concatenate([a * shares, b * shares])  # on either side of zero
        candidates = np.sort(np.concatenate([a + (b - a) * shares, b - (b - a) * shares, near]))
    else:
        away = scale * np.logspace(-6, 2, 101)
        candidates = np.concatenate([inner[0] - away[::-1], inner[-1] + away])

    def means(nodes: np.ndarray) -> np.ndarray:
        _, values, weights = _rules(krylov, nodes, _GUARD * scale)
        return (np.maximum(-values, 0) * weights).sum(axis=1)

    least = float(means(np.zeros(1))[0])
    found = means(candidates)
    best = int(found.argmax())
    ends = candidates[max(best - 1, 0)], candidates[min(best + 1, len(candidates) - 1)]
    return least, max(least, float(found.max()), float(means(np.linspace(*ends, 101)).max()))


def _rules(krylov: Krylov, nodes: np.ndarray, away: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Radau rules with a node prescribed at each of the places: places, nodes and weights, one rule per row."""
    # A prescribed node next to a Ritz value sends the free node to infinity; it moves on, by growing multiples of
    # `away`. After a break the measure is known completely, and its own nodes and weights are every rule.
    num = krylov.num_first
    inner = krylov.matrix[:num, :num]
    values, vectors = np.linalg.eigh(inner)
    if krylov.breaks:
        shape = (len(nodes), num)
        return nodes, np.broadcast_to(values, shape), np.broadcast_to(vectors[0] ** 2, shape)
    coupling = krylov.betas[num - 1]
    squares = (coupling * vectors[-1]) ** 2
    nodes, step = nodes.copy(), away
    for _ in range(64):
        gaps = values - nodes[:, None]
        shift = (squares / np.where(gaps == 0, np.finfo(float).tiny, gaps)).sum(axis=1)
        is_near = ~(np.abs(shift) <= _FAR * krylov.scale)
        if not is_near.any():
            break
        nodes[is_near] += step
        step *= 2
    rules = np.zeros((len(nodes), num + 1, num + 1))
    rules[:, :num, :num] = inner
    rules[:, num - 1, num] = rules[:, num, num - 1] = coupling
    rules[:, num, num] = nodes + shift
    values, vectors = np.linalg.eigh(rules)
    return nodes, values, vectors[:, 0, :] ** 2
