"""PyHessian through our operator: its numbers are the exact ones, and the model is as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssat_probe.measures.hessian import HessianOperator, dense
from ssat_probe.measures.peers import pyhessian


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def operator(net: nn.Module, **options: object) -> HessianOperator:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(17, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (17,), generator=generator)
    pairs = [((x, y), len(x)) for x, y in zip(images.split(7), labels.split(7), strict=True)]
    return HessianOperator(dict(net.named_parameters()), lambda b: F.cross_entropy(net(b[0]), b[1]), pairs, **options)


def test_largest_and_trace_are_those_of_the_dense_hessian(net):
    matrix = dense(operator(net))
    values = torch.linalg.eigvalsh(matrix)
    found = pyhessian(operator(net), top=2, tolerance=1e-8)
    order = values[values.abs().argsort(descending=True)][:2].numpy()
    assert found.eigenvalues == pytest.approx(tuple(order), rel=1e-3)
    assert found.eigenvalue_products > 2


def test_its_trace_stops_after_two_vectors_where_it_is_negative(net):
    """Its relative stop divides by the signed mean; a reason not to take the trace of an indefinite matrix from it."""
    assert float(dense(operator(net)).trace()) < 0
    assert pyhessian(operator(net), top=1).trace_products == 2


def test_model_and_random_state_are_as_found(net):
    net[0].weight.grad = torch.ones_like(net[0].weight)
    kept = net[0].weight.grad
    states = torch.get_rng_state(), torch.get_default_dtype()
    one = HessianOperator({"3.weight": net[3].weight}, operator(net).loss, operator(net).batches)
    pyhessian(one, top=1, bystanders=net.parameters())
    assert net[0].weight.grad is kept
    assert bool((kept == 1).all())
    assert net[3].weight.grad is None
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.get_default_dtype() == states[1]


def test_a_selection_of_coordinates_is_refused(net):
    with pytest.raises(ValueError, match="needs whole parameters, got a selection of 4 coordinates"):
        pyhessian(operator(net, coordinates=torch.arange(4)))
