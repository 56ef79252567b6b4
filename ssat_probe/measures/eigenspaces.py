"""Spaces of outermost eigenvectors from Lanczos runs, and how much two of them have in common."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from ssat_probe.measures.basis import combined
from ssat_probe.measures.lanczos import Krylov, ritz


@dataclass(frozen=True)
class Eigenspace:
    """Span of the eigenvectors of the largest eigenvalues."""

    values: Float64[np.ndarray, " rank"]
    "Descending."
    vectors: Float64[Tensor, "rank parameter"]
    "Orthonormal, in the order of the values."
    error: float
    "Bound of the sine of the largest angle to the true space."


def top_space(krylov: Krylov, num: int) -> Eigenspace:
    """Space of the largest eigenvalues of a run.

    Args:
        krylov: A run with its basis.
        num: Dimension; fewer if the run has no more steps.

    Returns:
        The space; its error is the length of the residuals over the gap to the next Ritz value, infinite without a
            gap, zero when the run spans everything.

    Raises:
        ValueError: If the run did not keep its basis.

    References:
        Davis & Kahan (1970), SIAM J. Numer. Anal. 7, sin Θ theorem, with Ritz values in place of the eigenvalues
        outside the space.
    """
    if krylov.basis is None:
        raise ValueError("Eigenvectors need the basis of the run, got none. Run Lanczos with its basis kept.")
    found = ritz(krylov)
    num = min(num, len(found.values))
    _, coefficients = np.linalg.eigh(krylov.matrix)
    vectors = combined(coefficients[:, ::-1][:, :num].T, krylov.basis)
    residual = float(np.linalg.norm(found.residuals[-num:]))
    gap = float(found.values[-num] - found.values[-num - 1]) if num < len(found.values) else np.inf
    error = residual / gap if gap > 0 else np.inf
    return Eigenspace(found.values[::-1][:num].copy(), vectors, error)


def cosines(
    one: Float64[Tensor, "rank parameter"], other: Float64[Tensor, "rank2 parameter"]
) -> Float64[np.ndarray, " angle"]:
    """Cosines of the principal angles between two spaces.

    Args:
        one: Orthonormal rows.
        other: Orthonormal rows.

    Returns:
        Descending, in [0, 1]; as many as the smaller space has dimensions.

    References:
        Björck & Golub (1973), Math. Comp. 27, 579-594.
    """
    return np.clip(torch.linalg.svdvals(one @ other.T).cpu().numpy(), 0, 1)


def overlap(one: Float64[Tensor, "rank parameter"], other: Float64[Tensor, "rank2 parameter"]) -> float:
    """Mean squared cosine of the principal angles.

    Args:
        one: Orthonormal rows.
        other: Orthonormal rows.

    Returns:
        1 for spaces of which one holds the other, 0 for orthogonal ones; for a random space of dimension k among p
        parameters k/p on average.
    """
    return float(np.mean(cosines(one, other) ** 2))
