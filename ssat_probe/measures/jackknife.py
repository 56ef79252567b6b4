"""Error from the choice of images: delete-one-batch jackknife of both ends, trace and negative energy.

A spectrum is that of the mean loss over some images; other images of the same kind give another one. Leaving out one
batch after the other and looking at the spectrum each time tells by how much. The runs are not repeated: the Hessian of
each batch is applied to a few Ritz vectors and to what is left of the start vector, and the spectrum without the batch
follows to first order (the ends: by Rayleigh-Ritz within these vectors).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from ssat_probe.measures.basis import combined
from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.lanczos import Krylov
from ssat_probe.measures.processes import gathered
from ssat_probe.measures.quadrature import is_atom

NUM_VECTORS = 5  # Ritz vectors at either end that may mix where a batch is left out; ours, no source
NUM_PRODUCTS = 2 * NUM_VECTORS + 1  # of each batch: these at both ends, and the start's remainder
NUM_HELD = 2 * NUM_VECTORS + 5  # vectors alive at once: these, the start's remainder, its three functions, an image
QUANTITIES = ("lambda_max", "lambda_min", "trace", "negative_energy")
_EMPTY = 1e-9  # length of the start vector's remainder below which nothing is left


@dataclass(frozen=True)
class DataErrors:
    """Jackknife standard errors by the names of ``QUANTITIES``, and what they took."""

    errors: dict[str, float]
    "In units of the quantity; NaN with fewer than two batches."
    num_batches: int
    num_products: int
    "Passes over all images."


def standard_error(
    estimate: float, without: Float64[np.ndarray, " batch"], sizes: Float64[np.ndarray, " batch"]
) -> float:
    """Delete-one-batch jackknife for batches of unequal size.

    With n images in g batches of m_j, h_j = n / m_j and pseudo-values τ_j = h_j θ - (h_j - 1) θ_(-j), the variance is
    the mean over batches of (τ_j - θ_J)² / (h_j - 1), where θ_J = g θ - Σ (1 - m_j / n) θ_(-j).

    Args:
        estimate: θ, with all batches.
        without: θ_(-j), without each of them.
        sizes: m_j.

    Returns:
        In units of the estimate; NaN with fewer than two batches.

    References:
        Busing, Meijer & van der Leeden (1999), Statistics and Computing 9, 3-8, delete-m_j jackknife; the usual one
        (Quenouille, Tukey) where sizes are equal.
    """
    if len(sizes) < 2:
        return float("nan")
    shares = sizes / sizes.sum()
    ratios = 1 / shares
    centre = len(sizes) * estimate - ((1 - shares) * without).sum()
    pseudo = ratios * estimate - (ratios - 1) * without
    return float(np.sqrt(np.mean((pseudo - centre) ** 2 / (ratios - 1))))


def data_errors(
    operator: HessianOperator,
    krylov: Krylov,
    num_vectors: int = NUM_VECTORS,
    on_images: Callable[[int], None] | None = None,
) -> DataErrors:
    """Jackknife over the operator's batches.

    Takes twice ``num_vectors`` products and one more. The error of the trace and of the energy contains what one start
    vector does not see of a batch, so it is too large rather than too small.

    Args:
        operator: Whose batches are left out, one at a time.
        krylov: A run on it, with its basis.
        num_vectors: Ritz vectors at either end.
        on_images: Called after each batch with the number of images so far, of this process; for progress.

    Returns:
        Standard errors.

    Raises:
        ValueError: If the run did not keep its basis.
    """
    if krylov.basis is None:
        raise ValueError("A jackknife needs the basis of the run, got none. Run Lanczos with its basis kept.")
    vectors, signs = _vectors(krylov, num_vectors)
    found = []
    for batch, num in operator.batches:
        one = HessianOperator(
            operator.parameters,
            operator.loss,
            [(batch, num)],
            reduction=operator.reduction,
            coordinates=operator.coordinates,
        )
        with one:  # products one by one: all of them at once would be many vectors
            gram = torch.stack([vectors[:-1] @ one.product(vector) for vector in vectors[:-1]])
            sums = signs @ one.product(vectors[-1])
        found.append((gram.cpu().numpy(), sums.cpu().numpy(), float(num)))
        if on_images is not None:
            on_images(int(sum(size for _, _, size in found)))
    found = gathered(found) if operator.is_sharded else found
    if len(found) < 2:
        return DataErrors(dict.fromkeys(QUANTITIES, float("nan")), len(found), len(vectors))
    grams, rests, sizes = (np.array(part) for part in zip(*found, strict=True))
    return DataErrors(_errors(grams, rests, sizes, *_weights(krylov, num_vectors)), len(found), len(vectors))


def _places(krylov: Krylov, num_vectors: int) -> list[int]:
    """Ritz values at either end, ascending."""
    num = len(krylov.alphas)
    return sorted({*range(min(num_vectors, num)), *range(max(num - num_vectors, 0), num)})


def _split(krylov: Krylov, num_vectors: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Ritz values, their coefficients, those of what is left of the start vector, and which are taken out of it."""
    values, coefficients = np.linalg.eigh(krylov.matrix)
    # one eigenvector each: a Ritz vector that stands for a whole null space is most of the start vector
    single = is_atom(krylov)
    taken = [place for place in _places(krylov, num_vectors) if single[place]]
    rest = coefficients[0].copy()  # the start vector in terms of Ritz vectors
    rest[taken] = 0
    length = float(np.linalg.norm(rest))
    return values, coefficients, rest / length if length > _EMPTY else 0 * rest, taken


