"""Part 4: error of negative mass and negative energy against products, exact ones known; peers' smoothed densities."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from curvature_models import Row, attempted, peer, small
from matplotlib.axes import Axes
from pandas import DataFrame

from ssat_probe.measures.exact import assembled
from ssat_probe.measures.lanczos import Krylov, lanczos, ritz
from ssat_probe.measures.quadrature import mass, negative_energy

STEPS, SEEDS, SHARE = (10, 20, 40, 80, 160, 320), (0, 1, 2), 0.05
NUM_IMAGES = 32
"SHARE of the eigenvalues lie below -τ, which is halfway between two of them."


def measure() -> Iterator[Row]:
    """Errors of each way after so many products, and the width of our brackets."""
    matrix = assembled(small(NUM_IMAGES).operator).matrix
    values = torch.linalg.eigvalsh(matrix).numpy()
    place = round(SHARE * len(values))
    threshold = float(values[place - 1] + values[place]) / 2
    true = {"mass below -τ": float((values < threshold).mean()), "mass below 0": float((values < 0).mean())}
    true["negative energy"] = float(-values[values < 0].sum() / np.abs(values).sum())
    for seed in SEEDS:
        run = lanczos(lambda vector: matrix @ vector, len(values), max(STEPS), seed=seed)
        for steps in STEPS:
            short = dataclasses.replace(run, alphas=run.alphas[:steps], betas=run.betas[:steps])
            ways = {"ours": _ours(short, threshold), "PyHessian's smoothing": _smoothed(short, threshold)}
            if peer("curvlinops") and (
                theirs := attempted(
                    "curvlinops", lambda steps=steps, seed=seed: _curvlinops(matrix, steps, threshold, seed)
                )
            ):
                ways["curvlinops"] = theirs
            for way, found in ways.items():
                for quantity, value in found.items():
                    error = value if quantity.startswith("width") else abs(value - true[quantity])
                    row = {"model": "small", "way": way, "quantity": quantity, "repeat": seed}
                    yield row | {"products": steps, "value": error}


def _ours(run: Krylov, threshold: float) -> dict[str, float]:
    below, negative, energy = mass([run], None, threshold), mass([run], None, 0.0), negative_energy([run])
    found = {"mass below -τ": below.value, "mass below 0": negative.value, "negative energy": energy.value}
    widths = {"mass below -τ": below.width, "mass below 0": negative.width, "negative energy": energy.width}
    return found | {f"width: {name}": width for name, width in widths.items()}


def _smoothed(run: Krylov, threshold: float) -> dict[str, float]:
    """Normal curves of variance 1e-5 times the range (1 at least) on the nodes, as PyHessian's plots have them."""
    found = ritz(run)
    low, high = found.values[0], found.values[-1]
    grid = np.linspace(low - 0.01, high + 0.01, 10_000)
    variance = 1e-5 * max(1.0, high - low)
    density = np.exp(-((grid[:, None] - found.values) ** 2) / (2 * variance)) @ found.weights
    return _read_off(grid, density, threshold)


def _curvlinops(matrix: torch.Tensor, steps: int, threshold: float, seed: int) -> dict[str, float]:
    """Its density with its default width, on the very matrix (its products are wrong through LayerNorm: part 2)."""
    from curvlinops.examples import TensorLinearOperator
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

    torch.manual_seed(seed)
    grid, density = lanczos_approximate_spectrum(TensorLinearOperator(matrix), steps, num_points=10_000)
    return _read_off(grid.numpy(), density.numpy(), threshold)


def _read_off(grid: np.ndarray, density: np.ndarray, threshold: float) -> dict[str, float]:
    density = density / density.sum()
    return {
        "mass below -τ": float(density[grid < threshold].sum()),
        "mass below 0": float(density[grid < 0].sum()),
        "negative energy": float((density * np.maximum(-grid, 0)).sum() / (density * np.abs(grid)).sum()),
    }


def ratios(table: DataFrame) -> Iterator[tuple[str, str, str, list[float], str]]:
    """Error of each way at 80 products, seed by seed; the width that certifies ours."""
    rows = table[table["products"] == 80]
    for (quantity, way), group in rows.groupby(["quantity", "way"], sort=False):
        yield "negative", f"{quantity}, 80 products, {way} (error or width)", "small", group["value"].tolist(), ""


def draw(ax: Axes, table: DataFrame) -> None:
    """Errors against products; the bracket of ours as its half width."""
    for way, rows in table[table["quantity"] == "mass below -τ"].groupby("way", sort=False):
        means = rows.groupby("products")["value"].mean()
        ax.plot(means.index, np.maximum(means, 1e-6), "o-", markersize=3, label=f"{way}: mass below -τ")
    for way, rows in table[table["quantity"] == "negative energy"].groupby("way", sort=False):
        means = rows.groupby("products")["value"].mean()
        ax.plot(means.index, np.maximum(means, 1e-6), "s--", markersize=3, label=f"{way}: negative energy")
    widths = table[table["quantity"] == "width: mass below -τ"].groupby("products")["value"].mean() / 2
    ax.plot(widths.index, widths, color="black", linewidth=0.8, label="half width of our bracket")
    ax.set(xscale="log", yscale="log", xlabel="products", ylabel="error", title="Negative part")
    ax.set_ylim(bottom=3e-6)  # room for the legend
