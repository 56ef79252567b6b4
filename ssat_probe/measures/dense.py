"""Dense Hessian of a small model by products with unit vectors, whatever the operator is: an oracle."""

import torch
from jaxtyping import Float64
from torch import Tensor

from ssat_probe.measures.hessian import CHUNK, HessianOperator

DENSE_BYTES = 2 * 2**30  # largest dense Hessian that is assembled without being asked


def dense(
    operator: HessianOperator, *, chunk: int = CHUNK, max_bytes: int = DENSE_BYTES
) -> Float64[Tensor, "parameter parameter"]:
    """Whole Hessian by products with unit vectors.

    Args:
        operator: Whose Hessian.
        chunk: Vectors per batched product; more is faster and needs more memory.
        max_bytes: Refuse to allocate more than this.

    Returns:
        Row i is the product with unit vector i; symmetric up to rounding in the dtype of the model, not symmetrised.

    Raises:
        ValueError: If the matrix would take more than ``max_bytes``.
    """
    size = operator.size
    if 8 * size**2 > max_bytes:
        raise ValueError(
            f"A dense Hessian must fit into {max_bytes / 2**30:.3g} GiB, got {size} parameters that need "
            f"{8 * size**2 / 2**30:.3g} GiB. At most {int((max_bytes / 8) ** 0.5)} parameters fit: select fewer."
        )
    matrix = torch.zeros(size, size, dtype=torch.float64, device=operator.device)
    with operator:
        for start in range(0, size, chunk):
            stop = min(start + chunk, size)
            units = torch.zeros(stop - start, size, dtype=torch.float64, device=operator.device)
            units.diagonal(start).fill_(1)
            matrix[start:stop] = operator.products(units)
    return matrix
