"""Distribution of attention weights in units of uniform attention."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

EDGES = tuple(-4.125 + 0.25 * i for i in range(34))
"Edges of the bins of log10(weight x number of keys), 0 in the middle of one; what lies outside is in the end bins."


def histogram(
    log_weights: Float[Tensor, "batch head query key"],
) -> tuple[Float[Tensor, "batch bin"], Float[Tensor, "batch bin"]]:
    """How many weights of an image, and how much of their mass, lie in each bin of log10(weight x number of keys).

    In these units uniform attention is 0 whatever the number of keys.

    Args:
        log_weights: Logarithms of attention that sums to 1 over ``key``; -inf for masked keys, which are left out.

    Returns:
        Share of the weights and share of the mass per bin, over all heads and queries; each sums to 1. Float64.
    """
    counts, mass = histogram_sums(log_weights)
    return counts / counts.sum(1, keepdim=True), mass / mass.sum(1, keepdim=True)


def histogram_sums(
    log_weights: Float[Tensor, "batch head query key"],
) -> tuple[Float[Tensor, "batch bin"], Float[Tensor, "batch bin"]]:
    """As `histogram` before the division, so that chunks of queries can be added up.

    Args:
        log_weights: As for `histogram`.

    Returns:
        Number of weights and their mass per bin.
    """
    logs = log_weights.double()
    is_valid = ~logs.isneginf()
    count = is_valid.sum(-1, keepdim=True).double()
    edges = torch.tensor(EDGES[1:-1], dtype=torch.float64, device=logs.device)
    bins = torch.bucketize((logs + count.log()) / math.log(10), edges, right=True).flatten(1)
    counts, mass = (
        values.new_zeros(len(logs), len(EDGES) - 1).scatter_add_(1, bins, values.flatten(1))
        for values in (is_valid.double(), logs.exp())
    )
    return counts, mass
