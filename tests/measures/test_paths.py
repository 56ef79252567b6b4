"""Planes and curves between points, against geometry and a loss whose valley is a circle."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from ssat_probe.measures.landscape import barrier, values_at
from ssat_probe.measures.paths import bend, bezier_weights, plane_of_three, principal_plane


def points(generator: Callable[[str], torch.Generator], num: int, size: int = 11) -> torch.Tensor:
    return torch.randn(num, size, generator=generator("points"), dtype=torch.float64)


def test_the_plane_of_three_points_holds_them_and_keeps_their_distances(generator: Callable) -> None:
    anchors = points(generator, 3)
    plane = plane_of_three(anchors)
    for number, (x, y) in enumerate(plane.coordinates):
        torch.testing.assert_close(torch.from_numpy(plane.weights(x, y)) @ anchors, anchors[number])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = float((anchors[i] - anchors[j]).norm())
        assert np.linalg.norm(plane.coordinates[i] - plane.coordinates[j]) == pytest.approx(expected)


def test_three_points_on_a_line_or_fewer_make_no_plane(generator: Callable) -> None:
    one = points(generator, 1)[0]
    with pytest.raises(ValueError, match="must not lie on a line"):
        plane_of_three(torch.stack([one, 2 * one, 3 * one]))
    with pytest.raises(ValueError, match="goes through 3 points, got 2"):
        plane_of_three(points(generator, 2))


def test_principal_plane_is_that_of_the_singular_values(generator: Callable) -> None:
    anchors = points(generator, 5)
    plane = principal_plane(anchors)
    centred = (anchors - anchors.mean(0)).numpy()
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    assert plane.explained == pytest.approx(tuple(values[:2] ** 2 / (values**2).sum()))
    np.testing.assert_allclose(np.abs(plane.coordinates), np.abs(left[:, :2] * values[:2]))
    off = centred - centred @ right[:2].T @ right[:2]
    np.testing.assert_allclose(plane.residuals, np.linalg.norm(off, axis=1))
    place = torch.from_numpy(plane.weights(0.3, -2.0)) @ anchors - anchors.mean(0)
    assert float(place.norm()) == pytest.approx(np.hypot(0.3, 2.0))
    assert (plane.coordinates[-1] >= 0).all()


def test_points_in_a_plane_have_nothing_off_it(generator: Callable) -> None:
    plane = principal_plane(torch.randn(7, 2, generator=generator("flat"), dtype=torch.float64))
    assert sum(plane.explained) == pytest.approx(1)
    assert plane.residuals == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="at least 3 points, got 2"):
        principal_plane(points(generator, 2))
    with pytest.raises(ValueError, match="must not lie on a line"):
        principal_plane(torch.arange(4, dtype=torch.float64)[:, None] * points(generator, 1))


class Ring(nn.Module):
    """Loss (‖θ‖² - 1)²: every point of the circle is a minimum, and no straight line between two of them is."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))

    def loss(self, _: object = None) -> torch.Tensor:
        return (self.place.square().sum() - 1) ** 2


def test_the_straight_line_has_the_known_barrier_and_the_curve_goes_around_it() -> None:
    model = Ring()
    parameters = dict(model.named_parameters())
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    t = np.linspace(0, 1, 41)

    def values() -> np.ndarray:
        return np.array([float(model.loss().detach())])

    straight = values_at(parameters, values, ends, np.stack([1 - t, t], axis=1))[:, 0]
    assert barrier(t, straight) == pytest.approx(0.25)
    control = bend(parameters, model.loss, [None], ends, steps=300, rate=0.02)
    around = values_at(parameters, values, [ends[0], control, ends[1]], bezier_weights(t))[:, 0]
    assert barrier(t, around) < 0.02
    assert (around[0], around[-1]) == (straight[0], straight[-1])
    assert torch.equal(model.place, ends[0])
    assert model.place.grad is None
