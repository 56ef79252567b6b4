"""Landscapes against a quadratic that is known in closed form; what evaluation leaves behind; scalars of grids."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from ssat_probe.measures.landscape import (
    barrier,
    convex_share,
    placed,
    roughness,
    second_difference,
    share_below,
    values_at,
    worst_case,
)

SIZE = 7


class Quadratic(nn.Module):
    """(θ - c)ᵀ A (θ - c) / 2 + 3, of two parameters in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        square = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
        self.matrix = square @ square.T
        self.lowest = torch.randn(SIZE, generator=generator, dtype=torch.float64)
        self.one = nn.Parameter(torch.randn(2, 2, generator=generator, dtype=torch.float64))
        self.two = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))

    def at(self, place: torch.Tensor) -> torch.Tensor:
        away = place - self.lowest
        return away @ self.matrix @ away / 2 + 3

    def forward(self) -> torch.Tensor:
        return self.at(torch.cat([self.one.reshape(-1), self.two]))

    def values(self) -> np.ndarray:
        return np.array([float(self())])


@pytest.fixture
def model() -> Quadratic:
    return Quadratic()


@pytest.fixture
def axes() -> torch.Tensor:
    return torch.randn(2, SIZE, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def origin_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_the_surface_of_a_quadratic_is_its_closed_form(model: Quadratic, axes: torch.Tensor) -> None:
    origin = origin_of(model)
    grid = list(itertools.product(np.linspace(-1, 1, 5), np.linspace(-2, 2, 3)))
    weights = np.array([[1.0, x, y] for x, y in grid])
    found = values_at(dict(model.named_parameters()), model.values, [origin, *axes], weights)[:, 0]
    gradient, curvature = axes @ model.matrix @ (origin - model.lowest), (axes @ model.matrix @ axes.T).numpy()
    for (x, y), value in zip(grid, found, strict=True):
        at = np.array([x, y])
        assert value == pytest.approx(float(model.at(origin)) + gradient.numpy() @ at + at @ curvature @ at / 2)


def test_the_ellipse_of_the_hessian_is_a_level_of_the_surface(model: Quadratic, axes: torch.Tensor) -> None:
    curvature = (axes @ model.matrix @ axes.T).numpy()
    lengths, turns = np.linalg.eigh(curvature)
    circle = np.stack([np.cos(t := np.linspace(0, 6, 11)), np.sin(t)])
    ellipse = (turns / np.sqrt(lengths)) @ circle  # where ½ xᵀ D x = ½
    weights = np.column_stack([np.ones(11), ellipse.T])
    found = values_at(dict(model.named_parameters()), model.values, [model.lowest, *axes], weights)
    assert found[:, 0] == pytest.approx(3.5)


def test_the_centre_is_exactly_the_loss_and_an_anchor_exactly_itself(model: Quadratic, axes: torch.Tensor) -> None:
    parameters = dict(model.named_parameters())
    weights = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    found = values_at(parameters, model.values, [origin_of(model), *axes], weights)[:, 0]
    assert found.tolist() == [float(model().detach()), float(model.at(axes[0])), float(model.at(axes[1]))]


def test_the_model_is_bit_for_bit_as_before(model: Quadratic, axes: torch.Tensor) -> None:
    before = {name: (p.data_ptr(), p.detach().clone(), id(p)) for name, p in model.named_parameters()}
    values_at(dict(model.named_parameters()), model.values, [origin_of(model), *axes], np.ones((3, 3)))
    for name, p in model.named_parameters():
        assert (p.data_ptr(), id(p)) == (before[name][0], before[name][2])
        assert torch.equal(p, before[name][1])


def test_the_model_is_bit_for_bit_as_before_also_after_an_exception(model: Quadratic, axes: torch.Tensor) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def broken() -> np.ndarray:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        values_at(dict(model.named_parameters()), broken, [origin_of(model), *axes], np.ones((3, 3)))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.one.requires_grad
    assert model.one.grad is None


def test_what_is_done_is_not_done_again_and_nan_stays_nan(model: Quadratic) -> None:
    seen: list[int] = []
    done = {1: np.array([np.nan])}
    found = values_at(
        dict(model.named_parameters()), model.values, [origin_of(model)], np.ones((3, 1)), done=done,
        on_point=lambda number, _: seen.append(number),
    )  # fmt: skip
    assert seen == [0, 2]
    assert np.isnan(found[:, 0]).tolist() == [False, True, False]


def test_parameters_of_two_dtypes_are_refused() -> None:
    mixed = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.float64)}
    with pytest.raises(ValueError, match="one dtype on one device, got 2 kinds"), placed(mixed):
        pass


