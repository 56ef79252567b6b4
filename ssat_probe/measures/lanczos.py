"""Lanczos from a random start: both ends of a symmetric operator's spectrum with residuals, and its coefficients."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from scipy.special import betaincinv
from torch import Tensor

from ssat_probe.measures.basis import Basis, DiskBasis, MemoryBasis, orthogonal
from ssat_probe.table import write_atomically

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
    basis: Basis | None = None
    "Where it was kept, in memory or in a file; for `combined`."

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


class LanczosRun:
    """A Lanczos run that is given its products one by one: `vector` asks, `take` answers, until `is_done`.

    Float64 recurrences and full reorthogonalisation in two passes ("twice is enough"). Where the space becomes
    invariant (the residual is rounding), what has been found is exact, and the run goes on with a new random vector
    orthogonal to everything so far: this is how further copies of a multiple eigenvalue and what the start vector
    misses are found. It is done after ``steps`` products or when the whole space is spanned.

    References:
        Golub & Van Loan, Matrix Computations (4th ed.), 10.1 and 10.3; Parlett, The Symmetric Eigenvalue Problem,
        6.9 for two passes, 13 for residuals.
    """

    def __init__(
        self,
        size: int,
        steps: int,
        *,
        seed: int = 0,
        start: Float64[Tensor, " parameter"] | None = None,
        precision: float = 2.0**-52,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        home: str = "device",
        key: str = "",
        is_new: bool = False,
    ) -> None:
        """Begin, or go on where the folder says that a run with the same key and sizes was left.

        Args:
            size: Dimension of the space.
            steps: Number of products at most; ``size`` at most.
            seed: Of the Gaussian start vector, and of those after a break.
            start: Start vector instead of the random one; any length but zero.
            precision: Machine epsilon of the products; decides when a residual is rounding.
            device: Where vectors are used.
            folder: Where `save` puts the state; None if the run is not to be gone on with.
            home: Where the basis lies: device, cpu, or disk, in a file of the folder.
            key: Of everything that the products depend on; a state with another key is not gone on from.
            is_new: Begin even where there is a state to go on from.

        Raises:
            ValueError: If ``steps`` is less than one, or the start vector is zero.
        """
        if steps < 1:
            raise ValueError(f"A Lanczos run needs at least one step, got {steps}. Ask for 80, or at least for 20.")
        self.size, self.precision, self.device = size, precision, device
        self.steps = min(steps, size)
        self.num_steps = 0
        "Products taken so far."
        self._alphas, self._betas = np.zeros(self.steps), np.zeros(self.steps)
        self._breaks: list[int] = []
        self._scale = 0.0
        self._generator = torch.Generator().manual_seed(seed)
        self._key = f"{key} size {size} steps {self.steps} seed {seed}"
        self._state = None if folder is None else folder / "lanczos.json"
        path = None if folder is None else folder / "basis.float64"
        self.basis: Basis
        if home == "disk" and path is not None:
            self.basis = DiskBasis(self.steps, size, path, device)
        else:
            self.basis = MemoryBasis(self.steps, size, path, device, "cpu" if home == "cpu" else None)
        if is_new or not self._load():
            vector = _gaussian(size, self._generator, device) if start is None else start.to(device, torch.float64)
            if not 0 < float(vector.norm()) < float("inf"):
                raise ValueError(
                    f"The start vector must have a length, got {float(vector.norm())}. Leave it out for a random one."
                )
            self.basis[0] = vector / vector.norm()

    @property
    def is_done(self) -> bool:
        """Whether all steps have been taken."""
        return self.num_steps == self.steps

    @property
    def vector(self) -> Float64[Tensor, " parameter"]:
        """Unit vector whose product is taken next."""
        return self.basis[self.num_steps]

    def take(self, image: Float64[Tensor, " parameter"]) -> None:
        """One step.

        Args:
            image: Product of the operator with ``vector``.

        Raises:
            ValueError: If it is not finite.
        """
        step, vector = self.num_steps, self.vector
        if not bool(torch.isfinite(image).all()):
            raise ValueError(f"A product must be finite, got {image.sum().item()} at step {step}. Check the weights.")
        self._alphas[step] = float(vector @ image)
        self._scale = max(self._scale, float(image.norm()))
        vector = orthogonal(image, self.basis, step + 1)
        self._betas[step] = float(vector.norm())
        if step + 1 == self.size or self._betas[step] <= _relative_breakdown(self.precision) * self._scale:
            self._breaks.append(step)
            vector = _gaussian(self.size, self._generator, self.device)
            vector = orthogonal(vector, self.basis, step + 1)
        self.num_steps += 1
        if not self.is_done:
            self.basis[self.num_steps] = vector / vector.norm()

    def krylov(self, with_basis: bool = False) -> Krylov:
        """Coefficients so far.

        Args:
            with_basis: Keep the basis too, where it lies; in a file it can be read until `close`.

        Returns:
            For `ritz` and for quadrature.
        """
        num = self.num_steps
        basis = self.basis if with_basis else None
        return Krylov(
            self._alphas[:num].copy(), self._betas[:num].copy(), tuple(self._breaks), self.size, self.precision, basis
        )

    def save(self) -> None:
        """Write basis and state, so that a later run with the same folder and key goes on from here, bit by bit."""
        if self._state is None:
            return
        self.basis.flush()
        state = {
            "key": self._key,
            "alphas": self._alphas[: self.num_steps].tolist(),
            "betas": self._betas[: self.num_steps].tolist(),
            "breaks": self._breaks,
            "scale": self._scale,
            "generator": bytes(self._generator.get_state().tolist()).hex(),
        }
        write_atomically(self._state, json.dumps(state))

    def close(self) -> None:
        """Let go of the basis' file."""
        self.basis.close()

    def _load(self) -> bool:
        """Whether there was a state to go on from."""
        if self._state is None or not self._state.is_file():
            return False
        state = json.loads(self._state.read_text(encoding="utf-8"))
        num = len(state["alphas"])
        if state["key"] != self._key or not self.basis.load(min(num + 1, self.steps)):
            return False
        self.num_steps = num
        self._alphas[: self.num_steps], self._betas[: self.num_steps] = state["alphas"], state["betas"]
        self._breaks, self._scale = state["breaks"], state["scale"]
        self._generator.set_state(torch.tensor(list(bytes.fromhex(state["generator"])), dtype=torch.uint8))
        return True


