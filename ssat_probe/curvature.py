"""Curvature of a subject's losses: Hessian operators over its images, at its weights."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssat_probe.losses import predicted_patches
from ssat_probe.measures import processes
from ssat_probe.measures.batching import pieces
from ssat_probe.measures.gauss_newton import (
    Output,
    cross_entropy_output,
    gauss_newton,
    squared_error_output,
    weighted_sum,
)
from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.memory import Room, need, room
from ssat_probe.measures.selection import selected
from ssat_probe.subject import Batch, Subject


class SizedBatches:
    """Batches of a subject with their sizes, perhaps cut into micro-batches; this process's share; readable again."""

    def __init__(self, batches: Callable[[], Iterator[Batch]], micro_batch: int | None = None) -> None:
        """Nothing is read yet.

        Args:
            batches: Gives the batches, from the first one again at every call.
            micro_batch: Images at a time at most; None leaves the batches as they are.
        """
        self._batches, self._micro_batch = batches, micro_batch

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        """Each batch and its number of images; every n-th where n processes share them."""
        return itertools.islice(self._all(), processes.place()[0], None, processes.place()[1])

    def _all(self) -> Iterator[tuple[Batch, int]]:
        for batch in self._batches():
            num = len(batch.images)
            yield from pieces(batch, num, self._micro_batch or num)


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


def l2_term(parameters: Mapping[str, Tensor], weight_decay: float) -> Callable[[], Tensor]:
    """Half the weight decay times the squared length of the parameters that decay.

    AdamW does not add this term to the loss but shrinks the weights by themselves, so the loss of such a run has it in
    spirit only; landscapes of the field do show it. That of a run of sgd has it.

    Args:
        parameters: By name; as in the training, vectors and biases do not decay.
        weight_decay: Of the training.

    Returns:
        The term at the parameters' present values.

    Raises:
        ValueError: If nothing decays.
    """
    decayed = [one for name, one in parameters.items() if one.ndim > 1 and not name.endswith(".bias")]
    if not decayed or not weight_decay > 0:
        raise ValueError(
            f"An L2 term needs a weight decay above 0 and parameters that decay, got {weight_decay} and "
            f"{len(decayed)} of {len(parameters)}. Leave --l2 out, or choose matrices."
        )
    return lambda: 0.5 * weight_decay * torch.stack([one.square().sum() for one in decayed]).sum()


