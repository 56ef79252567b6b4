"""Time per point of a loss surface: this package against a plain loop that copies weights, and vmap over weights.

Run: make benchmark-landscape (or: python analyses/benchmarks/landscape.py). Takes three minutes; nothing to download.
All give the same losses (checked). The plain loop is what is usually written: for each point copy every tensor, then go
through the images, with all of torch's threads. Repeats take turns, so that a busy machine disturbs all alike; what is
printed are medians, and of the ratio to the plain loop the lowest, median and highest of the repeats.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from ssat_probe.grid import Kept, Look, pace_of, values_of
from ssat_probe.measures.directions import flat, named, random_direction
from ssat_probe.recipe import Recipe
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject
from ssat_probe.terms import value_of
from ssat_probe.training import train

POINTS, REPEATS = 32, 7
BATCH_SIZE = 256  # larger than 128, at which all are slower
MODELS = {"vit_nano": (256, {}), "vit_tiny": (16, {"img_size": (32, 32), "patch_size": (4, 4)})}


def subject_of(model: str, num_images: int, fields: dict[str, tuple[int, int]]) -> Subject:
    """A checkpoint after one epoch on a few images; what is timed does not depend on how good it is."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(method="ssat", model=model, subset=20, epochs=1, batch_size=20, warmup_epochs=0, **fields)
        path = train(recipe, folder, device="cpu").path
        return Subject.of(path, Sample(num_images=num_images, batch_size=BATCH_SIZE, device="cpu"), "test")


def plain_loop(subject: Subject, axes: list[torch.Tensor], weights: np.ndarray) -> list[float]:
    """Copy every tensor, then go through the images, for each point."""
    parameters = subject.parameters()
    origin = {name: p.detach().clone() for name, p in parameters.items()}
    directions = [named(axis, parameters) for axis in axes]
    losses = []
    with torch.no_grad():
        for _, x, y in weights.tolist():
            for name, p in parameters.items():
                p.copy_(origin[name] + x * directions[0][name].to(p) + y * directions[1][name].to(p))
            total = 0.0
            for batch in subject.batches():
                total += float(subject.loss(batch)) * len(batch.images)
                float(subject.loss(batch, "reconstruction"))
            losses.append(total / subject.num_images)
        for name, p in parameters.items():
            p.copy_(origin[name])
    return losses


def ours(subject: Subject, axes: list[torch.Tensor], weights: np.ndarray, at_once: int) -> list[float]:
    """What the probe does."""
    look = Look(subject, "cross_entropy", is_augmented=False, num_batches=8)
    anchors = [flat(subject.parameters()), *axes]
    found = values_of(look, look.terms(), anchors, weights, Kept(None, look, {}), at_once=at_once)
    return value_of(found, "cross_entropy").tolist()


def with_vmap(subject: Subject, axes: list[torch.Tensor], weights: np.ndarray) -> list[float]:
    """All points in one batched forward pass; cross-entropy alone, which is less work than the others do."""
    parameters = subject.parameters()
    rows = torch.from_numpy(weights) @ torch.stack([flat(parameters), *axes])
    stacked = {
        name: torch.stack([named(row, parameters)[name] for row in rows]).to(p) for name, p in parameters.items()
    }
    total = torch.zeros(len(weights), dtype=torch.float64)
    with torch.no_grad():
        for batch in subject.batches():

            def losses(one: dict[str, torch.Tensor], batch=batch) -> torch.Tensor:  # type: ignore[no-untyped-def]
                logits = torch.func.functional_call(subject.model, one, (batch.images,))
                return F.cross_entropy(logits, batch.labels, reduction="sum")

            total += torch.vmap(losses)(stacked).double()
    return (total / subject.num_images).tolist()


def main() -> None:
    """Print one JSON object per model."""
    generator = np.random.default_rng(0)
    weights = np.column_stack([np.ones(POINTS), generator.uniform(-0.3, 0.3, (POINTS, 2))])
    for model, (num_images, fields) in MODELS.items():
        subject = subject_of(model, num_images, fields)
        axes = [flat(random_direction(subject.parameters(), seed)) for seed in (1, 2)]
        # Once per grid, at the cost of eight points; a picture has 441 or more.
        at_once = pace_of(Look(subject, "cross_entropy", is_augmented=False, num_batches=8).terms()).at_once
        ways: dict[str, Callable[..., list[float]]] = {
            "ours": partial(ours, at_once=at_once),
            "plain_loop": plain_loop,
            "vmap_ce_only": with_vmap,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        losses: dict[str, list[float]] = {}
        for _ in range(REPEATS):
            for name, way in ways.items():
                started = time.perf_counter()
                losses[name] = way(subject, axes, weights)
                seconds[name].append((time.perf_counter() - started) / POINTS)
        for name in ways:
            np.testing.assert_allclose(losses[name], losses["plain_loop"], rtol=1e-3)
        medians = {name: round(statistics.median(values) * 1000, 2) for name, values in seconds.items()}
        ratios = sorted(plain / own for plain, own in zip(seconds["plain_loop"], seconds["ours"], strict=True))
        spread = [round(ratios[place], 2) for place in (0, REPEATS // 2, -1)]
        record = {"model": model, "images": num_images, "threads": torch.get_num_threads(), "at_once": at_once}
        print(json.dumps(record | {"ms_per_point": medians, "times_faster": spread}), flush=True)


if __name__ == "__main__":
    main()
