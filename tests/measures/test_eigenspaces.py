"""Eigenspaces of known matrices, principal angles in closed form, chance."""

import numpy as np
import pytest
import torch

from ssat_probe.measures.eigenspaces import cosines, overlap, top_space
from ssat_probe.measures.lanczos import lanczos


def known(values: list[float], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T, basis


def test_top_space_is_that_of_the_largest_eigenvalues_within_its_error():
    matrix, basis = known([*np.linspace(-1, 1, 40).tolist(), 5.0, -7.0, 3.0, 2.0])
    for steps in (12, 20, 44):
        krylov = lanczos(matrix.__matmul__, 44, steps, with_basis=True)
        found = top_space(krylov, 3)
        true = basis[:, [40, 42, 43]].T
        sine = np.sqrt(max(1 - cosines(found.vectors, true).min() ** 2, 0.0))
        assert sine <= found.error + 1e-7
        torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(3, dtype=torch.float64))
    np.testing.assert_allclose(found.values, [5, 3, 2], rtol=1e-10)
    assert found.error < 1e-6


def test_cosines_of_planes_that_share_a_line():
    angle = 0.3
    one = torch.eye(5, dtype=torch.float64)[[0, 1]]
    turned = np.cos(angle) * torch.eye(5, dtype=torch.float64)[1] + np.sin(angle) * torch.eye(5, dtype=torch.float64)[3]
    other = torch.stack([turned, torch.eye(5, dtype=torch.float64)[0]])
    np.testing.assert_allclose(cosines(one, other), [1, np.cos(angle)], atol=1e-12)
    assert overlap(one, other) == pytest.approx((1 + np.cos(angle) ** 2) / 2)
    assert overlap(one, one) == pytest.approx(1)
    assert overlap(one, torch.eye(5, dtype=torch.float64)[[2, 4]]) == 0


def test_chance_is_the_share_of_dimensions():
    generator = torch.Generator().manual_seed(1)
    one = torch.eye(41, dtype=torch.float64)[:3]
    found = []
    for _ in range(400):
        other = torch.linalg.qr(torch.randn(41, 3, generator=generator, dtype=torch.float64))[0].T
        found.append(overlap(one, other))
    assert np.mean(found) == pytest.approx(3 / 41, rel=0.1)


def test_a_run_without_its_basis_is_refused():
    matrix, _ = known([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="need the basis of the run, got none"):
        top_space(lanczos(matrix.__matmul__, 3, 2), 1)
