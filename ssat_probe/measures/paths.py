"""Between points of parameter space: planes through three, planes of many, curves with a low loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ssat_probe.measures.landscape import placed

Anchors = Float64[Tensor, "anchor parameter"]


@dataclass(frozen=True)
class Plane:
    """Two orthonormal directions as weights of anchors, and where the anchors lie."""

    directions: Float64[np.ndarray, "2 anchor"]
    "Direction i is the sum of these weights times the anchors; they add up to 0."
    origin: Float64[np.ndarray, " anchor"]
    "Weights of the origin; they add up to 1."
    coordinates: Float64[np.ndarray, "anchor 2"]
    "Euclidean."
    explained: tuple[float, float]
    "Share of the squared distances from the origin along either direction."
    residuals: Float64[np.ndarray, " anchor"]
    "Distance of each anchor from the plane."

    def weights(self, x: float, y: float) -> Float64[np.ndarray, " anchor"]:
        """Weights of the point at these coordinates.

        Args:
            x: Along the first direction.
            y: Along the second.

        Returns:
            For `values_at`; they add up to 1.
        """
        return self.origin + x * self.directions[0] + y * self.directions[1]


def plane_of_three(anchors: Anchors) -> Plane:
    """Plane through three points: the first is the origin, the second lies on the first axis.

    Args:
        anchors: Three.

    Returns:
        Residuals are 0.

    Raises:
        ValueError: If there are not three, or they lie on a line.
    """
    if len(anchors) != 3:
        raise ValueError(f"A plane goes through 3 points, got {len(anchors)}. Give three checkpoints.")
    gram = _gram(anchors - anchors[0])[1:, 1:]
    length = np.sqrt(gram[0, 0])
    height_squared = gram[1, 1] - (gram[0, 1] / length) ** 2 if length else 0.0
    if height_squared <= 1e-12 * gram[1, 1]:
        raise ValueError("Three points of a plane must not lie on a line, got no area between them. Give three others.")
    along, height = gram[0, 1] / length, np.sqrt(height_squared)
    first = np.array([-1, 1, 0]) / length
    second = (np.array([-1, 0, 1]) - along * first) / height
    coordinates = np.array([[0, 0], [length, 0], [along, height]])
    shares = (coordinates**2).sum(axis=0) / (coordinates**2).sum()
    return Plane(
        np.stack([first, second]), np.array([1.0, 0, 0]), coordinates, (float(shares[0]), float(shares[1])), np.zeros(3)
    )


def principal_plane(anchors: Anchors) -> Plane:
    """Plane of the first two principal components of many points, through their mean.

    Args:
        anchors: At least three.

    Returns:
        With the share of the variance along either direction, and what each point has off the plane. Signs: the last
        point has no negative coordinate.

    Raises:
        ValueError: If there are fewer than three, or they lie on a line.
    """
    num = len(anchors)
    if num < 3:
        raise ValueError(f"A plane of principal components needs at least 3 points, got {num}. Give more checkpoints.")
    centred = anchors - anchors.mean(dim=0)
    values, vectors = np.linalg.eigh(_gram(centred))
    values, vectors = np.maximum(values[::-1][:2], 0), vectors[:, ::-1][:, :2]
    total = float((centred**2).sum())
    if values[1] <= 1e-12 * max(total, 1e-300):
        raise ValueError("The points of a plane must not lie on a line, got none off it. Give other checkpoints.")
    vectors = vectors * np.where(vectors[-1] < 0, -1, 1)
    coordinates = vectors * np.sqrt(values)
    directions = (vectors / np.sqrt(values)).T
    directions = directions - directions.sum(axis=1, keepdims=True) / num  # of centred anchors, so of the anchors
    squares = (centred**2).sum(dim=1).cpu().numpy() - (coordinates**2).sum(axis=1)
    shares = values / total
    return Plane(
        directions,
        np.full(num, 1 / num),
        coordinates,
        (float(shares[0]), float(shares[1])),
        np.sqrt(np.maximum(squares, 0)),
    )


def bend(
    parameters: Mapping[str, Tensor],
    loss: Callable[[Any], Float[Tensor, ""]],
    batches: Sequence[Any],
    ends: tuple[Float64[Tensor, " parameter"], Float64[Tensor, " parameter"]],
    *,
    steps: int,
    rate: float,
    seed: int = 0,
) -> Float64[Tensor, " parameter"]:
    """Control point of a quadratic Bézier curve between two points along which the mean loss is low.

    Each step takes one batch and one point of the curve, (1-t)² a + 2 t (1-t) c + t² b with uniform t, and moves c with
    Adam. It begins halfway, where the curve is the straight line.

    Args:
        parameters: What is moved; afterwards bit for bit as before.
        loss: Of one batch, differentiable.
        batches: Taken in a random order.
        ends: a and b.
        steps: Of Adam.
        rate: Its learning rate.
        seed: Of t and of the order.

    Returns:
        c.

    References:
        Garipov et al. (2018), arXiv 1802.10026, Eq. 2 and Sec. 3.
    """
    generator = np.random.default_rng(seed)
    control = torch.nn.Parameter((ends[0] + ends[1]) / 2)
    optimiser = torch.optim.Adam([control], lr=rate)
    with placed(parameters) as buffer, torch.enable_grad():
        for _ in range(steps):
            t = float(generator.random())
            batch = batches[int(generator.integers(len(batches)))]
            place = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * control.detach() + t**2 * ends[1]
            with torch.no_grad():
                buffer.copy_(place)
            gradients = torch.autograd.grad(loss(batch), list(parameters.values()), allow_unused=True)
            parts = [
                torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), gradients, strict=True)
            ]
            control.grad = 2 * t * (1 - t) * torch.cat([part.reshape(-1) for part in parts]).to(control)
            optimiser.step()
    return control.detach()


def bezier_weights(t: Float64[np.ndarray, " point"]) -> Float64[np.ndarray, "point 3"]:
    """Weights of start, control point and end on a quadratic Bézier curve.

    Args:
        t: In [0, 1].

    Returns:
        Rows that add up to 1.
    """
    return np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], axis=1)


def _gram(vectors: Anchors) -> np.ndarray:
    return (vectors @ vectors.T).cpu().numpy()