def test_second_difference_is_the_curvature_of_a_quadratic(model: Quadratic, axes: torch.Tensor) -> None:
    curvature = float(axes[0] @ model.matrix @ axes[0])
    found = second_difference(lambda x: float(model.at(origin_of(model) + x * axes[0])), curvature)
    assert found.error < 1e-6


def test_second_difference_shows_a_wrong_curvature(model: Quadratic, axes: torch.Tensor) -> None:
    wrong = 1.5 * float(axes[0] @ model.matrix @ axes[0])
    found = second_difference(lambda x: float(model.at(origin_of(model) + x * axes[0])), wrong)
    assert found.error == pytest.approx(1 / 3, rel=1e-5)
    assert np.isnan(second_difference(lambda x: 1.0, 0.0).error)


def grid_of(function) -> np.ndarray:  # type: ignore[no-untyped-def]
    x, y = np.meshgrid(np.linspace(-1, 1, 11), np.linspace(-1, 1, 13))
    return function(x, y)


def test_a_bowl_is_smooth_and_convex_and_a_saddle_is_not() -> None:
    bowl = grid_of(lambda x, y: x**2 + x * y + y**2)
    saddle = grid_of(lambda x, y: x**2 - y**2)
    assert roughness(bowl) == pytest.approx(0)
    assert convex_share(bowl, (1 / 6, 0.2)) == 1
    assert convex_share(saddle, (1 / 6, 0.2)) == 0
    assert convex_share(grid_of(lambda x, y: x**2 + 3 * x * y + y**2), (1 / 6, 0.2)) == 0  # by the mixed term alone


def test_half_of_a_cubic_is_convex() -> None:
    assert convex_share(grid_of(lambda x, y: x**3 + y**2), (1 / 6, 0.2)) == pytest.approx(5 / 9)  # x = 0 counts


def test_roughness_of_a_zigzag_is_counted_by_hand() -> None:
    assert roughness(np.array([[3.0, 0.0, 1.0, 0.0, 3.0]])) == pytest.approx(8 / 6 - 1)
    assert np.isnan(roughness(np.array([[3.0, np.nan, 3.0]])))
    assert np.isnan(roughness(np.ones((3, 3))))


def test_values_that_are_not_finite_are_left_out_or_not_below() -> None:
    holes = grid_of(lambda x, y: np.where(x > 0.9, np.nan, x**2 + y**2))
    assert convex_share(holes) == 1
    assert np.isnan(convex_share(np.full((3, 3), np.nan)))
    assert share_below(np.array([[0.0, 1.0], [np.nan, 2.0]]), 1.0) == 0.5


def test_the_barrier_of_a_quartic_between_two_minima_is_its_hill() -> None:
    along = np.linspace(0, 1, 21)
    assert barrier(along, 16 * (along * (1 - along)) ** 2 + along) == pytest.approx(1)
    assert barrier(along, (along - 0.3) ** 2) == 0
    assert np.isnan(barrier(along, np.full(21, np.nan)))


def test_worst_case_of_a_quadratic_around_its_minimum_is_its_largest_eigenvalue(model: Quadratic) -> None:
    def found(displacement: torch.Tensor) -> tuple[float, torch.Tensor]:
        return float(model.at(model.lowest + displacement)), model.matrix @ displacement

    start = torch.ones(SIZE, dtype=torch.float64)
    first, worst = worst_case(found, 0.1, [start], steps=60)
    largest = float(torch.linalg.eigvalsh(model.matrix)[-1])
    assert worst - 3 == pytest.approx(0.005 * largest, rel=1e-3)
    assert first == pytest.approx(float(model.at(model.lowest + 0.1 * start / start.norm())))
