"""Gauss-Newton matrix JᵀHJ of a loss: positive semi-definite, with the analytic Hessian H of the output loss."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssat_probe.measures.hessian import HessianOperator


@dataclass(frozen=True)
class Output:
    """What a network gives for a batch, and the quadratic form of the output loss around it."""

    values: Tensor
    half_square: Callable[[Tensor, Tensor], Tensor]
    "Of (deviation, values): half the deviation times the output Hessian at the values times the deviation."


def cross_entropy_output(logits: Float[Tensor, "batch class"]) -> Output:
    """Output of a classifier under mean cross-entropy; its Hessian is diag(p) - ppᵀ per image, whatever the label.

    Args:
        logits: Before softmax, attached to the graph.

    Returns:
        For `gauss_newton`.
    """

    def half_square(deviation: Tensor, values: Tensor) -> Tensor:
        shares = values.softmax(dim=1)
        mean = (shares * deviation).sum(dim=1, keepdim=True)
        return (shares * (deviation - mean).square()).sum() / (2 * len(values))

    return Output(logits, half_square)


def squared_error_output(predicted: Tensor, weight: Tensor | float) -> Output:
    """Output under a weighted sum of squared errors; its Hessian is twice the weight.

    Args:
        predicted: Any shape, attached to the graph.
        weight: Of each squared error in the loss of the batch, broadcastable; 1/number of entries for a mean.

    Returns:
        For `gauss_newton`.
    """
    return Output(predicted, lambda deviation, _: (weight * deviation.square()).sum())


def weighted_sum(parts: Sequence[tuple[float, Output]]) -> Output:
    """Output under a weighted sum of losses; its Hessian has that of each loss on the diagonal, and nothing beside.

    Args:
        parts: Weight in the sum and output of each loss; every output begins with the axis of the images.

    Returns:
        For `gauss_newton`: one row per image, the outputs side by side.
    """
    shapes = [part.values.shape[1:] for _, part in parts]
    sizes = [shape.numel() for shape in shapes]

    def half_square(deviation: Tensor, values: Tensor) -> Tensor:
        split = zip(deviation.split(sizes, 1), values.split(sizes, 1), shapes, strict=True)
        apart = [[one.unflatten(1, shape) for one in both] for *both, shape in split]
        terms = [weight * part.half_square(*own) for (weight, part), own in zip(parts, apart, strict=True)]
        return torch.stack(terms).sum()

    return Output(torch.cat([part.values.flatten(1) for _, part in parts], dim=1), half_square)


def gauss_newton(
    parameters: Mapping[str, Tensor],
    output: Callable[[Any], Output],
    batches: Iterable[tuple[Any, int]],
    *,
    coordinates: Int[Tensor, " coordinate"] | None = None,
    is_sharded: bool = False,
) -> HessianOperator:
    """Gauss-Newton matrix as an operator, for losses that are means over the images of a batch.

    It is the Hessian, at the present parameters, of the sum of half squares ½ (f - f₀)ᵀH (f - f₀), whose f₀ and H are
    frozen: the second derivative of f is multiplied by f - f₀ = 0. So all that is true of Hessian products is
    true here: batches, micro-batches, kept graphs, several vectors at once and the same certificate. The loss and
    gradient of this operator are zero; those of the model come from its Hessian operator.

    Args:
        parameters: As for `HessianOperator`.
        output: Network output of a batch.
        batches: As for `HessianOperator`; read once here to freeze the outputs (that many numbers are kept).
        coordinates: As for `HessianOperator`.
        is_sharded: As for `HessianOperator`.

    Returns:
        The operator.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        frozen = [output(batch).values.detach().clone() for batch, _ in batches]

    def loss(pair: tuple[Tensor, Any]) -> Tensor:
        before, batch = pair
        now = output(batch)
        return now.half_square(now.values - before, before)

    pairs = _WithFrozen(batches, frozen)
    return HessianOperator(parameters, loss, pairs, coordinates=coordinates, is_sharded=is_sharded)


class _WithFrozen:
    """Batches with their frozen outputs."""

    def __init__(self, batches: Iterable[tuple[Any, int]], frozen: list[Tensor]) -> None:
        self._batches, self._frozen = batches, frozen

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Any], int]]:
        for values, (batch, num) in zip(self._frozen, self._batches, strict=True):
            yield (values, batch), num