def lanczos(
    product: Callable[[Float64[Tensor, " parameter"]], Float64[Tensor, " parameter"]],
    size: int,
    steps: int,
    *,
    with_basis: bool = False,
    on_step: Callable[[int], None] | None = None,
    **options: Any,
) -> Krylov:
    """A whole Lanczos run from one start vector.

    Args:
        product: Symmetric operator times vector.
        size: Dimension of the space.
        steps: Number of products at most; ``size`` at most.
        with_basis: Keep the basis, ``steps`` vectors of ``size`` float64 numbers, in the result.
        on_step: Called after each product with the number of products so far; for progress.
        options: Of `LanczosRun`: seed, start, precision, device, and where the basis lies.

    Returns:
        Coefficients for `ritz` and for quadrature.
    """
    run = LanczosRun(size, steps, **options)
    while not run.is_done:
        run.take(product(run.vector))
        if on_step is not None:
            on_step(run.num_steps)
    if not with_basis:
        run.close()
    return run.krylov(with_basis)


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

    Let the eigenvalues be x from 0 to 1, b their components in the start vector, and all Ritz values of k steps below
    1 - ε. Then Σ b² p(x)² (x - 1 + ε) < 0 for every polynomial p of degree k - 1. With x = (1 - ε)(1 - s²) and
    p = T(s)/s, T the Chebyshev polynomial of degree 2k - 1, which is odd, p² (1 - ε - x) is at most 1 - ε where it is
    positive, and (1 - ε) sinh²((2k - 1) artanh √ε) below zero at x = 1. So the component along x = 1 is less than
    1/cosh((2k - 1) artanh √ε), which for a random unit vector has a probability known exactly (Beta distribution).

    Args:
        krylov: A run from a random start vector.
        probability: Of the bound being wrong, for one of the ends or both.

    Returns:
        In units of the eigenvalues; infinite if the bound says nothing.

    References:
        Kuczyński & Woźniakowski (1992), SIAM J. Matrix Anal. Appl. 13, give the rate √n exp(-(2k - 1) √ε), which this
        has too; their constant is not used.
    """
    num = len(krylov.alphas)
    if num == krylov.size:
        return 0.0
    component = np.sqrt(betaincinv(0.5, (krylov.size - 1) / 2, probability / 2))  # as small with half the probability
    share = np.tanh(np.arccosh(1 / component) / (2 * num - 1)) ** 2
    values = np.linalg.eigvalsh(krylov.matrix)
    # of the true spread, which is at most spread + 2 * beyond
    return float(share * (values[-1] - values[0]) / (1 - 2 * share)) if share < 0.5 else float("inf")


def _relative_breakdown(precision: float) -> float:
    return max(_BREAKDOWN, _BREAKDOWN_ROUNDINGS * precision)


def _gaussian(size: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64).to(device)
