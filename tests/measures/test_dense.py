"""Dense Hessian by products: against a quadratic form, in chunks that do not divide it, and what does not fit."""

import pytest
import torch

from ssat_probe.measures.dense import dense
from ssat_probe.measures.hessian import HessianOperator


def quadratic(matrix: torch.Tensor) -> HessianOperator:
    point = torch.ones(len(matrix), dtype=torch.float64, requires_grad=True)
    return HessianOperator({"point": point}, lambda batch: point @ matrix @ point / 2, [(None, 1)])


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_dense_hessian_of_a_quadratic_form_is_its_matrix(chunk):
    matrix = torch.randn(7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    matrix = matrix + matrix.T
    torch.testing.assert_close(dense(quadratic(matrix), chunk=chunk), matrix, rtol=0, atol=1e-14)


def test_dense_hessian_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"got 2 parameters .* At most 1 parameters fit"):
        dense(quadratic(torch.eye(2, dtype=torch.float64)), max_bytes=16)
