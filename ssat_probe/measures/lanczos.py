"""Lanczos from a random start: both ends of a symmetric operator's spectrum with residuals, and its coefficients."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

CONVERGED = 1e-3  # residual over |Ritz value| at which an eigenvalue counts as found; CURVATURE notes 8.2, tuned
_BREAKDOWN = 1e-13  # of the operator's scale: what float64 recurrences leave of a residual that should be zero
_BREAKDOWN_ROUNDINGS = 20  # the same for products of lower precision, in units of their machine epsilon


@dataclass(frozen=True)
class Krylov:
    """What a Lanczos run leaves: the tridiagonal matrix, its last residual, and perhaps the basis.

    ``betas[j]`` is the length of the residual after step j; ``betas[-1]`` couples to what was not explored. At the
    steps in ``breaks`` the space was invariant (the residual was nothing but rounding); the matrix is cut there.
    """

    alphas: Float64[np.ndarray, " step"]
    betas: Float64[np.ndarray, " step"]
    breaks: tuple[int, ...]
    size: int
    precision: float
    basis: Float64[Tensor, "step parameter"] | None = None

    @property
    def matrix(self) -> Float64[np.ndarray, "step step"]:
        """Tridiagonal matrix, cut at the breaks."""
        coupling = self.betas[:-1].copy()
        coupling[[step for step in self.breaks if step < len(coupling)]] = 0
        return np.diag(self.alphas) + np.diag(coupling, 1) + np.diag(coupling, -1)

    @property
    def num_first(self) -> int:
        """Steps up to the first break: those that the start vector spans. All of them without a break."""
        return self.breaks[0] + 1 if self.breaks else len(self.alphas)

    @property
    def scale(self) -> float:
        """Size of the operator as far as it was seen: largest eigenvalue in absolute value, or last residual."""
        return float(max(np.abs(np.linalg.eigvalsh(self.matrix)).max(), self.betas[-1]))

    @property
    def rounding(self) -> float:
        """Below this nothing can be told from zero: breakdown threshold in units of the eigenvalues."""
        return _relative_breakdown(self.precision) * self.scale


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenvalues in ascending order; some eigenvalue lies within ``residuals`` of each."""

    values: Float64[np.ndarray, " step"]
    residuals: Float64[np.ndarray, " step"]
    weights: Float64[np.ndarray, " step"]
    "Squared component of the start vector: weights of Gauss quadrature; zero for what came after a break."
    converged: Bool[np.ndarray, " step"]


