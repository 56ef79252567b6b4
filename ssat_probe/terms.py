"""Terms of a subject's loss, each by itself, on images that are prepared once and looked at again and again."""

import copy
from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor

from ssat_probe.measures.small_attention import SmallAttention
from ssat_probe.subject import Subject

NAMES = ("cross_entropy", "reconstruction", "joint", "l2", "accuracy")
"Values of a point; after them come, of all but the fourth, the standard errors over images, then lows, then highs."
WITH_ERROR = ("cross_entropy", "reconstruction", "joint", "accuracy")
UNITS = {
    "cross_entropy": "nat",
    "reconstruction": "normalised pixel²",
    "joint": "weighted loss",
    "l2": "loss",
    "accuracy": "",
}


class Terms:
    """Every term of the loss at the parameters' present values; batches and masks are made once.

    A call gives the values of ``NAMES``, and the standard errors of ``WITH_ERROR`` with their lowest and highest mean
    over batches, which are parts of the images that have nothing to do with how many are looked at at a time; those
    that need a decoder are NaN where there is none. The joint loss is that of the recipe: λ times cross-entropy plus
    1-λ times reconstruction. The L2 term is half the recipe's weight decay times the squared length of the parameters
    that decay (matrices, not vectors); it is part of no other term.
    """

    def __init__(
        self, subject: Subject, parameters: Mapping[str, Tensor], is_augmented: bool = False, num_batches: int = 8
    ) -> None:
        """Prepare the images.

        Args:
            subject: Model, images and losses.
            parameters: Those that move, and whose L2 term is taken.
            is_augmented: Look at images changed as in training, always in the same way.
            num_batches: Parts of the images, image i in part i modulo this number; not more than there are images.
        """
        subject.require_classes()
        self._subject = subject
        self._parameters = parameters
        self._batches = [
            (batch, subject.masks(batch) if subject.decoder is not None else None)
            for batch in subject.batches(is_augmented)
        ]
        self._num_parts = min(num_batches, subject.num_images)
        self._attention = SmallAttention()
        recipe = subject.checkpoint.recipe
        self._weight, self._decay = recipe.lambda_ends[1], recipe.weight_decay

    def on(self, subject: Subject, parameters: Mapping[str, Tensor]) -> Self:
        """The same images in front of a copy of the model, for another thread.

        Args:
            subject: With that copy.
            parameters: Its, those that move.

        Returns:
            Terms that share the images.
        """
        other = copy.copy(self)
        other._subject, other._parameters, other._attention = subject, parameters, SmallAttention()
        return other

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._subject.device

    @property
    def present(self) -> tuple[str, ...]:
        """The terms that this subject has."""
        return NAMES if self._subject.decoder is not None else ("cross_entropy", "l2", "accuracy")

    def __call__(self) -> Float64[np.ndarray, " value"]:
        """Values at the present parameters.

        Returns:
            As long as ``NAMES`` and three times ``WITH_ERROR`` together; sums are float64: no batch size enters.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in WITH_ERROR}
        with torch.no_grad(), self._attention:
            for batch, mask in self._batches:
                logits = self._subject.model(batch.images)
                losses = F.cross_entropy(logits, batch.labels, reduction="none").double()
                parts["cross_entropy"].append(losses)
                parts["accuracy"].append((logits.argmax(dim=1) == batch.labels).double())
                errors = torch.full_like(losses, float("nan"))
                if mask is not None:
                    errors = self._subject.reconstruction_errors(batch, mask).double()
                parts["reconstruction"].append(errors)
                parts["joint"].append(self._weight * losses + (1 - self._weight) * errors)
        images = torch.stack([torch.cat(values) for values in parts.values()])
        means = dict(zip(WITH_ERROR, images.mean(dim=1).tolist(), strict=True))
        is_broken = not np.isfinite(means["cross_entropy"])  # argmax of NaN would still count as an answer
        means |= {"l2": self._l2()} | ({"accuracy": float("nan")} if is_broken else {})
        num = images.shape[1]
        errors_of = images.std(dim=1) / num**0.5 if num > 1 else torch.zeros(len(images))
        part_of = torch.arange(num, device=images.device) % self._num_parts
        sums = images.new_zeros(len(images), self._num_parts).index_add_(1, part_of, images)
        batch_means = sums / part_of.bincount(minlength=self._num_parts)
        ranges = torch.cat([batch_means.amin(dim=1), batch_means.amax(dim=1)])
        return np.array([*(means[name] for name in NAMES), *errors_of.tolist(), *ranges.tolist()])

    def _l2(self) -> float:
        squares = [p.detach().double().square().sum() for p in self._parameters.values() if p.ndim > 1]
        return 0.5 * self._decay * float(torch.stack(squares).sum()) if squares else 0.0


def value_of(values: Float64[np.ndarray, "point value"], term: str) -> Float64[np.ndarray, " point"]:
    """One term of many points.

    Args:
        values: Rows that ``Terms`` gave.
        term: Of ``NAMES``.

    Returns:
        Its column.
    """
    return values[:, NAMES.index(term)]


def error_of(values: Float64[np.ndarray, "point value"], term: str) -> Float64[np.ndarray, " point"]:
    """Standard error over images of one term of many points.

    Args:
        values: Rows that ``Terms`` gave.
        term: Of ``NAMES``.

    Returns:
        Its column; NaN for a term that is no mean over images.
    """
    if term not in WITH_ERROR:
        return np.full(len(values), np.nan)
    return values[:, len(NAMES) + WITH_ERROR.index(term)]


def range_of(
    values: Float64[np.ndarray, "point value"], term: str
) -> tuple[Float64[np.ndarray, " point"], Float64[np.ndarray, " point"]]:
    """Lowest and highest mean over batches of one term of many points.

    Args:
        values: Rows that ``Terms`` gave.
        term: Of ``NAMES``.

    Returns:
        Both columns; NaN for a term that is no mean over images.
    """
    if term not in WITH_ERROR:
        return np.full(len(values), np.nan), np.full(len(values), np.nan)
    place = len(NAMES) + len(WITH_ERROR) + WITH_ERROR.index(term)
    return values[:, place], values[:, place + len(WITH_ERROR)]
