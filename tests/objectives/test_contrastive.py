import math
from collections.abc import Callable

import pytest
import torch

from ssat_probe.network import build_encoder
from ssat_probe.objectives import behind_encoder
from ssat_probe.objectives.contrastive import TEMPERATURE, Objective, nt_xent

Make = Callable[..., tuple]
BATCH, DIM = 5, 7


def double_loop(first: torch.Tensor, second: torch.Tensor, temperature: float) -> float:
    """Chen et al. (2020), Eq. 1, term by term."""
    views = [[float(x) for x in view] for view in (*first, *second)]

    def similarity(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(views[i], views[j], strict=True))
        return dot / math.hypot(*views[i]) / math.hypot(*views[j])

    total = 0.0
    for i in range(len(views)):
        partner = (i + len(first)) % len(views)
        others = sum(math.exp(similarity(i, k) / temperature) for k in range(len(views)) if k != i)
        total -= math.log(math.exp(similarity(i, partner) / temperature) / others)
    return total / len(views)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_the_loss_is_that_of_a_double_loop(generator: Callable[[str], torch.Generator], temperature: float) -> None:
    first, second = torch.randn(2, BATCH, DIM, generator=generator("views"), dtype=torch.float64)
    got = float(nt_xent(first, second, temperature))
    assert got == pytest.approx(double_loop(first, second, temperature), rel=1e-12)
    assert float(nt_xent(3 * first, second / 5, temperature)) == pytest.approx(got, rel=1e-12)


def test_views_all_alike_cost_the_log_of_their_number_and_perfect_ones_next_to_nothing() -> None:
    alike = torch.ones(BATCH, DIM, dtype=torch.float64)
    assert float(nt_xent(alike, alike, 0.3)) == pytest.approx(math.log(2 * BATCH - 1), rel=1e-12)
    apart = torch.eye(BATCH, dtype=torch.float64)
    expected = math.log(1 + (2 * BATCH - 2) * math.exp(-1 / 0.05))
    assert float(nt_xent(apart, apart, 0.05)) == pytest.approx(expected, rel=1e-6)


def test_the_objective_contrasts_the_projections_of_two_views(
    make_recipe: Make, generator: Callable[[str], torch.Generator]
) -> None:
    recipe, facts = make_recipe(method="ssl_ft", task="contrastive")
    encoder = build_encoder(recipe, facts)
    head = behind_encoder(recipe, facts, encoder)
    assert head is not None
    objective = Objective(recipe, encoder.double(), head.double())
    images, other = torch.randn(2, BATCH, 1, 8, 8, generator=generator("images"), dtype=torch.float64)
    losses = objective(images, torch.zeros(BATCH, dtype=torch.int64), torch.rand(BATCH, 16), other)
    with torch.no_grad():
        views = [head(encoder.encode(view).class_token) for view in (images, other)]
    assert float(losses.total.detach()) == pytest.approx(double_loop(*views, TEMPERATURE), rel=1e-10)
    assert losses.auxiliary == losses.total
    assert losses.reconstruction is None
    known = objective(
        images, torch.zeros(BATCH, dtype=torch.int64), torch.rand(BATCH, 16), other, encoder.encode(images)
    )
    assert torch.equal(known.total, losses.total)
    losses.total.backward()
    without = {name for name, parameter in objective.named_parameters() if parameter.grad is None}
    assert without == {"encoder.head.weight", "encoder.head.bias", "encoder.pos_embed"}


def test_a_head_of_another_kind_is_refused(make_recipe: Make) -> None:
    recipe, facts = make_recipe()
    encoder = build_encoder(recipe, facts)
    with pytest.raises(ValueError, match="The contrastive task needs its Head, got NoneType"):
        Objective(recipe, encoder, None)


def test_against_lightly(generator: Callable[[str], torch.Generator]) -> None:
    lightly = pytest.importorskip("lightly.loss")
    first, second = torch.randn(2, BATCH, DIM, generator=generator("views"), dtype=torch.float64)
    for temperature in (0.1, 0.5):
        expected = float(lightly.NTXentLoss(temperature=temperature)(first, second))
        assert float(nt_xent(first, second, temperature)) == pytest.approx(expected, rel=1e-12)
