"""Inverse of a damped Hessian times a vector: LiSSA, watched; CG and MINRES; eigenvalues through it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse.linalg as sparse
import torch
from jaxtyping import Float64
from torch import Tensor

from ssat_probe.measures.calibration import Calibration, Product, ends
from ssat_probe.measures.lanczos import Krylov, lanczos, ritz

SOLVERS = ("lissa", "cg", "minres")
MAX_STEPS = 10_000  # of a recursion: Koh & Liang's recursion_depth
CHECK_EVERY = 25  # stochastic steps between two true residuals; tuned, no source
INNER = 3e-3  # residual of LiSSA below Lanczos over 1/√n, the share of one of n directions in a random vector; ours
INNER_ROUNDINGS = 40  # the same at least, in machine epsilons of the products, which allow no less; ours
_GROWN = 10  # a residual this many times the least one so far is divergence
_ROUNDING = 1e-4  # ... unless it is as small as this, where products of float32 may leave it to wander; ours
_STALLED = 20  # steps without a smaller residual, among those, end the recursion; ours
_VANISHED = 1e-300


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


def lissa(
    product: Product,
    vector: Float64[Tensor, " parameter"],
    calibration: Calibration,
    *,
    tolerance: float = 1e-3,
    max_steps: int = MAX_STEPS,
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
        calibration: From `calibrate` or `from_koh_liang`.
        tolerance: Stop when the true residual is at most this share of ‖v‖.
        max_steps: Stop there at the latest; the solution then says that it has not converged.
        batch_products: Hessian of each mini-batch times vector: one drawn at random per step. None means that each
            step takes all images, and that its residual is the true one.
        repeats: Independent recursions whose results are averaged; more than one needs mini-batches.
        seed: Of the draws.

    Returns:
        The best solution that was seen; with mini-batches the mean of where the recursions end. The true residual is
            that of the vector returned.

    Raises:
        ValueError: If the recursion diverges: with the curvature to blame, and which number to raise. If repeats
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
    if not batch_products:
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
                raise ValueError(_diverged(product, vector, calibration, batch_products, residual, step))
            since = 0 if residual < least else since + 1
            if residual <= least:
                best, least = now, residual
            is_stalled = not batch_products and since >= _STALLED and residual <= _ROUNDING
            if residual <= tolerance or is_stalled:
                break
        now = now + remaining / calibration.scale
    return Solution(best, least, spent, least <= tolerance, step + 1 - spent), now


def _diverged(
    product: Product,
    vector: Tensor,
    calibration: Calibration,
    batch_products: Sequence[Product],
    residual: float,
    step: int,
) -> str:
    """Which conditions of convergence are broken, and by what curvature: what grows may have overflowed by then."""
    smallest, largest, of_a_batch = ends(product, len(vector), batch_products, device=vector.device)
    largest = max(largest, of_a_batch or largest)
    (damping, scale), is_share = calibration.in_convention(calibration.convention), calibration.convention != "absolute"
    if is_share:  # damping × scale is added, so that the scale raises it too
        least_scale = max(largest / (2 - damping), (largest - smallest) / 2)
        least_damping = -smallest / max(scale, least_scale)
    else:
        least_scale, least_damping = (largest + max(damping, -smallest)) / 2, -smallest
    wanted = [f"damping above {least_damping:.4g}"] if damping <= least_damping else []
    wanted += [f"scale above {least_scale:.4g}"] if scale <= least_scale else []
    found = f"λmin = {smallest:.4g} over all images, λmax = {largest:.4g}" + " of a mini-batch" * bool(batch_products)
    added = "damping × scale" if is_share else "damping"
    return (
        f"LiSSA (convention {calibration.convention}) must have 0 < λ + {added} < 2 scale for every eigenvalue λ, got "
        f"{found}, damping {damping:.4g} and scale {scale:.4g}, and a residual {residual:.3g} times the right-hand "
        f"side after {step} steps. Take a {' and a '.join(wanted) or 'larger scale, or larger mini-batches'}."
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
    right = vector.cpu().numpy()
    length = max(float(np.linalg.norm(right)), _VANISHED)
    found, remaining, residual, before = np.zeros(size), right, 1.0, np.inf
    # both stop on estimates, MINRES on one relative to ‖matrix‖ ‖x‖: the true residual decides whether to go on
    while tolerance < residual < before / 2 and spent < max_steps:
        limits = {"rtol": tolerance / residual * (1 if solver == "cg" else 1e-2), "maxiter": max_steps - spent}
        nearer = found + getattr(sparse, solver)(matrix, remaining, **limits)[0]
        left = right - damped(nearer)
        before, now = residual, float(np.linalg.norm(left)) / length
        if now < residual:
            found, remaining, residual = nearer, left, now
    return Solution(torch.from_numpy(found).to(vector), residual, spent, residual <= tolerance)


def inverse_product(
    product: Product,
    vector: Float64[Tensor, " parameter"],
    calibration: Calibration,
    solver: str = "lissa",
    *,
    tolerance: float = 1e-3,
    max_steps: int = MAX_STEPS,
) -> Solution:
    """(H + damping)⁻¹ times a vector by any of the solvers, to the same true residual.

    Args:
        product: Hessian over all images times vector.
        vector: Right-hand side.
        calibration: CG and MINRES take its damping alone.
        solver: One of ``SOLVERS``.
        tolerance: Of the true residual.
        max_steps: Of LiSSA alone.

    Returns:
        The solution; an unknown solver is a ValueError.
    """
    if solver == "lissa":
        return lissa(product, vector, calibration, tolerance=tolerance, max_steps=max_steps)
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
    max_steps: int = MAX_STEPS,
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
        max_steps: Of each inner solution.
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
        solution = lissa(product, vector, calibration, tolerance=tolerance, max_steps=max_steps)
        spent, worst = spent + solution.num_products, max(worst, solution.residual)
        return solution.vector

    krylov: Krylov = lanczos(inverse, size, steps, seed=seed, precision=tolerance, device=device, on_step=on_step)
    found = ritz(krylov)
    # ‖inverse‖ (1 - worst) ≤ ‖what is applied‖, of which the largest value is known
    radius = found.residuals + (worst / (1 - worst) if worst < 1 else np.inf) * found.values[-1]
    inverses = np.maximum(found.values, _VANISHED)
    far = np.where(inverses > radius, 1 / np.maximum(inverses - radius, _VANISHED), np.inf)
    order = np.argsort(1 / inverses)
    values, lows, highs = (x[order] - calibration.damping for x in (1 / inverses, 1 / (inverses + radius), far))
    return InverseRitz(values, lows, highs, found.weights[order], worst, spent)
