"""Agreement of gradients against quadratics, whose gradients are known."""

import math

import pytest
import torch

from ssat_probe.measures.agreement import gradient_agreement


def test_cosine_of_two_quadratics_is_that_of_their_gradients_by_hand() -> None:
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.5, 4.0]], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([2.0, 5.0, 7.0], dtype=torch.float64)
    first = (scale * x.square()).sum() / 2 + 3 * y.sum()  # gradients scale * x and 3
    second = (x - 11).square().sum() / 2 + y.square().sum() / 2  # x - 11 and y
    got = gradient_agreement(first, second, [x, y])
    one = [2.0, -10.0, 21.0, 3.0, 3.0]
    other = [-10.0, -13.0, -8.0, 0.5, 4.0]
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    assert got.first_norm == pytest.approx(math.hypot(*one), rel=1e-14)
    assert got.second_norm == pytest.approx(math.hypot(*other), rel=1e-14)
    assert got.cosine == pytest.approx(dot / math.hypot(*one) / math.hypot(*other), rel=1e-14)


@pytest.mark.parametrize(("factor", "cosine"), [(3.0, 1.0), (-0.5, -1.0)])
def test_a_multiple_agrees_wholly_or_not_at_all(factor: float, cosine: float) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = x.square().sum()
    assert gradient_agreement(loss, factor * loss, [x]).cosine == pytest.approx(cosine)


def test_what_only_one_depends_on_is_left_out_and_nothing_keeps_a_gradient() -> None:
    shared, own, other, frozen = (torch.tensor(float(value), requires_grad=value < 5) for value in (1, 2, 3, 5))
    got = gradient_agreement(shared * own, shared * other * frozen, [shared, own, other, frozen])
    assert got == (1.0, 2.0, 15.0)
    assert all(value.grad is None for value in (shared, own, other))


def test_a_loss_that_does_not_pull_has_no_direction() -> None:
    x = torch.tensor([1.0], requires_grad=True)
    got = gradient_agreement((x - 1).square().sum(), x.sum(), [x])
    assert math.isnan(got.cosine)
    assert got.second_norm == 1
