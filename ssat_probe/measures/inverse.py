"""Inverse of a damped Hessian times a vector: LiSSA, calibrated and watched; CG and MINRES; eigenvalues through it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse.linalg as sparse
import torch
from jaxtyping import Float64
from torch import Tensor

from ssat_probe.measures.lanczos import Krylov, lanczos, ritz

Product = Callable[[Tensor], Tensor]

CONVENTIONS = ("absolute", "koh_liang")
SOLVERS = ("lissa", "cg", "minres")
MARGIN = 2.0  # damping in units of |λmin|: the smallest damped eigenvalue is |λmin|; ours, cost against distance
LEAST_SHARE = 0.05  # least damping in units of λmax: LiSSA then needs some 100 products for 1e-3; ours
SAFETY = 1.2  # scale in units of the smallest that converges; ours, for a λmax known to a per cent
PILOT_STEPS = 40  # of the Lanczos runs that calibrate; both ends of a network's Hessian are found by then
BATCH_STEPS = 15  # of those that find λmax of a mini-batch; the largest eigenvalue comes first
CHECK_EVERY = 25  # stochastic steps between two true residuals; tuned, no source
INNER = 3e-3  # residual of LiSSA below Lanczos over 1/√n, the share of one of n directions in a random vector; ours
INNER_ROUNDINGS = 40  # the same at least, in machine epsilons of the products, which allow no less; ours
_GROWN = 10  # a residual this many times the least one so far is divergence
_ROUNDING = 1e-4  # ... unless it is as small as this, where products of float32 may leave it to wander; ours
_STALLED = 20  # steps without a smaller residual, among those, end the recursion; ours
_VANISHED = 1e-300


@dataclass(frozen=True)
class Calibration:
    """Damping and scale with which the recursion of LiSSA converges."""

    damping: float
    "Added to every eigenvalue, in their units."
    scale: float
    "Every product is divided by it; more than half the largest damped eigenvalue of any batch."

    def in_convention(self, convention: str) -> tuple[float, float]:
        """The two numbers as other code wants them.

        Args:
            convention: ``absolute``: damping is added to the Hessian, (H + damping) x = v. ``koh_liang``: the recursion
                h ← v + (1 - damping) h - H h / scale, where the Hessian gets damping times scale.

        Returns:
            Damping and scale in that convention.

        Raises:
            ValueError: If the convention is unknown.
        """
        if convention not in CONVENTIONS:
            raise ValueError(f"The convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}. Name one.")
        return (self.damping if convention == "absolute" else self.damping / self.scale), self.scale


@dataclass(frozen=True)
class Solution:
    """Approximate solution x of (H + damping) x = v."""

    vector: Float64[Tensor, " parameter"]
    residual: float
    "True one, ‖(H + damping) x - v‖ / ‖v‖, with the Hessian over all images."
    num_products: int
    "Of the Hessian over all images."
    converged: bool
    num_batch_products: int = 0
    "Of the Hessians of mini-batches."


def calibrate(smallest: float, largest: float, largest_of_a_batch: float | None = None) -> Calibration:
    """Damping above the negative edge, scale from the largest curvature of the batches that are used.

    Args:
        smallest: λmin of the Hessian over all images.
        largest: λmax of it.
        largest_of_a_batch: λmax of the Hessian of a mini-batch, if products of mini-batches are used; it is larger.

    Returns:
        Damping: twice |λmin|, at least a twentieth of λmax. Scale: half the largest damped eigenvalue, and a
            fifth more.
    """
    damping = max(MARGIN * max(-smallest, 0.0), LEAST_SHARE * abs(largest))
    return Calibration(damping, SAFETY * (max(largest, largest_of_a_batch or largest) + damping) / 2)


def calibrated(
    product: Product,
    size: int,
    batch_products: Sequence[Product] = (),
    *,
    seed: int = 0,
    precision: float = 2.0**-52,
    device: torch.device | str = "cpu",
) -> Calibration:
    """`calibrate` on what Lanczos runs find: λmin and λmax over all images, the greatest λmax of the mini-batches.

    Args:
        product: Hessian over all images times vector.
        size: Dimension.
        batch_products: Hessian of each mini-batch times vector, if the recursion is to use them.
        seed: Of the start vectors.
        precision: Machine epsilon of the products.
        device: Where vectors live.

    Returns:
        Damping and scale; ``PILOT_STEPS`` products were spent, and ``BATCH_STEPS`` of each mini-batch.
    """
    options: dict[str, Any] = {"seed": seed, "precision": precision, "device": device}
    pilot = ritz(lanczos(product, size, PILOT_STEPS, **options)).values
    tops = [float(ritz(lanczos(one, size, BATCH_STEPS, **options)).values[-1]) for one in batch_products]
    return calibrate(float(pilot[0]), float(pilot[-1]), max(tops, default=None))


def from_koh_liang(damping: float, scale: float) -> Calibration:
    """Calibration that repeats settings of code in the convention of Koh & Liang.

    Args:
        damping: Their ``damping``, a share of the scale.
        scale: Their ``scale``.

    Returns:
        The same recursion in absolute terms.
    """
    return Calibration(damping * scale, scale)


def lissa(
    product: Product,
    vector: Float64[Tensor, " parameter"],
    calibration: Calibration,
    *,
    tolerance: float = 1e-3,
    max_steps: int = 10_000,
    batch_products: Sequence[Product] = (),
    repeats: int = 1,
    seed: int = 0,
) -> Solution:
    """Inverse-Hessian-vector product by the recursion h ← h + (v - (H + damping) h) / scale.

    With v / scale for v and (H + damping) / scale for the Hessian this is h ← v + (I - H) h of Agarwal et al., who draw
    a new sample for H in every step (``batch_products``) and average independent recursions (``repeats``, their S₁;
    ``max_steps`` is their S₂). Converges when every eigenvalue λ of the Hessians that are used fulfils
    0 < λ + damping < 2 scale; with mini-batches down to the noise of their differences.

    Args:
        product: Hessian over all images times vector.
        vector: Right-hand side v.
        calibration: From `calibrate`.
        tolerance: Stop when the true residual is at most this share of ‖v‖.
        max_steps: Stop there at the latest; the solution then says that it has not converged.
        batch_products: Hessian of each mini-batch times vector: one drawn at random per step. None means that each
            step takes all images, and that its residual is the true one.
        repeats: Independent recursions whose results are averaged; more than one needs mini-batches.
        seed: Of the draws.

    Returns:
        The best solution whose true residual was seen; with repeats their mean, with its true residual.

    Raises:
        ValueError: If the recursion diverges: with the direction's curvature, and which number to raise. If repeats
            would all be the same.

    References:
        Agarwal, Bullins & Hazan (2017), JMLR 18(116); Koh & Liang (2017), arXiv 1703.04730, Sec. 3.
    """
    if repeats < 1 or (repeats > 1 and not batch_products):
        raise ValueError(
            f"Repeats average the noise of mini-batches and must be at least 1, got {repeats} with "
            f"{len(batch_products)} mini-batches. Pass batch_products, or leave repeats out."
        )
    limits: dict[str, Any] = {"tolerance": tolerance, "max_steps": max_steps, "batch_products": batch_products}
    chains = [_chain(product, vector, calibration, seed=(seed, i), **limits) for i in range(repeats)]
    if repeats == 1:
        return chains[0][0]
    mean = torch.stack([last for _, last in chains]).mean(dim=0)  # the best seen of each would be biased
    remaining = vector - product(mean) - calibration.damping * mean
    residual = float(remaining.norm()) / max(float(vector.norm()), _VANISHED)
    spent, drawn = (sum(getattr(one, name) for one, _ in chains) for name in ("num_products", "num_batch_products"))
    return Solution(mean, residual, spent + 1, residual <= tolerance, drawn)


def _chain(
    product: Product,
    vector: Tensor,
    calibration: Calibration,
    *,
    tolerance: float,
    max_steps: int,
    batch_products: Sequence[Product],
    seed: tuple[int, int],
) -> tuple[Solution, Tensor]:
    """One recursion, stopped on its true residual: the best that was seen, and where it ended."""
    draw = np.random.default_rng(seed)
    length = max(float(vector.norm()), _VANISHED)
    now = torch.zeros_like(vector)
    best, least = now, 1.0
    spent = since = 0
    for step in range(max_steps):
        is_true = not batch_products or step % CHECK_EVERY == 0
        one = product if is_true else batch_products[int(draw.integers(len(batch_products)))]
        remaining = vector - one(now) - calibration.damping * now
        spent += is_true
        if is_true:
            residual = float(remaining.norm()) / length
            usual = 1.0 if batch_products else max(least, tolerance, _ROUNDING)  # with mini-batches it goes up and down
            if not residual <= _GROWN * usual:
                raise ValueError(_diverged(product, remaining, calibration, residual, spent))
            since = 0 if residual < least else since + 1
            if residual <= least:
                best, least = now, residual
            is_stalled = not batch_products and since >= _STALLED and residual <= _ROUNDING
            if residual <= tolerance or is_stalled:
                break
        now = now + remaining / calibration.scale
    return Solution(best, least, spent, least <= tolerance, step + 1 - spent), now


def _diverged(product: Product, remaining: Tensor, calibration: Calibration, residual: float, spent: int) -> str:
    """Which condition of convergence is broken, from the direction that grows."""
    direction = torch.nan_to_num(remaining, posinf=0.0, neginf=0.0)
    direction = direction / max(float(direction.norm()), _VANISHED)
    curvature = float(direction @ product(direction))
    found = f"got a residual of {residual:.3g} after {spent} products along a direction of curvature {curvature:.4g}"
    if curvature + calibration.damping <= 0:
        return (
            f"The damping of LiSSA must exceed |λmin|, {found} with damping {calibration.damping:.4g}. "
            f"Raise the damping above {-curvature:.4g}."
        )
    return (
        f"The scale of LiSSA must exceed half of λmax + damping, of the mini-batches if they are used, {found} with "
        f"scale {calibration.scale:.4g}. Raise the scale above {(curvature + calibration.damping) / 2:.4g}."
    )


def krylov_solve(
    product: Product,
    vector: Float64[Tensor, " parameter"],
    damping: float,
    solver: str = "minres",
    *,
    tolerance: float = 1e-3,
    max_steps: int = 1000,
) -> Solution:
    """The same system by scipy's conjugate gradients (needs a damping above |λmin|) or MINRES (needs none).

    Args:
        product: Hessian over all images times vector.
        vector: Right-hand side.
        damping: Added to every eigenvalue.
        solver: ``cg`` or ``minres``.
        tolerance: As for `lissa`.
        max_steps: As for `lissa`.

    Returns:
        The solution with its true residual, computed afresh.

    Raises:
        ValueError: If the solver is unknown.
    """
    if solver not in SOLVERS[1:]:
        raise ValueError(f"The solver must be one of {', '.join(SOLVERS[1:])}, got {solver!r}. Use lissa() for LiSSA.")
    spent = 0

    def damped(x: np.ndarray) -> np.ndarray:
        nonlocal spent
        spent += 1
        along = torch.from_numpy(np.array(x, dtype=float).reshape(-1)).to(vector.device)
        return (product(along) + damping * along).cpu().numpy()

    size = len(vector)
    matrix = sparse.LinearOperator((size, size), matvec=damped, dtype=np.float64)
    # MINRES stops on an estimate relative to the operator's norm: a margin, then the true residual decides
    options = {"rtol": tolerance if solver == "cg" else tolerance / 100, "maxiter": max_steps}
    right = vector.cpu().numpy()
    found, _ = getattr(sparse, solver)(matrix, right, **options)
    residual = float(np.linalg.norm(damped(found) - right) / max(float(np.linalg.norm(right)), _VANISHED))
    return Solution(torch.from_numpy(found).to(vector), residual, spent, residual <= tolerance)


def inverse_product(
    product: Product,
    vector: Float64[Tensor, " parameter"],
    calibration: Calibration,
    solver: str = "lissa",
    *,
    tolerance: float = 1e-3,
) -> Solution:
    """(H + damping)⁻¹ times a vector by any of the solvers, to the same true residual.

    Args:
        product: Hessian over all images times vector.
        vector: Right-hand side.
        calibration: CG and MINRES take its damping alone.
        solver: One of ``SOLVERS``.
        tolerance: Of the true residual.

    Returns:
        The solution; an unknown solver is a ValueError.
    """
    if solver == "lissa":
        return lissa(product, vector, calibration, tolerance=tolerance)
    return krylov_solve(product, vector, calibration.damping, solver, tolerance=tolerance)


@dataclass(frozen=True)
class InverseRitz:
    """Eigenvalues of the Hessian found through its damped inverse, ascending; some eigenvalue lies in each interval."""

    values: Float64[np.ndarray, " step"]
    lows: Float64[np.ndarray, " step"]
    highs: Float64[np.ndarray, " step"]
    weights: Float64[np.ndarray, " step"]
    worst_residual: float
    num_products: int


def inverse_eigenvalues(
    product: Product,
    size: int,
    calibration: Calibration,
    steps: int,
    *,
    tolerance: float | None = None,
    precision: float = 2.0**-52,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[int], None] | None = None,
) -> InverseRitz:
    """Lanczos on the damped inverse that LiSSA applies, mapped back: resolves the negative edge best.

    All images at every step, because Lanczos needs one and the same matrix. An eigenvalue μ of the inverse belongs to
    1/μ - damping; what is uncertain about μ (residual, and the tolerance of the inner solutions) is mapped with it.

    Args:
        product: Hessian over all images times vector.
        size: Dimension.
        calibration: From `calibrate`.
        steps: Of the outer Lanczos run; each takes as many products as LiSSA needs.
        tolerance: Of the true residual of each inner solution; None means ``INNER`` / √n, or what the precision allows:
            one direction of n is a share of 1/√n of the start vector, and worse solutions would drown it.
        precision: Machine epsilon of the products.
        seed: Of the start vector.
        device: Where vectors live.
        on_step: Called after each outer step.

    Returns:
        Values with certain intervals (infinite where the residual says nothing), and products in all.
    """
    spent, worst = 0, 0.0
    tolerance = max(INNER * size**-0.5, INNER_ROUNDINGS * precision) if tolerance is None else tolerance

    def inverse(vector: Tensor) -> Tensor:
        nonlocal spent, worst
        solution = lissa(product, vector, calibration, tolerance=tolerance)
        spent, worst = spent + solution.num_products, max(worst, solution.residual)
        return solution.vector

    krylov: Krylov = lanczos(inverse, size, steps, seed=seed, precision=tolerance, device=device, on_step=on_step)
    found = ritz(krylov)
    radius = found.residuals + worst * found.values[-1]
    inverses = np.maximum(found.values, _VANISHED)
    far = np.where(inverses > radius, 1 / np.maximum(inverses - radius, _VANISHED), np.inf)
    order = np.argsort(1 / inverses)
    values, lows, highs = (x[order] - calibration.damping for x in (1 / inverses, 1 / (inverses + radius), far))
    return InverseRitz(values, lows, highs, found.weights[order], worst, spent)
