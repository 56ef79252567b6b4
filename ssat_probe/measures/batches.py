"""Both ends of the Hessian of each mini-batch, the spectrum of Park & Kim; signed power iteration to compare with."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.lanczos import lanczos, ritz
from ssat_probe.measures.processes import gathered, woven

POWER_STEPS, POWER_TOLERANCE = 100, 1e-3  # defaults of PyHessian 0.1, `hessian.eigenvalues`


@dataclass(frozen=True)
class BatchEnds:
    """Largest and smallest eigenvalue of the Hessian of each mini-batch."""

    largest: Float64[np.ndarray, " batch"]
    smallest: Float64[np.ndarray, " batch"]
    residuals: Float64[np.ndarray, "batch end"]
    "Of largest and smallest."
    converged: Bool[np.ndarray, "batch end"]
    sizes: tuple[int, ...]
    num_products: int

    @property
    def dominant(self) -> Float64[np.ndarray, " batch"]:
        """Of the two ends the one that is larger in absolute value, with its sign: what power iteration seeks."""
        return np.where(self.largest >= -self.smallest, self.largest, self.smallest)


def batch_ends(
    parameters: Mapping[str, Tensor],
    loss: Callable[[Any], Tensor],
    batches: Iterable[tuple[Any, int]],
    *,
    steps: int,
    seed: int = 0,
    coordinates: Int[Tensor, " coordinate"] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> BatchEnds:
    """Both ends per mini-batch by one Lanczos run each, on the kept graph of the batch.

    Args:
        parameters: As for `HessianOperator`.
        loss: Mean loss of a batch.
        batches: As for `HessianOperator`; each is a Hessian of its own.
        steps: Lanczos steps per batch.
        seed: Of the start vector, the same for every batch.
        coordinates: As for `HessianOperator`.
        on_step: Called with the number of products so far.

    Returns:
        One entry per batch, in their order; where processes share the batches, those of all.
    """
    found, sizes, spent = [], [], 0
    for batch, num in batches:
        operator = HessianOperator(parameters, loss, [(batch, num)], coordinates=coordinates)
        options: dict[str, Any] = {"precision": operator.precision, "device": operator.device, "seed": seed}
        with operator:
            found.append(ritz(lanczos(operator.product, operator.size, steps, **options)))
        sizes.append(num)
        spent += operator.num_products
        if on_step is not None:
            on_step(spent)
    columns = [[(values[-1], values[0]) for values in (one.values, one.residuals, one.converged)] for one in found]
    ends, residuals, converged = (np.array(column) for column in zip(*woven(columns), strict=True))
    return BatchEnds(ends[:, 0], ends[:, 1], residuals, converged, tuple(woven(sizes)), sum(gathered([spent])))


def negative_proportion(eigenvalues: Float64[np.ndarray, " batch"]) -> float:
    """NEP: share of negative values among the dominant eigenvalues of mini-batches.

    Args:
        eigenvalues: One or more per batch, with their signs.

    Returns:
        In [0, 1].

    References:
        Park & Kim (2022), https://arxiv.org/abs/2202.06709, Sec. 2 and appendix on Hessian max eigenvalue spectra.
    """
    return float((eigenvalues < 0).mean())


def average_positive(eigenvalues: Float64[np.ndarray, " batch"]) -> float:
    """APE: mean of the positive ones among the dominant eigenvalues of mini-batches.

    Args:
        eigenvalues: One or more per batch, with their signs.

    Returns:
        In units of the eigenvalues; NaN if none is positive.

    References:
        As for `negative_proportion`.
    """
    positive = eigenvalues[eigenvalues > 0]
    return float(positive.mean()) if len(positive) else float("nan")


def signed_power(
    product: Callable[[Tensor], Tensor],
    size: int,
    *,
    top: int = 1,
    seed: int = 0,
    max_steps: int = POWER_STEPS,
    tolerance: float = POWER_TOLERANCE,
) -> tuple[Float64[np.ndarray, " rank"], int]:
    """Eigenvalues of largest absolute value by deflated power iteration, stopped as PyHessian stops it.

    For parity with old figures only: the stop looks at successive differences, so that a value may be far from any
    eigenvalue, and near ties of ±λ give something between them.

    Args:
        product: Symmetric operator times vector.
        size: Dimension.
        top: How many.
        seed: Of the start vectors.
        max_steps: Products per eigenvalue at most.
        tolerance: Relative difference of successive Rayleigh quotients at which one is taken.

    Returns:
        Signed values in the order found, and products in all.

    References:
        The algorithm of `hessian.eigenvalues` in PyHessian 0.1 (Yao et al., 2020), written anew.
    """
    generator = torch.Generator().manual_seed(seed)
    values: list[float] = []
    vectors: list[Tensor] = []
    spent = 0
    for _ in range(top):
        vector = torch.randn(size, generator=generator, dtype=torch.float64)
        vector = vector / vector.norm()
        value = float("nan")
        for _ in range(max_steps):
            for other in vectors:
                vector = vector - (vector @ other) * other
            vector = vector / (vector.norm() + 1e-6)
            image = product(vector)
            spent += 1
            last, value = value, float(vector @ image)
            vector = image / (image.norm() + 1e-6)
            if abs(last - value) / (abs(last) + 1e-6) < tolerance:
                value = last  # what PyHessian returns is the value before the last
                break
        values.append(value)
        vectors.append(vector)
    return np.array(values), spent
