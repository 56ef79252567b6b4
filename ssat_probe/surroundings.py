"""Surroundings of a checkpoint: its loss along directions and on a plane, checked against its own Hessian."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from pandas import DataFrame
from torch import Tensor

from ssat_probe.eigenvectors import kept
from ssat_probe.grid import Kept, Look, pace_of, refuse_too_large, values_of
from ssat_probe.measures.directions import (
    Eigenvector,
    cosine,
    eigenvectors,
    flat,
    heads_of,
    random_direction,
)
from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.lanczos import lanczos
from ssat_probe.measures.landscape import (
    convex_share,
    roughness,
    second_difference,
    share_below,
    values_at,
    worst_case,
)
from ssat_probe.subject import Subject
from ssat_probe.terms import UNITS, Terms, error_of, range_of, value_of

ENDS = ("top", "top2", "bottom", "bottom2")
SEED_STEP = 1_000_003  # between the seeds of two random directions


@dataclass(frozen=True)
class Settings:
    """What is looked at; the probe's options."""

    loss: str
    lines: tuple[str, ...]
    plane: tuple[str, ...]
    num_random: int
    normalisation: str
    vectors: str
    points: int
    extent: float
    distance: float
    radius: float
    noise: float
    flat_within: float
    steps: int
    eigenvectors: Path | None
    is_augmented: bool
    num_batches: int
    seed: int
    budget_s: float
    jobs: int
    keep: Path | None


@dataclass(frozen=True)
class Axis:
    """A direction, and how far it is followed."""

    name: str
    vector: Float64[Tensor, " parameter"]
    half_width: float
    eigenvalue: tuple[float, float, bool] | None = None
    "Of an eigenvector: value, residual, whether it has converged."


def measure(settings: Settings, subject: Subject) -> list[dict[str, Any]]:
    """Rows of the landscape probe for one subject.

    Args:
        settings: What to look at.
        subject: Model, images, losses; left as found.

    Returns:
        Points of lines and of the plane, facts and checks of every axis, scalars.
    """
    look, parameters = _look(settings, subject), subject.parameters(settings.loss)
    terms = look.terms()
    kept_values = Kept(None if settings.keep is None else Path(settings.keep), look, _determining(settings))
    num_left = num_points(settings) - len(kept_values.values)
    pace = pace_of(terms, settings.jobs)
    refuse_too_large(num_left, pace.seconds, settings.budget_s)
    batches = [(batch, len(batch.images)) for batch in subject.batches(settings.is_augmented)]
    operator = HessianOperator(parameters, lambda batch: subject.loss(batch, settings.loss), batches)
    with operator:
        gradient = operator.evaluate().gradient
        axes = _axes(settings, subject, operator, gradient)
        plane = [axes[name] for name in _numbered(settings.plane)]
        points = _Points(settings, axes, plane)
        anchors = [flat(parameters), *(axis.vector for axis in axes.values())]
        values = values_of(look, terms, anchors, points.weights, kept_values, settings.jobs, pace.at_once)
        rows = [*points.rows(values, terms.present)]
        rows += _facts(settings, operator, terms, axes, plane, gradient)
        operator.release()
        rows += _scalars(settings, operator, points, values, axes, gradient)
    return rows


def estimate(settings: Settings, subject: Subject) -> str:
    """What a measurement costs, from a few points and a product measured now.

    Args:
        settings: What to look at.
        subject: Model, images, losses; left as found.

    Returns:
        A line that says so.
    """
    look = _look(settings, subject)
    batches = [(batch, len(batch.images)) for batch in subject.batches(settings.is_augmented)]
    parameters = subject.parameters(settings.loss)
    operator = HessianOperator(parameters, lambda batch: subject.loss(batch, settings.loss), batches)
    pace, num = pace_of(look.terms(), settings.jobs), num_points(settings)
    has_ends = settings.eigenvectors is None and any(name in ENDS for name in (*settings.lines, *settings.plane))
    num_products = 10 + settings.steps * has_ends
    started = time.perf_counter()
    operator.product(torch.ones(operator.size, dtype=torch.float64, device=operator.device))
    products = (time.perf_counter() - started) * num_products
    total = num * pace.seconds + products
    shared = f", {settings.jobs} processes" if settings.jobs > 1 else f", {pace.at_once} at once" * (pace.at_once > 1)
    return (
        f"{num} points of {pace.seconds:.3g} s{shared}, some {num_products} Hessian-vector products: "
        f"about {total:.0f} s per checkpoint"
    )


def num_points(settings: Settings) -> int:
    """Number of points of lines, surface and average sharpness, and the centre.

    Args:
        settings: What to look at.

    Returns:
        Known before any direction is.
    """
    num_random = max(settings.num_random, settings.plane.count("random"))
    has_random = "random" in (*settings.lines, *settings.plane)
    num_lines = sum(num_random if kind == "random" else 1 for kind in set(settings.lines))
    return 1 + settings.points * num_lines + settings.points**2 * bool(settings.plane) + 2 * num_random * has_random


