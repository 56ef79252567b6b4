"""Proof, on the model at hand, that Hessian-vector products are what they claim to be; taken before any number."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from ssat_probe.measures.batching import pieces, turned
from ssat_probe.measures.hessian import Evaluation, HessianOperator
from ssat_probe.measures.isolation import random_state_kept


@dataclass(frozen=True)
class Check:
    """One measured relative error and the largest one allowed; NaN where it cannot be measured."""

    name: str
    measured: float
    allowed: float


@dataclass(frozen=True)
class Certificate:
    """Checks that were all passed, and the noise below which no eigenvalue has a sign."""

    checks: tuple[Check, ...]
    noise: float
    "Length of the error of a product with a unit vector that leans to the large curvature, in units of eigenvalues."


@dataclass(frozen=True)
class Tolerances:
    """Largest allowed relative errors, and the steps of the finite difference, the most promising first.

    Measured on ViTs of 35,000 parameters, untrained to fully trained: asymmetry 5e-16 (float64) and 2e-8 (float32);
    central difference off by at most 2e-7 at step 1e-5 (float64) and 3e-4 at step 1e-3 or 3e-4 (float32), there limited
    by the rounding of gradients. The known wrong recipes are off by 4e-3 to 8e-1, asymmetric by 9e-3 to 2e-2. The
    smallest step of float64 is for networks of ReLU, where longer ones cross kinks: 16 images of 32 pixels through a
    ResNet with 10 layers are off by 0.2 at step 1e-6 and 3e-9 at step 1e-7, and by 0.2 at best in float32.
    """

    determinism: float
    symmetry: float
    finite_difference: float
    steps: tuple[float, ...]


DOUBLE = Tolerances(1e-10, 1e-10, 1e-6, (1e-5, 1e-6, 1e-4, 1e-7))
SINGLE = Tolerances(1e-5, 1e-5, 2e-3, (3e-4, 1e-3, 1e-4, 3e-3))


def certify(operator: HessianOperator, *, seed: int = 0, evaluated: HessianOperator | None = None) -> Certificate:
    """Check determinism, reduction, symmetry and one finite-difference direction of an operator, in this order.

    Costs about nine products and four gradients. The test directions are half random, so that every parameter
    takes part, and half a product with that random vector, so that errors in the large curvature are not diluted.

    Args:
        operator: As it will be used; parameters and random state are left as found.
        seed: Of the test directions.
        evaluated: Whose loss is cut into halves for the reduction, where it is another operator's; by default the
            operator's own.

    Returns:
        What was measured and allowed, and the noise floor; NaN for the reduction where no batch can be cut.

    Raises:
        ValueError: If a check fails, with its name, what was measured and allowed, and what to do; or if the dtype is
            coarser than float32.
    """
    if operator.precision > 2e-7:
        raise ValueError(
            f"Curvature needs parameters in float32 or float64, got a machine epsilon of {operator.precision:.2g}. "
            "Convert the model with .float() or .double()."
        )
    allowed = DOUBLE if operator.precision < 1e-12 else SINGLE
    generator = torch.Generator().manual_seed(seed)
    with _images_alone():
        determinism = _determinism(operator, _unit(_gaussian(operator, generator)), allowed.determinism)
    reduction = _reduction(evaluated or operator, allowed.determinism)
    first, second = (_leaning(operator, _gaussian(operator, generator)) for _ in range(2))
    image = operator.product(first)
    symmetry = _symmetry(operator, first, second, image, allowed.symmetry)
    difference = _finite_difference(operator, first, allowed)
    checks = (determinism, reduction, symmetry, difference)
    return Certificate(checks, _noise(operator, first, image, generator))


def _reduction(operator: HessianOperator, allowed: float) -> Check:
    """Loss and gradient of one batch against the mean of its halves: differ where images do not count by themselves."""
    batch, num = next(((batch, num) for batch, num in operator.batches if num > 1), (None, 0))
    halves = list(pieces(batch, num, -(-num // 2))) if num else []
    if len(halves) < 2 or any(half is batch for half, _ in halves):
        return Check("reduction", float("nan"), allowed)
    whole, parts = (
        HessianOperator(operator.parameters, operator.loss, some, reduction=operator.reduction).evaluate()
        for some in ([(batch, num)], halves)
    )
    measured = max(
        _apart(torch.tensor([whole.loss]).double(), torch.tensor([parts.loss]).double()),
        _apart(whole.gradient, parts.gradient) if float(whole.gradient.norm()) > operator.precision else 0.0,
    )
    advice = (
        "the loss of a batch is not the mean (or sum, if so declared) over its images; look for a wrong reduction, "
        "batch normalisation in training mode, and losses that compare images with each other"
    )
    return _passed(Check("reduction", measured, allowed), advice, measured > allowed)


@contextmanager
def _images_alone() -> Iterator[None]:
    """Refuse, before it runs, a layer that mixes the images of a batch."""

    def refuse(module: nn.Module, _: object) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"Each image must count by itself, got {type(module).__name__} in training mode, which normalises over "
                "the batch: curvature would depend on how images are grouped. Call model.eval()."
            )

    handle = nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _determinism(operator: HessianOperator, vector: Tensor, allowed: float) -> Check:
    """Two passes over loss, gradient and one product, with global random states that differ."""
    passes = []
    for state in (1, 2):
        with random_state_kept():
            torch.manual_seed(state)
            np.random.seed(state)
            random.seed(state)
            operator.release()
            passes.append((operator.evaluate(), operator.product(vector)))
    operator.release()
    (one, image), (two, again) = passes
    measured = max(
        _apart(torch.tensor([one.loss]), torch.tensor([two.loss])),
        _apart(one.gradient, two.gradient),
        _apart(image, again),
    )
    return _passed(Check("determinism", measured, allowed), _what_changed(one, two, measured > allowed, allowed))


def _what_changed(one: Evaluation, two: Evaluation, is_different: bool, allowed: float) -> str:
    """Name of the source of a difference between two passes, empty if there is none."""
    if sum(one.batch_sizes) != sum(two.batch_sizes):
        return f"the number of images went from {sum(one.batch_sizes)} to {sum(two.batch_sizes)}; read the same images"
    if is_different:
        return (
            f"the loss went from {one.loss:.8g} to {two.loss:.8g}; switch dropout off with model.eval(), "
            "and freeze random masks and augmentation"
        )
    losses = (
        torch.tensor([one.batch_losses, two.batch_losses]) if len(one.batch_losses) == len(two.batch_losses) else None
    )
    if losses is None or one.batch_sizes != two.batch_sizes or _apart(*losses) > max(allowed, 1e-6):
        return "the mean is the same but the batches are not; switch shuffling off"
    return ""


def _symmetry(operator: HessianOperator, first: Tensor, second: Tensor, image: Tensor, allowed: float) -> Check:
    """Difference of u·Hv and v·Hu, relative to the lengths of the products."""
    other = operator.product(second)
    scale = float(image.norm() + other.norm()) / 2
    measured = abs(float(first @ other) - float(second @ image)) / scale if scale else 0.0
    return _passed(
        Check("symmetry", measured, allowed),
        "u·Hv differs from v·Hu, so some operation has a wrong second derivative; find it by replacing custom, fused "
        "and forward-mode operations by plain ones",
        measured > allowed,
    )


def _finite_difference(operator: HessianOperator, vector: Tensor, tolerances: Tolerances) -> Check:
    """Central difference of gradients against the product at the first step that agrees; a wrong one never does."""
    measured = float("inf")
    for step in tolerances.steps:
        sides = []
        for sign in (1, -1):
            with operator.moved(sign * step * vector) as displacement:
                sides.append((operator.evaluate().gradient, displacement))
        (ahead, there), (behind, back) = sides
        difference = (ahead - behind) / (2 * step)
        image = operator.product((there - back) / (2 * step))
        rounding = operator.precision * float(ahead.norm() + behind.norm()) / step
        scale = max(float(image.norm()), rounding / tolerances.finite_difference)
        measured = min(measured, float((difference - image).norm()) / scale if scale else 0.0)
        if measured <= tolerances.finite_difference:
            break
    is_single = tolerances is SINGLE
    kinks = "steps in float32 cross kinks of ReLU, take --dtype float64" if is_single else "weights on a kink of ReLU"
    return _passed(
        Check("finite difference", measured, tolerances.finite_difference),
        "the product is not the derivative of the gradient along a unit vector; look for operations with a wrong "
        f"second derivative, detached tensors, or a loss that is not smooth ({kinks})",
        measured > tolerances.finite_difference,
    )


def _noise(operator: HessianOperator, vector: Tensor, image: Tensor, generator: torch.Generator) -> float:
    """Change of a product with weights one unit in the last place off, vector times 3, images in reverse order."""
    signs = torch.randint(0, 2, (operator.size,), generator=generator).to(vector) * 2 - 1
    weights = torch.cat([parameter.detach().reshape(-1).double() for parameter in operator.parameters.values()])
    with operator.moved(signs * operator.precision * operator.restricted(weights)), _reversed(operator):
        return float((operator.product(3 * vector) / 3 - image).norm())


@contextmanager
def _reversed(operator: HessianOperator) -> Iterator[None]:
    """The operator with its batches from the last to the first, and each from its last image to its first."""
    batches = operator.batches
    operator.batches = _Reversed(batches)
    try:
        yield
    finally:
        operator.batches = batches
        operator.release()


class _Reversed:
    def __init__(self, batches: Iterable[tuple[Any, int]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for batch, num in reversed(list(self._batches)):
            yield turned(batch, num), num


def _passed(check: Check, advice: str, is_failed: bool | None = None) -> Check:
    """The check, unless it failed: by default, when there is advice."""
    if bool(advice) if is_failed is None else is_failed:
        raise ValueError(
            f"The Hessian must pass the check of {check.name}, got a relative error of {check.measured:.3g} where "
            f"{check.allowed:.3g} is allowed: {advice}."
        )
    return check


def _leaning(operator: HessianOperator, vector: Tensor) -> Float64[Tensor, " parameter"]:
    """Unit vector, half random and half towards the large curvature."""
    return _unit(_unit(vector) + _unit(operator.product(_unit(vector))))


def _gaussian(operator: HessianOperator, generator: torch.Generator) -> Float64[Tensor, " parameter"]:
    return torch.randn(operator.size, generator=generator, dtype=torch.float64).to(operator.device)


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm() if float(vector.norm()) else vector


def _apart(one: Tensor, two: Tensor) -> float:
    """Relative distance; 0 where both vanish."""
    scale = max(float(one.norm()), float(two.norm()))
    return float((one - two).norm()) / scale if scale else 0.0
