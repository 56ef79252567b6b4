"""Exact spectrum against matrices known in closed form; costs told before, refusals that say what fits."""

import numpy as np
import pytest
import torch

from ssat_probe.measures.exact import CHUNKS, cost, exact_spectrum, fastest_chunk
from ssat_probe.measures.hessian import HessianOperator


def quadratic(matrix: torch.Tensor, **names: slice) -> HessianOperator:
    """Operator of ½ θᵀAθ, whose Hessian is A; the parameters are pieces of θ."""
    names = names or {"theta": slice(None)}
    theta = torch.zeros(len(matrix), dtype=matrix.dtype)
    pieces = {name.replace("__", "."): torch.nn.Parameter(theta[place].clone()) for name, place in names.items()}

    def loss(_: None) -> torch.Tensor:
        whole = torch.cat(list(pieces.values()))
        return whole @ matrix @ whole / 2

    return HessianOperator(pieces, loss, [(None, 3)])


def symmetric(size: int, seed: int = 0) -> torch.Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return matrix + matrix.T


def test_all_eigenvalues_of_a_known_matrix():
    matrix = symmetric(131)
    told: list[int] = []
    found = exact_spectrum(quadratic(matrix), on_step=told.append)
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(matrix.numpy()), atol=1e-12)
    assert found.asymmetry < 1e-14
    assert told[-1] == 131
    assert found.cost.num_parameters == 131
    assert found.cost.seconds > 0


def test_the_chunk_is_one_of_those_tried():
    chunk, each = fastest_chunk(quadratic(symmetric(31)))
    assert chunk in CHUNKS
    assert each > 0


def test_symmetrising_in_bands_is_the_mean_with_the_transpose():
    from ssat_probe.measures.exact import _symmetrise

    matrix = np.random.default_rng(3).standard_normal((29, 29))
    mean, off = (matrix + matrix.T) / 2, np.abs(matrix - matrix.T).max() / np.abs(matrix).max()
    assert _symmetrise(matrix, rows=7) == pytest.approx(off)
    np.testing.assert_array_equal(matrix, mean)


def test_cost_counts_bytes_and_grows_with_the_size():
    (small, _), (large, _) = cost(quadratic(symmetric(61))), cost(quadratic(symmetric(601)))
    assert large.num_bytes == 16 * 601**2
    assert large.num_parameters == 601
    assert 0 < small.seconds < large.seconds


def test_refusal_for_memory_names_parts_that_fit():
    one = quadratic(symmetric(47), body__a=slice(0, 30), head__w=slice(30, 42), head__b=slice(42, 47))
    with pytest.raises(
        ValueError, match=r"got 47 parameters that need .* At most 25 parameters fit.*'head\.\*' \(17\)"
    ):
        exact_spectrum(one, max_bytes=16 * 25**2)
    assert one.num_products == 0


def test_refusal_for_time_names_how_many_fit():
    with pytest.raises(ValueError, match=r"must take at most 1e-09 s, got an estimate of .* for 47 parameters"):
        exact_spectrum(quadratic(symmetric(47)), max_seconds=1e-9)


def test_float32_is_refused():
    with pytest.raises(ValueError, match=r"needs a model in float64, got a machine epsilon of 1\.2e-07"):
        exact_spectrum(quadratic(symmetric(7).float()))
