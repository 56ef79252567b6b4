"""PyHessian's own numbers for an operator of ours: the same model, images and loss, as a cross-check."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.isolation import random_state_kept


@dataclass(frozen=True)
class PyHessian:
    """What PyHessian gives: eigenvalues of largest absolute value in the order found, and the trace."""

    eigenvalues: tuple[float, ...]
    trace: float
    eigenvalue_products: int
    trace_products: int


class _Loss(nn.Module):
    """The loss of a batch as the output of a module; batches are asked for by their number."""

    def __init__(self, operator: HessianOperator, batches: list[Any]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(p for p in operator.parameters.values() if isinstance(p, nn.Parameter))
        self.operator, self.batches, self.calls = operator, batches, 0

    def forward(self, places: Tensor) -> Tensor:
        self.calls += 1
        return self.operator.loss(self.batches[int(places[0])])


def pyhessian(
    operator: HessianOperator,
    *,
    top: int = 5,
    tolerance: float = 1e-3,
    seed: int = 0,
    bystanders: Iterable[Tensor] = (),
) -> PyHessian:
    """Run PyHessian's ``eigenvalues`` and ``trace`` (its ``density`` fails on current torch).

    Args:
        operator: A Hessian without restriction to coordinates, of a mean loss.
        top: Eigenvalues.
        tolerance: Of its stopping rule; 1e-3 is its default.
        seed: Of its random vectors.
        bystanders: Parameters that the loss depends on and the operator does not cover; frozen meanwhile, because
            PyHessian's backward passes leave gradients on everything.

    Returns:
        Its numbers and products; gradients, modes and random state of the model are put back.

    Raises:
        ValueError: If the operator is restricted to coordinates, which PyHessian knows nothing of.
    """
    from pyhessian import hessian

    if operator.is_restricted:
        raise ValueError(
            f"PyHessian needs whole parameters, got a selection of {operator.size} coordinates. Select q, k and v "
            "together, or leave pyhessian out."
        )
    parameters = list(operator.parameters.values())
    gradients = [parameter.grad for parameter in parameters]
    frozen = [one for one in bystanders if one.requires_grad and all(one is not other for other in parameters)]
    pairs = list(operator.batches)
    loss = _Loss(operator, [batch for batch, _ in pairs])
    loader = [(torch.full((num,), place), torch.zeros(1)) for place, (_, num) in enumerate(pairs)]
    default = torch.get_default_dtype()
    try:
        with random_state_kept(), warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")
            torch.manual_seed(seed)
            torch.set_default_dtype(parameters[0].dtype)
            for parameter in parameters:
                parameter.grad = None
            for one in frozen:
                one.requires_grad_(False)
            theirs = hessian(loss, lambda value, _: value, dataloader=loader, cuda=parameters[0].is_cuda)
            # PyHessian looks for its parameters where a backward pass has been
            theirs.params = [parameter for parameter in loss.trained if parameter.requires_grad]
            values, _ = theirs.eigenvalues(maxIter=1000, tol=tolerance, top_n=top)
            first, loss.calls = loss.calls, 0
            found = theirs.trace(maxIter=100, tol=tolerance)
    finally:
        torch.set_default_dtype(default)
        for one in frozen:
            one.requires_grad_(True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    num = len(pairs)
    return PyHessian(tuple(map(float, values)), float(sum(found) / len(found)), first // num, loss.calls // num)
