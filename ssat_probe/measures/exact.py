"""Whole spectrum of a Hessian: dense by batched exact products in float64, then LAPACK; costs known before."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float64

from ssat_probe.measures.hessian import CHUNK, HessianOperator

GAIN = 0.95  # a larger chunk must take at most this share of the time to be taken; keeps the memory small; ours
_TRIAL = 384  # rows of the random matrix whose eigenvalues are timed; large enough for LAPACK's blocked code
_COPIES = 2  # matrices of full size that live at once: the Hessian and LAPACK's workspace
CHUNKS = (1, 4, 16, CHUNK)
FLOAT64 = 2.0**-52


@dataclass(frozen=True)
class Cost:
    """What the whole spectrum will take."""

    num_parameters: int
    product_seconds: float
    solver_seconds: float
    num_bytes: int

    @property
    def seconds(self) -> float:
        """Products and eigenvalues together."""
        return self.product_seconds + self.solver_seconds


@dataclass(frozen=True)
class Spectrum:
    """All eigenvalues, and what was known of the cost before."""

    eigenvalues: Float64[np.ndarray, " eigenvalue"]
    "Ascending, of the symmetric part."
    asymmetry: float
    "Largest, relative to the largest entry."
    cost: Cost


def cost(operator: HessianOperator) -> tuple[Cost, int]:
    """Time and memory of `exact_spectrum`, from products and a small eigenvalue problem that are timed.

    Args:
        operator: As it will be used.

    Returns:
        Seconds for this machine in its present load, bytes for the matrices (the graph of a batch comes on top); and
        the number of vectors per product that is fastest.
    """
    size = operator.size
    chunk, each = fastest_chunk(operator)
    trial = np.random.default_rng(0).standard_normal((min(_TRIAL, size),) * 2)
    started = time.perf_counter()
    np.linalg.eigvalsh(trial + trial.T)
    solver = (time.perf_counter() - started) * (size / len(trial)) ** 3
    return Cost(size, each * size, solver, 8 * _COPIES * size**2), chunk


def exact_spectrum(
    operator: HessianOperator,
    *,
    max_bytes: int = 2 * 2**30,
    max_seconds: float = float("inf"),
    on_step: Callable[[int], None] | None = None,
) -> Spectrum:
    """All eigenvalues, and how far the computed matrix was from symmetric.

    Args:
        operator: Of a model in float64.
        max_bytes: Refuse to take more memory for matrices.
        max_seconds: Refuse to take longer, by the estimate of `cost`.
        on_step: Called with the number of products so far.

    Returns:
        The spectrum.

    Raises:
        ValueError: If the model is not in float64, or the spectrum would not fit; says what would.
    """
    if operator.precision > FLOAT64:
        raise ValueError(
            f"An exact spectrum needs a model in float64, got a machine epsilon of {operator.precision:.2g}. "
            "Convert it with .double()."
        )
    refuse(operator, max_bytes)
    expected, chunk = cost(operator)
    if expected.seconds > max_seconds:
        raise ValueError(
            f"An exact spectrum must take at most {max_seconds:.3g} s, got an estimate of {expected.seconds:.3g} s for "
            f"{operator.size} parameters. {_what_fits(operator, _fitting(expected, max_seconds))}"
        )
    size = operator.size
    matrix = np.zeros((size, size))
    with operator:
        for start in range(0, size, chunk):
            stop = min(start + chunk, size)
            units = torch.zeros(stop - start, size, dtype=torch.float64, device=operator.device)
            units[torch.arange(stop - start), torch.arange(start, stop)] = 1
            matrix[start:stop] = operator.products(units).cpu().numpy()
            if on_step is not None:
                on_step(stop)
    asymmetry = _symmetrise(matrix)
    values = scipy.linalg.eigvalsh(matrix, overwrite_a=True, check_finite=False)
    return Spectrum(values, asymmetry, expected)


def fastest_chunk(operator: HessianOperator) -> tuple[int, float]:
    """Vectors per batched product that cost least each, from one timed product of each size.

    Args:
        operator: As it will be used.

    Returns:
        One of ``CHUNKS``, and seconds per vector: large for small models, 1 where the batch fills the caches by itself.
            Larger ones are tried as long as they gain, so that a large model is not asked for more memory.
    """
    best, least = 1, float("inf")
    with operator:
        operator.product(torch.ones(operator.size, dtype=torch.float64, device=operator.device))  # makes the graph
        for chunk in CHUNKS:
            units = torch.eye(min(chunk, operator.size), operator.size, dtype=torch.float64, device=operator.device)
            started = time.perf_counter()
            operator.products(units)
            each = (time.perf_counter() - started) / len(units)
            if each > GAIN * least:
                break
            best, least = chunk, each
    return best, least


def refuse(operator: HessianOperator, max_bytes: int) -> None:
    """Stop before anything is computed if the matrices would not fit.

    Args:
        operator: Whose size counts.
        max_bytes: Largest memory for matrices.

    Raises:
        ValueError: If they would take more.
    """
    needed = 8 * _COPIES * operator.size**2
    if needed > max_bytes:
        most = int((max_bytes / 8 / _COPIES) ** 0.5)
        raise ValueError(
            f"An exact spectrum must fit into {max_bytes / 2**30:.3g} GiB, got {operator.size} parameters that need "
            f"{needed / 2**30:.3g} GiB. {_what_fits(operator, most)}"
        )


def _symmetrise(matrix: Float64[np.ndarray, "row column"], rows: int = 512) -> float:
    """In place, a band of rows at a time; relative asymmetry found."""
    largest, off = 0.0, 0.0
    for start in range(0, len(matrix), rows):
        band, mirrored = matrix[start : start + rows, start:], matrix[start:, start : start + rows].T
        largest = max(largest, float(np.abs(band).max()), float(np.abs(mirrored).max()))
        off = max(off, float(np.abs(band - mirrored).max()))
        mean = (band + mirrored) / 2
        matrix[start : start + rows, start:] = mean
        matrix[start:, start : start + rows] = mean.T
    return off / largest if largest > 0 else 0.0


def _fitting(expected: Cost, max_seconds: float) -> int:
    """Most parameters whose spectrum takes no longer."""
    sizes = np.arange(1, expected.num_parameters + 1)
    share = sizes / expected.num_parameters
    seconds = expected.product_seconds * share + expected.solver_seconds * share**3
    return int((seconds <= max_seconds).sum())


def _what_fits(operator: HessianOperator, most: int) -> str:
    """The largest parts of the model with at most so many parameters."""
    sums: dict[str, int] = {}
    for name, parameter in operator.parameters.items():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            prefix = ".".join(parts[:depth]) + ".*"
            sums[prefix] = sums.get(prefix, 0) + parameter.numel()
    fits = sorted((num, prefix) for prefix, num in sums.items() if num <= most)[-3:]
    named = ", ".join(f"'{prefix}' ({num})" for num, prefix in reversed(fits))
    return f"At most {most} parameters fit: select fewer" + (f", such as {named}." if named else ".")