def _vectors(krylov: Krylov, num_vectors: int) -> tuple[Tensor, Tensor]:
    """Ritz vectors at the ends and the remainder; the remainder under 1, step below zero, and sign of the Hessian."""
    assert krylov.basis is not None
    values, coefficients, rest, _ = _split(krylov, num_vectors)
    functions = np.array([np.ones_like(values), -1.0 * (values < 0), np.sign(values)])
    wanted = np.concatenate(
        [coefficients.T[_places(krylov, num_vectors)], (coefficients @ rest)[None], (functions * rest) @ coefficients.T]
    )
    found = combined(wanted, krylov.basis)
    return found[:-3], found[-3:]


def _weights(krylov: Krylov, num_vectors: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Per Ritz vector at the ends: its share in trace, Σ|λ₋| and Σ|λ|; whether it is taken out; how many are left."""
    values, _, _, taken = _split(krylov, num_vectors)
    places = _places(krylov, num_vectors)
    is_taken = np.isin(places, taken)
    kept = values[places]
    functions = np.array([np.ones_like(kept), -1.0 * (kept < 0), np.sign(kept)])
    return functions * is_taken, is_taken, krylov.size - int(is_taken.sum())


def _errors(
    grams: Float64[np.ndarray, "batch vector vector2"],
    sums: Float64[np.ndarray, "batch 3"],
    sizes: Float64[np.ndarray, " batch"],
    functions: Float64[np.ndarray, "3 vector"],
    is_taken: np.ndarray,
    num_rest: int,
) -> dict[str, float]:
    """Standard errors from what each batch gave."""
    totals = np.einsum("bvv,fv->bf", grams, functions) + num_rest * sums  # trace, Σ|λ₋|, Σ|λ| of each batch

    def mean(values: np.ndarray, some: Sequence[bool] | np.ndarray) -> np.ndarray:
        return np.tensordot(sizes[some], values[some], axes=1) / sizes[some].sum()

    def quantities(some: np.ndarray) -> list[float]:
        gram, (trace, negative, absolute) = mean(grams, some), mean(totals, some)
        ends = np.linalg.eigvalsh((gram + gram.T) / 2)
        return [ends[-1], ends[0], trace, negative / absolute if absolute > 0 else np.nan]

    everything = np.ones(len(sizes), dtype=bool)
    all_in = quantities(everything)
    without = np.array([quantities(np.arange(len(sizes)) != place) for place in range(len(sizes))])
    return {name: standard_error(all_in[place], without[:, place], sizes) for place, name in enumerate(QUANTITIES)}
