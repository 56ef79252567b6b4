"""Curvature of a subject's losses: Hessian operators over its images, at its weights."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ssat_probe.measures.gauss_newton import cross_entropy_output, gauss_newton
from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.selection import selected
from ssat_probe.subject import Batch, Subject


class SizedBatches:
    """Batches of a subject with their sizes, readable again and again."""

    def __init__(self, batches: Callable[[], Iterator[Batch]]) -> None:
        """Nothing is read yet.

        Args:
            batches: Gives the batches, from the first one again at every call.
        """
        self._batches = batches

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        """Each batch and its number of images."""
        for batch in self._batches():
            yield batch, len(batch.images)


def in_float64(subject: Subject) -> Subject:
    """The same subject with a copy of its model in float64.

    Args:
        subject: In any arithmetic.

    Returns:
        The subject itself if it is in float64.
    """
    if next(subject.model.parameters()).dtype == torch.float64:
        return subject
    decoder = None if subject.decoder is None else copy.deepcopy(subject.decoder).double()
    model = copy.deepcopy(subject.model).double()
    return dataclasses.replace(subject, model=model, decoder=decoder, dtype=torch.float64)


def operators(
    subject: Subject,
    everything: Mapping[str, Tensor],
    loss: str = "cross_entropy",
    params: Sequence[str] = (),
    matrix: str = "hessian",
) -> tuple[HessianOperator, HessianOperator]:
    """Hessian of a loss, for loss and gradient, and the matrix that is looked at: often the same.

    Args:
        subject: Model, images and losses.
        everything: Parameters to choose from, by name.
        loss: One of the subject's.
        params: Patterns of the parameters looked at; none means all.
        matrix: ``hessian``, or ``gauss_newton`` of the cross-entropy.

    Returns:
        Both over the same parameters and images.
    """
    parameters, coordinates = selected(everything, params)
    batches = SizedBatches(subject.batches)
    plain = HessianOperator(parameters, lambda batch: subject.loss(batch, loss), batches, coordinates=coordinates)
    if matrix == "hessian":
        return plain, plain
    return plain, gauss_newton(
        parameters,
        lambda batch: cross_entropy_output(subject.model(batch.images)),
        batches,
        coordinates=coordinates,
    )
