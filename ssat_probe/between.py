"""Between checkpoints: one network that takes the weights of any of them and of everything in between."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from ssat_probe.grid import POINTS_AT_A_TIME, Kept, Look, pace_of, values_of
from ssat_probe.measures.directions import flat
from ssat_probe.subject import Batch, Subject
from ssat_probe.terms import UNITS, Terms, error_of, value_of


@dataclass(frozen=True)
class Together:
    """Checkpoints as vectors, and the network of the first, in which all of them are looked at."""

    subject: Subject
    parameters: dict[str, nn.Parameter]
    anchors: Float64[Tensor, "anchor parameter"]
    "One row per checkpoint."
    terms: Terms
    look: Look
    jobs: int
    "Processes that share many points."
    keep: Path | None
    "Folder of points that have been measured."

    @classmethod
    def of(cls, subjects: Sequence[Subject], least: int, jobs: int = 1, keep: Path | None = None) -> "Together":
        """Put checkpoints side by side.

        Encoder and head move, and the decoder where all checkpoints have one; otherwise there is no reconstruction. No
        heads or units are permuted to match each other.

        Args:
            subjects: With the same images.
            least: Number of checkpoints that are needed.
            jobs: Processes that share many points.
            keep: Folder in which points that have been measured are kept; None keeps nothing.

        Returns:
            All of them as points of one space.

        Raises:
            ValueError: If there are too few or no jobs, or one has another architecture than the first.
        """
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}.")
        if len(subjects) < least:
            raise ValueError(f"--ckpt must name at least {least} checkpoints, got {len(subjects)}.")
        has_decoder = all(one.decoder is not None for one in subjects)
        term = "joint" if has_decoder else "cross_entropy"
        first = subjects[0] if has_decoder else dataclasses.replace(subjects[0], decoder=None)
        parameters = first.parameters(term)
        for other in subjects[1:]:
            _refuse_other_architecture(first, other, {name: p.shape for name, p in parameters.items()}, term)
        anchors = torch.stack([flat(one.parameters(term)) for one in subjects])
        look = Look(first, term, is_augmented=False, num_batches=8)
        return cls(first, parameters, anchors, look.terms(), look, jobs, keep)

    def values(
        self, weights: Float64[np.ndarray, "point anchor"], more: Sequence[Tensor] = ()
    ) -> Float64[np.ndarray, "point value"]:
        """Terms at weighted sums of the checkpoints, and of further vectors.

        Args:
            weights: One row per point.
            more: Vectors after the checkpoints.

        Returns:
            As ``Terms`` gives them.
        """
        anchors = [*self.anchors, *more]
        digest = hashlib.sha256(weights.tobytes())
        for anchor in anchors:
            digest.update(anchor.cpu().numpy().tobytes())
        kept = Kept(self.keep, self.look, {"points": digest.hexdigest()})
        is_many = len(weights) > 4 * POINTS_AT_A_TIME  # fewer are not worth the measurement
        at_once = pace_of(self.terms, self.jobs).at_once if is_many else 1
        return values_of(self.look, self.terms, anchors, weights, kept, self.jobs, at_once)

    def rows(
        self, points: Sequence[dict[str, Any]], values: Float64[np.ndarray, "point value"]
    ) -> list[dict[str, Any]]:
        """One row per point and term.

        Args:
            points: What each point is.
            values: Theirs.

        Returns:
            With ``term``, ``value``, ``standard_error`` and ``unit``.
        """
        columns = {term: (value_of(values, term), error_of(values, term)) for term in self.terms.present}
        return [
            point | {"term": term, "value": one[place], "standard_error": error[place], "unit": UNITS[term]}
            for place, point in enumerate(points)
            for term, (one, error) in columns.items()
        ]

    def batches(self) -> list[Batch]:
        """The images, prepared once.

        Returns:
            In the sample's batches.
        """
        return list(self.subject.batches())


def short_labels(subjects: Sequence[Subject], labels: Sequence[str]) -> list[str]:
    """Readable names for figures: the method where that tells the checkpoints apart, else with what does.

    Args:
        subjects: The checkpoints.
        labels: Their unique names.

    Returns:
        As many, all different.
    """
    names = {"scratch": "scratch", "ssl_ft": "SSL+FT", "ssat": "SSAT"}
    methods, recipes = [], [one.checkpoint.recipe for one in subjects]
    for one, recipe in zip(subjects, recipes, strict=True):
        stage = "" if one.checkpoint.stage != "pretrain" else " pretrain"
        methods.append(names.get(recipe.method, recipe.method) + stage)
    seeds = [f"{method} seed {recipe.seed}" for method, recipe in zip(methods, recipes, strict=True)]
    epochs = [f"{name} epoch {one.checkpoint.epoch}" for name, one in zip(seeds, subjects, strict=True)]
    for names_of_all in (methods, seeds, epochs):
        if len(set(names_of_all)) == len(subjects):
            return names_of_all
    return list(labels)


def _refuse_other_architecture(first: Subject, other: Subject, shapes: dict[str, Any], term: str) -> None:
    """Only networks of one architecture have anything between them."""
    one, two = first.checkpoint, other.checkpoint
    fields = ("model", "img_size", "patch_size", "decoder") if term == "joint" else ("model", "img_size", "patch_size")
    for name in fields:
        if getattr(one.recipe, name) != getattr(two.recipe, name):
            raise ValueError(
                f"All checkpoints must have one architecture, got {name} {getattr(one.recipe, name)} in {one.path} and "
                f"{getattr(two.recipe, name)} in {two.path}; give checkpoints of one recipe."
            )
    there = {name: p.shape for name, p in other.parameters(term).items()}
    if there != shapes or one.facts != two.facts:
        name = next((name for name in {**shapes, **there} if there.get(name) != shapes.get(name)), "data set")
        raise ValueError(
            f"All checkpoints must have one architecture and one data set, got another {name} in {two.path} than in "
            f"{one.path}; give checkpoints of one recipe that differ in method or seed."
        )
