"""Loss landscape: values at many points of parameter space, and numbers that say what a picture of them shows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

_STEPS = (0.1, 0.03, 0.01, 0.003, 0.001)  # of second differences, in units explained there; tuned

Floats = Float64[np.ndarray, " point"]
Grid = Float64[np.ndarray, "row column"]


@contextmanager
def placed(parameters: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Let parameters live in one flat buffer for the time of the block.

    Their own memory is never written to, so that they are bit for bit what they were when the block ends, however it
    ends.

    Args:
        parameters: Of one dtype, on one device.

    Yields:
        The buffer, filled with their values; what is written into it is what the model computes with.

    Raises:
        ValueError: If the parameters have different dtypes or devices.
    """
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters.values()}
    if len(kinds) != 1:
        raise ValueError(
            f"A landscape needs parameters of one dtype on one device, got {len(kinds)} kinds. "
            "Convert the model with .float() or .double() first."
        )
    found = [parameter.data for parameter in parameters.values()]
    buffer = torch.cat([data.reshape(-1) for data in found])
    try:
        parts = buffer.split([data.numel() for data in found])
        for parameter, part in zip(parameters.values(), parts, strict=True):
            parameter.data = part.view(parameter.shape)
        yield buffer
    finally:
        for parameter, data in zip(parameters.values(), found, strict=True):
            parameter.data = data


def values_at(
    parameters: Mapping[str, Tensor],
    values: Callable[[], Float64[np.ndarray, " value"]],
    anchors: Sequence[Tensor],
    weights: Float64[np.ndarray, "point anchor"],
    *,
    done: Mapping[int, Float64[np.ndarray, " value"]] | None = None,
    on_point: Callable[[int, Float64[np.ndarray, " value"]], None] | None = None,
) -> Float64[np.ndarray, "point value"]:
    """Values of a model at weighted sums of anchors: around a point, on a line between two, on a plane or a curve.

    A weight of 0 leaves its anchor out and one of 1 takes it as it is: where one weight is 1 and the others are 0, the
    parameters are exactly that anchor.

    Args:
        parameters: What is moved; afterwards, also after an exception, bit for bit as before.
        values: Called at each point, without gradients.
        anchors: Flat vectors, in the order of the parameters.
        weights: One row per point.
        done: Values of points that were measured before; they are not measured again.
        on_point: Told the number of each point and its values, for progress, saving and estimates.

    Returns:
        One row per point; what is not finite stays so.
    """
    result: list[np.ndarray] = []
    with placed(parameters) as buffer, torch.no_grad():
        own = [anchor.to(buffer) for anchor in anchors]
        for number, row in enumerate(weights):
            if done is not None and number in done:
                result.append(done[number])
                continue
            parts = [(weight, anchor) for weight, anchor in zip(row.tolist(), own, strict=True) if weight]
            if not parts:
                buffer.zero_()
            for place, (weight, anchor) in enumerate(parts):
                if place:
                    buffer.add_(anchor, alpha=weight)
                else:
                    torch.mul(anchor, weight, out=buffer)
            result.append(values())
            if on_point is not None:
                on_point(number, result[-1])
    return np.array(result)


@dataclass(frozen=True)
class SecondDifference:
    """Curvature along a direction, measured by three losses, beside dᵀHd."""

    curvature: float
    "dᵀHd, from a Hessian-vector product."
    difference: float
    "(L(h) - 2 L(0) + L(-h)) / h², at the step that agrees best."
    step: float

    @property
    def error(self) -> float:
        """Relative to dᵀHd; NaN where that is zero."""
        return abs(self.difference / self.curvature - 1) if self.curvature else float("nan")


def second_difference(loss: Callable[[float], float], curvature: float) -> SecondDifference:
    """Check of a landscape against the Hessian, along one axis.

    Steps are tried from 0.001 to 0.1 times the length over which the curvature alone would raise the loss by itself (or
    by 1, if the loss is larger): large enough for the rounding of losses, small enough for the quadratic.

    Args:
        loss: Loss at a coordinate along the axis.
        curvature: dᵀHd of the same axis, in units of the coordinate.

    Returns:
        The step that agrees best, with its difference.
    """
    centre = loss(0.0)
    unit = np.sqrt(2 * min(abs(centre) + 1e-3, 1.0) / abs(curvature)) if curvature else 1.0
    found = []
    for share in _STEPS:
        step = share * float(unit)
        difference = (loss(step) - 2 * centre + loss(-step)) / step**2
        found.append(SecondDifference(curvature, difference, step))
    return min(found, key=lambda one: abs(one.difference - curvature))


def roughness(surface: Grid) -> float:
    """How much rows and columns go up and down beyond falling once and rising once.

    Total variation of all rows and columns, over what a single valley with the same ends and the same lowest value
    has, minus 1.

    Args:
        surface: Values on a grid; one row for a line.

    Returns:
        0 if every row and column falls to one valley and rises again; NaN where a value is not finite or all are equal.
    """
    variation, valley = 0.0, 0.0
    for lines in (surface, surface.T):
        if lines.shape[1] < 2:
            continue
        variation += float(np.abs(np.diff(lines, axis=1)).sum())
        lowest = lines.min(axis=1)
        valley += float((lines[:, 0] - lowest).sum() + (lines[:, -1] - lowest).sum())
    return variation / valley - 1 if np.isfinite(variation) and valley > 0 else float("nan")


def convex_share(surface: Grid, steps: tuple[float, float] = (1.0, 1.0)) -> float:
    """Share of the inner grid points at which the surface is locally convex.

    Args:
        surface: Values on a regular grid.
        steps: Distance of neighbours along the rows' axis and the columns' axis.

    Returns:
        Between 0 and 1: where both eigenvalues of the matrix of second differences are at least 0 up to rounding;
        points with a neighbour that is not finite are left out, and without any left it is NaN.
    """
    inner = surface[1:-1, 1:-1]
    along_rows = (surface[2:, 1:-1] - 2 * inner + surface[:-2, 1:-1]) / steps[0] ** 2
    along_columns = (surface[1:-1, 2:] - 2 * inner + surface[1:-1, :-2]) / steps[1] ** 2
    mixed = (surface[2:, 2:] - surface[2:, :-2] - surface[:-2, 2:] + surface[:-2, :-2]) / (4 * steps[0] * steps[1])
    smallest = (along_rows + along_columns) / 2 - np.hypot((along_rows - along_columns) / 2, mixed)
    is_defined = np.isfinite(smallest)
    if not is_defined.any():
        return float("nan")
    rounding = 1e-12 * max(1.0, float(np.abs(surface[np.isfinite(surface)]).max())) / min(steps) ** 2
    return float((smallest[is_defined] >= -rounding).mean())


def share_below(surface: Grid, level: float) -> float:
    """Share of the grid points whose value is at most a level.

    Args:
        surface: Values on a grid.
        level: In their unit.

    Returns:
        Between 0 and 1; a value that is not finite is not below.
    """
    with np.errstate(invalid="ignore"):
        below: Bool[np.ndarray, "row column"] = surface <= level
    return float(below.mean())


def barrier(along: Floats, values: Floats) -> float:
    """Height of the barrier on a path: largest excess over the straight line between the values at its two ends.

    Args:
        along: Positions of the points, the first end first, in [0, 1].
        values: Losses there.

    Returns:
        In units of the loss, at least 0; NaN where a value is not finite.

    References:
        Frankle et al. (2020), arXiv 1912.05671, subtract the mean of both ends; the line: Entezari et al. (2022),
        arXiv 2110.06296.
    """
    return float((values - ((1 - along) * values[0] + along * values[-1])).max())


def worst_case(
    loss_and_gradient: Callable[[Tensor], tuple[float, Tensor]],
    radius: float,
    starts: Sequence[Tensor],
    steps: int = 4,
) -> tuple[float, float]:
    """Largest loss found within a ball, by ascent along the gradient from several starts.

    Args:
        loss_and_gradient: At a displacement (flat float64).
        radius: Of the ball, Euclidean.
        starts: Directions in which to begin, any length; the first is the gradient at the centre, as in SAM.
        steps: Further ascent steps from each start: to where the sphere's linear model is largest.

    Returns:
        Loss at the first start (SAM's step; Foret et al., 2021, Eq. 2), and the largest loss found, a lower bound of
        the true one.
    """
    found: list[float] = []
    for start in starts:
        place = radius * start / start.norm()
        for _ in range(steps + 1):
            loss, gradient = loss_and_gradient(place)
            found.append(loss)
            if not 0 < float(gradient.norm()) < float("inf"):
                break
            place = radius * gradient / gradient.norm()
    return found[0], max(found)
