"""Whether two losses pull the same parameters the same way."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Agreement(NamedTuple):
    """Of the gradients of two losses."""

    cosine: float
    "In [-1, 1]: 1 where both pull the same way, -1 where one undoes the other; NaN where one does not pull."
    first_norm: float
    second_norm: float


def gradient_agreement(
    first: Float[Tensor, ""],
    second: Float[Tensor, ""],
    parameters: Iterable[Tensor],
    summed: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Agreement:
    """Cosine between the gradients of two losses, and their norms, over the parameters that both depend on.

    Args:
        first: With its graph, which is kept.
        second: With its graph, which is kept.
        parameters: Shared or not; those that one loss does not depend on, such as a head, are left out.
        summed: Makes each gradient that of a whole, where both losses are a part's.

    Returns:
        Of the unweighted losses, summed in float64.

    References:
        Du et al. (2018), https://arxiv.org/abs/1812.02224, use this cosine to tell when an auxiliary task helps.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True) for loss in (first, second)]
    dot = first_square = second_square = 0.0
    for one, other in zip(*gradients, strict=True):
        if one is not None and other is not None:
            one, other = summed(one).double(), summed(other).double()
            dot += float((one * other).sum())
            first_square += float(one.square().sum())
            second_square += float(other.square().sum())
    product = (first_square * second_square) ** 0.5
    return Agreement(dot / product if product else float("nan"), first_square**0.5, second_square**0.5)