@contextmanager
def constant(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Parameters do not require gradients within the block: no graph is recorded below the first that still does.

    Args:
        tensors: Put back as found at the end, also after an exception.
    """
    found = [one for one in tensors if one.requires_grad]
    try:
        for one in found:
            one.requires_grad_(False)
        yield
    finally:
        for one in found:
            one.requires_grad_(True)


def operators(
    subject: Subject,
    everything: Mapping[str, Tensor],
    loss: str = "cross_entropy",
    params: Sequence[str] = (),
    matrix: str = "hessian",
    is_augmented: bool = False,
    l2: bool = False,
    micro_batch: int | None = None,
) -> tuple[HessianOperator, HessianOperator]:
    """Hessian of a loss, for loss and gradient, and the matrix that is looked at: often the same.

    Args:
        subject: Model, images and losses.
        everything: Parameters to choose from, by name.
        loss: One of the subject's.
        params: Patterns of the parameters looked at; none means all.
        matrix: ``hessian``, or ``gauss_newton``.
        is_augmented: Look at images changed as in training, each always in the same way.
        l2: Add the recipe's weight decay to the loss; its curvature is the decay along parameters that decay, and
            none along the others.
        micro_batch: Images at a time at most; None means the subject's batches.

    Returns:
        Both over the same parameters and images.
    """
    parameters, coordinates = selected(everything, params)
    source = partial(subject.batches, is_augmented=True) if is_augmented else subject.batches
    batches = SizedBatches(source, micro_batch)
    options: dict[str, Any] = {"coordinates": coordinates, "is_sharded": processes.place()[1] > 1}
    decay = l2_term(parameters, subject.checkpoint.recipe.weight_decay) if l2 else None

    others = [one for name, one in everything.items() if name not in parameters]

    def whole(batch: Batch) -> Tensor:
        with constant(others):
            value = subject.loss(batch, loss)
        return value if decay is None else value + decay()

    def output(batch: Batch) -> Output:
        with constant(others):
            return output_of(subject, batch, loss)

    plain = HessianOperator(parameters, whole, batches, **options)
    if matrix == "hessian":
        return plain, plain
    return plain, gauss_newton(parameters, output, batches, **options)


def output_of(subject: Subject, batch: Batch, loss: str) -> Output:
    """What the network gives for a batch under a loss, for the Gauss-Newton matrix.

    Args:
        subject: Model and losses.
        batch: Of its images.
        loss: Of `Subject.loss`: logits, the predicted pixels under the frozen masks, or both.

    Returns:
        With the Hessian of that loss in the output, as a mean over the images.
    """
    if loss == "cross_entropy":
        return cross_entropy_output(subject.model(batch.images))
    if loss == "joint":
        weight = subject.checkpoint.recipe.lambda_ends[1]
        shares = {"cross_entropy": weight, "reconstruction": 1 - weight}
        return weighted_sum([(share, output_of(subject, batch, term)) for term, share in shares.items()])
    mask = subject.masks(batch)
    predicted = predicted_patches(subject.require_decoder(), subject.model.encode(batch.images, mask))
    hidden = mask.to(predicted)[:, :, None]
    return squared_error_output(predicted, hidden / (hidden.sum(dim=1, keepdim=True) * predicted[:, 0].numel()))


def shared_parameters(subject: Subject) -> dict[str, Tensor]:
    """Parameters on which the cross-entropy and, where there is a decoder, the reconstruction both depend: the encoder.

    The head is used by the one alone, the decoder by the other alone.

    Args:
        subject: Model, images and losses.

    Returns:
        By name, in the order of the model.
    """
    batch = next(subject.batches())
    everything = subject.parameters()
    terms = ["cross_entropy"] if subject.decoder is None else ["cross_entropy", "reconstruction"]
    used = [
        torch.autograd.grad(subject.loss(batch, term), list(everything.values()), allow_unused=True) for term in terms
    ]
    is_shared = [all(one is not None for one in gradients) for gradients in zip(*used, strict=True)]
    return {name: one for (name, one), is_in in zip(everything.items(), is_shared, strict=True) if is_in}


def room_for(
    subject: Subject,
    everything: Mapping[str, Tensor],
    loss: str = "cross_entropy",
    params: Sequence[str] = (),
    *,
    max_bytes: int,
    num_vectors: int = 0,
    taken: int = 0,
) -> Room:
    """How a budget of memory is used for a subject: micro-batch, kept graphs, place of the Lanczos vectors.

    Args:
        subject: Model, images and losses.
        everything: As for `operators`.
        loss: As for `operators`.
        params: As for `operators`.
        max_bytes: The budget, beside model and images.
        num_vectors: Lanczos vectors that are kept.
        taken: Bytes of the budget that dense matrices and vectors beside products and Lanczos steps take.

    Returns:
        For `operators`; a budget that is too small is a ValueError.
    """
    plain, _ = operators(subject, everything, loss, params)
    whole = [(batch, len(batch.images)) for batch in itertools.islice(subject.batches(), 1)]
    sizes = [len(batch.images) for batch in subject.batches()]
    rank, num = processes.place()
    share = -(-sum(sizes) // num)
    found = need(plain.parameters, plain.loss, whole, max_bytes) if rank == 0 else None
    sized = plain.size, num_vectors, processes.first(found), share, min(max(sizes), share)
    return room(max_bytes, *sized, taken=taken, has_own_memory=plain.device.type != "cpu")