def _look(settings: Settings, subject: Subject) -> Look:
    return Look(subject, settings.loss, settings.is_augmented, settings.num_batches)


def _determining(settings: Settings) -> dict[str, Any]:
    """Options that determine the points and their values."""
    options = dataclasses.asdict(settings)
    return {
        name: value
        for name, value in options.items()
        if name not in ("keep", "budget_s", "jobs", "radius", "flat_within")
    }


def _numbered(names: tuple[str, ...]) -> list[str]:
    """Names of the plane's axes: the second random one is another direction than the first."""
    seen = [sum(other == name for other in names[:place]) for place, name in enumerate(names)]
    return [f"random{count}" if name == "random" else name for name, count in zip(names, seen, strict=True)]


def _axes(
    settings: Settings, subject: Subject, operator: HessianOperator, gradient: Float64[Tensor, " parameter"]
) -> dict[str, Axis]:
    """Every direction that is asked for, by its name."""
    wanted = {*settings.lines, *settings.plane}
    axes: dict[str, Axis] = {}
    heads = heads_of(subject.model) | (heads_of(subject.decoder, "decoder.") if subject.decoder is not None else {})
    treat: dict[str, Any] = {"vectors": settings.vectors, "heads": heads}
    weights = {name: parameter.detach() for name, parameter in operator.parameters.items()}
    if "random" in wanted:
        first = None
        for number in range(max(settings.num_random, settings.plane.count("random"))):
            seed = settings.seed + SEED_STEP * number
            against = first if number == 1 else None
            one = random_direction(weights, seed, settings.normalisation, against=against, **treat)
            first = one if number == 0 else first
            axes[f"random{number}"] = Axis(f"random{number}", flat(one), settings.extent)
    if "gradient" in wanted:
        length = float(gradient.norm())
        axes["gradient"] = Axis("gradient", gradient / length if length else gradient, settings.distance)
    if ends := [name for name in ENDS if name in wanted]:
        for name, found in _eigenvectors(settings, subject, operator, ends).items():
            facts = found.value, found.residual, found.converged
            axes[name] = Axis(name, found.vector, settings.distance, facts)
    return axes


def _eigenvectors(
    settings: Settings, subject: Subject, operator: HessianOperator, names: list[str]
) -> dict[str, Eigenvector]:
    """Those that a Hessian run kept, or else from a Lanczos run of its own."""
    if settings.eigenvectors is not None:
        return kept(Path(settings.eigenvectors), subject, settings.loss, names)
    run = lanczos(
        operator.product, operator.size, settings.steps, seed=settings.seed, precision=operator.precision,
        device=operator.device, with_basis=True,
    )  # fmt: skip
    num = 2 if {"top2", "bottom2"} & set(names) else 1
    top, bottom = eigenvectors(run, num)
    found = dict(zip(("top", "top2"), top, strict=False)) | dict(zip(("bottom", "bottom2"), bottom, strict=False))
    return {name: found[name] for name in names}


def kind_of(direction: str) -> str:
    """Kind of a direction: a random one without its number.

    Args:
        direction: Name of an axis.

    Returns:
        Of the probe's directions.
    """
    return "random" if direction.startswith("random") else direction


_OF_POINTS = ("value", "standard_error", "low", "high")


class _Points:
    """All points as weights of (parameters, axes), and what each of them is."""

    def __init__(self, settings: Settings, axes: dict[str, Axis], plane: list[Axis]) -> None:
        self.axes, self.plane = axes, plane
        places = {name: place for place, name in enumerate(axes, start=1)}
        lines = [name for name in axes if kind_of(name) in settings.lines]
        self.labels: list[tuple[str, str, float, float]] = []
        rows: list[np.ndarray] = []

        def add(quantity: str, direction: str, at: dict[str, float], x: float, y: float) -> None:
            row = np.zeros(1 + len(axes))
            row[0] = 1.0
            for name, value in at.items():
                row[places[name]] = value
            rows.append(row)
            self.labels.append((quantity, direction, x, y))

        add("centre", "", {}, np.nan, np.nan)
        for name in lines:
            for x in ticks(settings.points, axes[name].half_width):
                add("line", name, {name: x}, x, np.nan)
        if plane:
            one, two = plane
            self.pair = f"{one.name} {two.name}"
            for y in ticks(settings.points, two.half_width):
                for x in ticks(settings.points, one.half_width):
                    add("surface", self.pair, {one.name: x, two.name: y}, x, y)
        for name in axes:
            if name.startswith("random"):
                for x in (-settings.noise, settings.noise):
                    add("noise", name, {name: x}, x, np.nan)
        self.weights = np.array(rows)

    def rows(self, values: np.ndarray, present: tuple[str, ...]) -> list[dict[str, Any]]:
        """One row per point and term."""
        columns = {term: (value_of(values, term), error_of(values, term), *range_of(values, term)) for term in present}
        return [
            {"quantity": quantity, "direction": direction, "x": x, "y": y, "term": term, "unit": UNITS[term]}
            | dict(zip(_OF_POINTS, (column[place] for column in columns[term]), strict=True))
            for place, (quantity, direction, x, y) in enumerate(self.labels)
            if quantity != "noise"
            for term in present
        ]

    def select(self, quantity: str, values: np.ndarray) -> np.ndarray:
        """Values of the points of one kind."""
        return values[[label[0] == quantity for label in self.labels]]