def lanczos(
    product: Callable[[Float64[Tensor, " parameter"]], Float64[Tensor, " parameter"]],
    size: int,
    steps: int,
    *,
    seed: int = 0,
    start: Float64[Tensor, " parameter"] | None = None,
    precision: float = 2.0**-52,
    device: torch.device | str = "cpu",
    with_basis: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> Krylov:
    """Lanczos run with float64 recurrences and full reorthogonalisation in two passes ("twice is enough").

    Where the space becomes invariant (the residual is rounding), what has been found is exact, and the run goes on
    with a new random vector orthogonal to everything so far: this is how further copies of a multiple eigenvalue and
    what the start vector misses are found. It ends after ``steps`` products or when the whole space is spanned.

    Args:
        product: Symmetric operator times vector.
        size: Dimension of the space.
        steps: Number of products at most; ``size`` at most.
        seed: Of the Gaussian start vector, and of those after a break.
        start: Start vector instead of the random one; any length but zero.
        precision: Machine epsilon of the products; decides when a residual is rounding.
        device: Where vectors live.
        with_basis: Keep the basis, ``steps`` vectors of ``size`` float64 numbers, in the result.
        on_step: Called after each product with the number of products so far; for progress.

    Returns:
        Coefficients for `ritz` and for quadrature.

    Raises:
        ValueError: If ``steps`` is less than one, the start vector is zero, or a product is not finite.

    References:
        Golub & Van Loan, Matrix Computations (4th ed.), 10.1 and 10.3; Parlett, The Symmetric Eigenvalue Problem,
        6.9 for two passes, 13 for residuals.
    """
    if steps < 1:
        raise ValueError(f"A Lanczos run needs at least one step, got {steps}. Ask for 80, or at least for 20.")
    steps = min(steps, size)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.zeros(steps, size, dtype=torch.float64, device=device)
    alphas, betas = np.zeros(steps), np.zeros(steps)
    breaks: list[int] = []
    vector = _gaussian(size, generator, device) if start is None else start.to(device, torch.float64)
    if not 0 < float(vector.norm()) < float("inf"):
        raise ValueError(
            f"The start vector must have a length, got {float(vector.norm())}. Leave it out for a random one."
        )
    scale = 0.0
    for step in range(steps):
        basis[step] = vector / vector.norm()
        image = product(basis[step])
        if not bool(torch.isfinite(image).all()):
            raise ValueError(f"A product must be finite, got {image.sum().item()} at step {step}. Check the weights.")
        alphas[step] = float(basis[step] @ image)
        vector = _orthogonal(image, basis[: step + 1])
        betas[step] = float(vector.norm())
        scale = max(scale, float(image.norm()))
        if step + 1 == size or betas[step] <= _relative_breakdown(precision) * scale:
            breaks.append(step)
            vector = _orthogonal(_gaussian(size, generator, device), basis[: step + 1])
        if on_step is not None:
            on_step(step + 1)
    return Krylov(alphas, betas, tuple(breaks), size, precision, basis if with_basis else None)


def ritz(krylov: Krylov, tolerance: float = CONVERGED) -> Ritz:
    """Eigenvalue approximations of a run, each with the radius that certainly holds an eigenvalue.

    A small residual proves that there is an eigenvalue this near, not that no other lies further out. Orthogonality is
    complete, so no eigenvalue appears twice unless it is multiple.

    Args:
        krylov: The run.
        tolerance: A value is converged when its residual is at most this share of its size, or mere rounding.

    Returns:
        Ritz values ascending, with residuals β|s| (plus what was cut at breaks, plus rounding), weights, flags.
    """
    values, vectors = np.linalg.eigh(krylov.matrix)
    last = len(krylov.alphas) - 1
    cuts = sorted({*krylov.breaks, last})
    squares = ((krylov.betas[cuts, None] * vectors[cuts]) ** 2).sum(axis=0)
    residuals = np.sqrt(squares + krylov.rounding**2)
    converged = residuals <= np.maximum(tolerance * np.abs(values), 2 * krylov.rounding)
    return Ritz(values, residuals, vectors[0] ** 2, converged)


def beyond_ends(krylov: Krylov, probability: float = 0.01) -> float:
    """How far the true ends of the spectrum may lie outside the Ritz values, except with this probability.

    Residuals prove that eigenvalues are there, not that none lies further out; a random start vector makes that
    unlikely. The bound knows nothing of the spectrum and is wide for few steps.

    Args:
        krylov: A run from a random start vector.
        probability: Of the bound being wrong, for either end.

    Returns:
        In units of the eigenvalues; infinite if the bound says nothing.

    References:
        Kuczyński & Woźniakowski (1992), SIAM J. Matrix Anal. Appl. 13, Theorem 4.2, for λ - λmin and λmax - λ.
    """
    num = len(krylov.alphas)
    if num == krylov.size:
        return 0.0
    share = (np.log(1.648 * np.sqrt(krylov.size) / probability) / (2 * num - 1)) ** 2
    values = np.linalg.eigvalsh(krylov.matrix)
    # of the true spread, which is at most spread + 2 * beyond
    return float(share * (values[-1] - values[0]) / (1 - 2 * share)) if share < 0.5 else float("inf")


def _relative_breakdown(precision: float) -> float:
    return max(_BREAKDOWN, _BREAKDOWN_ROUNDINGS * precision)


def _gaussian(size: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64).to(device)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """Part of the vector that is orthogonal to the rows of the basis."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector
