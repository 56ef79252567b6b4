"""Ends of mini-batches against dense Hessians; NEP and APE; power iteration against PyHessian's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssat_probe.measures.batches import average_positive, batch_ends, negative_proportion, signed_power
from ssat_probe.measures.dense import dense
from ssat_probe.measures.hessian import HessianOperator


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def pairs() -> list:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(17, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (17,), generator=generator)
    return [((x, y), len(x)) for x, y in zip(images.split(7), labels.split(7), strict=True)]


def test_ends_are_those_of_each_batch_alone(net):
    parameters = dict(net.named_parameters())

    def loss(batch: tuple) -> torch.Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    found = batch_ends(parameters, loss, pairs(), steps=60)
    assert found.sizes == (7, 7, 3)
    for place, pair in enumerate(pairs()):
        values = torch.linalg.eigvalsh(dense(HessianOperator(parameters, loss, [pair]))).numpy()
        assert found.largest[place] == pytest.approx(values[-1], rel=1e-9)
        assert found.smallest[place] == pytest.approx(values[0], rel=1e-9)
    assert found.converged.all()
    assert found.num_products <= 3 * 60


def test_nep_and_ape_by_hand():
    values = np.array([3.0, -1.0, 5.0, -7.0, 1.0])
    assert negative_proportion(values) == pytest.approx(0.4)
    assert average_positive(values) == pytest.approx(3.0)
    assert np.isnan(average_positive(values[[1, 3]]))


def test_power_iteration_finds_the_largest_in_absolute_value_with_sign():
    basis = torch.linalg.qr(torch.randn(23, 23, generator=torch.Generator().manual_seed(0)).double())[0]
    values = torch.cat([torch.tensor([-9.0, 6.0, -3.0]).double(), torch.linspace(-1, 1, 20).double()])
    matrix = basis @ torch.diag(values) @ basis.T
    found, spent = signed_power(matrix.__matmul__, 23, top=3, tolerance=1e-9, max_steps=500)
    np.testing.assert_allclose(found, [-9, 6, -3], rtol=1e-5)
    assert spent < 1500


def test_power_iteration_stops_where_pyhessian_stops():
    values = torch.tensor([1.0, 0.999, 0.998]).double()
    found, spent = signed_power(lambda x: values * x, 3)
    assert spent == 2
    assert 0.997 < found[0] <= 1