def ticks(points: int, half_width: float) -> list[float]:
    """Odd number of coordinates, symmetric about a zero that is exact.

    Args:
        points: How many.
        half_width: The largest.

    Returns:
        Ascending.
    """
    positive = np.linspace(0, half_width, points // 2 + 1)
    return [*(-positive[:0:-1]).tolist(), *positive.tolist()]


def _facts(
    settings: Settings,
    operator: HessianOperator,
    terms: Terms,
    axes: dict[str, Axis],
    plane: list[Axis],
    gradient: Float64[Tensor, " parameter"],
) -> list[dict[str, Any]]:
    """Length, slope and curvature of each axis; the second difference of losses beside it; the plane's quadratic."""
    rows: list[dict[str, Any]] = []
    images = {name: operator.product(axis.vector) for name, axis in axes.items()}
    origin = flat(operator.parameters)

    def loss(axis: Axis, x: float) -> float:
        found = values_at(operator.parameters, terms, [origin, axis.vector], np.array([[1.0, x]]))
        return float(value_of(found, settings.loss)[0])

    for name, axis in axes.items():
        curvature = float(axis.vector @ images[name])
        check = second_difference(partial(loss, axis), curvature)
        facts = {"length": float(axis.vector.norm()), "slope": float(gradient @ axis.vector), "curvature": curvature}
        facts |= {"check_difference": check.difference, "check_error": check.error, "check_step": check.step}
        if axis.eigenvalue is not None:
            facts |= dict(zip(("eigenvalue", "residual", "converged"), map(float, axis.eigenvalue), strict=True))
        rows += [{"quantity": key, "direction": name, "term": settings.loss, "value": v} for key, v in facts.items()]
    if plane:
        one, two = plane
        pair = f"{one.name} {two.name}"
        both = {"mixed_curvature": float(one.vector @ images[two.name]), "cosine": cosine(one.vector, two.vector)}
        rows += [{"quantity": key, "direction": pair, "term": settings.loss, "value": v} for key, v in both.items()]
    return rows


def _scalars(
    settings: Settings,
    operator: HessianOperator,
    points: _Points,
    values: Float64[np.ndarray, "point value"],
    axes: dict[str, Axis],
    gradient: Float64[Tensor, " parameter"],
) -> list[dict[str, Any]]:
    """Sharpness, roughness, convexity: what a picture shows, as numbers."""
    centre = float(value_of(points.select("centre", values), settings.loss)[0])
    scalars: dict[str, float] = {}
    errors: dict[str, float] = {}
    starts = [gradient, *(s * axes[name].vector for name in ("top",) if name in axes for s in (1, -1))]
    if settings.radius > 0 and float(gradient.norm()):
        step, worst = worst_case(_loss_and_gradient(operator), settings.radius, starts)
        scalars |= {"sharpness_sam": step - centre, "sharpness_worst": worst - centre}
    noise = value_of(points.select("noise", values), settings.loss)
    if len(noise):
        rises = noise.reshape(-1, 2).mean(axis=1) - centre
        scalars["sharpness_average"] = float(rises.mean())
        errors["sharpness_average"] = float(rises.std(ddof=1) / len(rises) ** 0.5) if len(rises) > 1 else float("nan")
    if points.plane:
        grid = value_of(points.select("surface", values), settings.loss).reshape(settings.points, settings.points)
        steps = [2 * axis.half_width / (settings.points - 1) for axis in points.plane]
        scalars |= {
            "lowest": float(np.nanmin(grid)) - centre if np.isfinite(grid).any() else float("nan"),
            "roughness": roughness(grid),
            "convex_share": convex_share(grid, (steps[1], steps[0])),
            "flat_share": share_below(grid, centre + settings.flat_within),
        }
    return [
        {"quantity": key, "term": settings.loss, "value": value, "standard_error": errors.get(key, float("nan"))}
        for key, value in scalars.items()
    ]


def _loss_and_gradient(operator: HessianOperator) -> Callable[[Tensor], tuple[float, Tensor]]:
    def found(displacement: Tensor) -> tuple[float, Tensor]:
        with operator.moved(displacement):
            evaluation = operator.evaluate()
        return evaluation.loss, evaluation.gradient

    return found


def table(rows: list[dict[str, Any]], names: list[str]) -> DataFrame:
    """Rows as a table with all columns.

    Args:
        rows: What ``measure`` gave.
        names: Of the columns, in order.

    Returns:
        Numbers as floats; texts that a row does not say are empty.
    """
    texts = {"direction": "", "term": "", "unit": ""}
    numbers = [name for name in names if name not in {"quantity", *texts}]
    return DataFrame([texts | row for row in rows], columns=names).astype(dict.fromkeys(numbers, float))
