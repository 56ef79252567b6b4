"""Hessian of a mean loss as an operator: exact products by double backward, loss and gradient.

The only recipe used is gradient of gradient. `torch.func.hessian`, `jvp(jacrev(f))` and `grad(jvp(f))` are silently
wrong through layer normalisation (a test keeps watch over which of them still are).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssat_probe.measures.closed_forms import ClosedForms
from ssat_probe.measures.isolation import undisturbed
from ssat_probe.measures.processes import gathered, summed

CHUNK = 64  # vectors of one batched product; tuned on a 3,000-parameter ViT, no source
SMALL = 2**20  # entries up to which one copy of everything takes less time than a call per tensor, on a CPU
_NOT_TWICE = ("not implemented", "derivative for", "double backward", "differentiate twice", "backward of backward")


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and its gradient over all images, from one pass over the batches."""

    loss: float
    gradient: Float64[Tensor, " parameter"]
    batch_losses: tuple[float, ...]
    batch_sizes: tuple[int, ...]


class HessianOperator:
    """Hessian of the mean loss over all images with respect to the given parameters, at their present values.

    Batches weigh as many times as they hold images, so that micro-batch size and a ragged last batch change nothing.
    Products run in the dtype of the model; vectors and sums over batches are float64. Parameters that are frozen
    (``requires_grad`` false) or that the loss does not use give rows and columns of zeros. Attention is put on the
    math kernel during the forward pass, because fused attention has no second derivative, and what `ClosedForms` covers
    is differentiated by hand the second time; `evaluate` does without. Nothing of the model is changed: no ``.grad``,
    no mode, no random state.

    Inside a ``with`` block the graph of a first backward pass is kept between products (about 1.6 times faster): where
    there is one batch only, or for every batch if `keeps` says so. It is released at the end of the block. Otherwise
    each product makes its own graphs.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        loss: Callable[[Any], Tensor],
        batches: Iterable[tuple[Any, int]],
        *,
        reduction: str = "mean",
        coordinates: Int[Tensor, " coordinate"] | None = None,
        is_sharded: bool = False,
    ) -> None:
        """Nothing is computed yet.

        Args:
            parameters: Tensors by name; their flat concatenation, in this order, is the space of the operator.
            loss: Loss of one batch, a scalar that depends on the parameters; mean or sum over the images of the batch.
            batches: Pairs of (batch, number of its images), the same at every iteration; not an iterator.
            reduction: ``"mean"`` or ``"sum"``: what ``loss`` does over the images of a batch.
            coordinates: Restrict the space to these places of the concatenation; None means all of them.
            is_sharded: The batches are this process's share; loss, gradient and products are those of all processes.

        Raises:
            ValueError: If there are no parameters, one is given twice, the batches can be read only once, or the
                reduction is unknown.
        """
        if not parameters:
            raise ValueError("A Hessian needs at least one parameter, got none. Check the selection of parameters.")
        if len({id(parameter) for parameter in parameters.values()}) < len(parameters):
            raise ValueError(
                f"Each parameter must be given once, got {', '.join(parameters)} with one tensor under two names. "
                "Keep one name of each shared tensor."
            )
        if isinstance(batches, Iterator):
            raise ValueError(
                f"Batches must be readable again and again, got {type(batches).__name__}. Pass a list or a loader."
            )
        if reduction not in ("mean", "sum"):
            raise ValueError(f"The reduction must be 'mean' or 'sum', got {reduction!r}. Say what the loss does.")
        self.parameters = dict(parameters)
        self.batches = batches
        self.reduction = reduction
        self.num_products = 0
        self.num_images = 0
        "Images that went through products so far: number of images times number of products."
        self.loss = loss
        self.keeps: bool | None = None
        "Whether graphs are kept in a ``with`` block; None means that of a single batch."
        self.is_sharded = is_sharded
        self._together = list(self.parameters.values())
        "Parameters that every product is for."
        self._is_open = False
        self._kept: list[tuple[list[Tensor | None], int]] = []
        ends = np.cumsum([0, *(parameter.numel() for parameter in parameters.values())])
        self.coordinates = None if coordinates is None else coordinates.to(self.device)
        self._slices = [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]

    @property
    def size(self) -> int:
        """Number of scalar parameters, frozen ones included; those of the restriction if there is one."""
        return self._slices[-1].stop if self.coordinates is None else len(self.coordinates)

    @property
    def is_restricted(self) -> bool:
        """Whether some coordinates of the parameters are left out."""
        return self.coordinates is not None

    @property
    def device(self) -> torch.device:
        """Where vectors live: with the parameters."""
        return next(iter(self.parameters.values())).device

    @property
    def precision(self) -> float:
        """Machine epsilon of the products: that of the coarsest dtype among the parameters."""
        return max(torch.finfo(parameter.dtype).eps for parameter in self.parameters.values())

    def __enter__(self) -> "HessianOperator":
        """Keep graphs between products from here on."""
        self._is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        """Release the graphs."""
        self._is_open = False
        self.release()

    def release(self) -> None:
        """Forget the kept graphs; the next product makes new ones."""
        self._kept = []

    def product(self, vector: Float64[Tensor, " parameter"]) -> Float64[Tensor, " parameter"]:
        """Hessian times one vector.

        Args:
            vector: Any length (norm); on the device of the parameters.

        Returns:
            In units of loss per squared unit of parameter times the vector.
        """
        return self.products(vector[None])[0]

    def products(self, vectors: Float64[Tensor, "vector parameter"]) -> Float64[Tensor, "vector parameter"]:
        """Hessian times several vectors, which share the graph and, where the model allows it, the backward pass.

        Args:
            vectors: One vector per row.

        Returns:
            One product per row.

        Raises:
            ValueError: If the vectors do not fit, there is no batch, or the loss is not a finite scalar that can be
                differentiated twice.
        """
        if vectors.shape[1] != self.size:
            raise ValueError(
                f"A vector must have one entry per parameter ({self.size}), got {vectors.shape[1]}. "
                "Concatenate the parameters in the order of the operator."
            )
        num_images = 0
        with undisturbed():
            vectors = self._embedded(vectors.clone() if vectors.is_inference() else vectors)
            total = torch.zeros_like(vectors)
            for gradients, num, is_kept in self.graphs():
                share = num if self.reduction == "mean" else 1
                self._add_second(total, share, gradients, vectors, retain_graph=is_kept)
                num_images += num
            total, num_images = self._over_processes(total, num_images)
        self.num_products += len(vectors)
        self.num_images += num_images * len(vectors)
        return self.restricted(total).div_(num_images)

    def evaluate(self) -> Evaluation:
        """Mean loss and gradient over all images.

        Returns:
            The loss, the gradient in float64, and loss and size of each batch in the order they came.
        """
        gradient = torch.zeros(self._slices[-1].stop, dtype=torch.float64, device=self.device)
        losses, sizes = [], []
        with undisturbed():
            for batch, num, _ in self._sized():
                loss = self._forward(batch)
                first = self._differentiate([loss], None, create_graph=False)
                share = num if self.reduction == "mean" else 1
                for place, block in zip(self._slices, first, strict=True):
                    if block is not None:
                        gradient[place] += share * block.detach().reshape(-1).double()
                losses.append(float(loss.detach()) * share / num)
                sizes.append(num)
        gradient, num_images = self._over_processes(gradient, sum(sizes))
        if self.is_sharded:
            losses, sizes = gathered(losses), gathered(sizes)
        loss_sum = sum(loss * num for loss, num in zip(losses, sizes, strict=True))
        return Evaluation(loss_sum / num_images, self.restricted(gradient) / num_images, tuple(losses), tuple(sizes))

    def _over_processes(self, total: Tensor, num_images: int) -> tuple[Tensor, int]:
        """Sums over all images, where each process has seen its share."""
        if self.is_sharded:
            total = summed(total)
            num_images = int(summed(torch.tensor(num_images, device=total.device)))
        if not num_images:
            raise ValueError("A mean loss needs at least one batch, got none. Check the data set and its subset.")
        return total, num_images

    @contextmanager
    def moved(self, displacement: Float64[Tensor, " parameter"]) -> Iterator[Float64[Tensor, " parameter"]]:
        """Parameters moved for the time of the block, and put back bit by bit at its end, also after an exception.

        Args:
            displacement: What is added to the trainable parameters, rounded to their dtype.

        Yields:
            The displacement that really took place, after rounding, in float64.
        """
        self.release()
        found = [parameter.detach().clone() for parameter in self.parameters.values()]
        displacement = self._embedded(displacement)
        happened = torch.zeros_like(displacement)
        try:
            with torch.no_grad():
                for place, parameter, before in zip(self._slices, self.parameters.values(), found, strict=True):
                    if parameter.requires_grad:
                        step = displacement[place].view_as(parameter)
                        parameter.copy_(before.double() + step)
                        happened[place] = (parameter.double() - before.double()).reshape(-1)
            yield self.restricted(happened)
        finally:
            with torch.no_grad():
                for parameter, before in zip(self.parameters.values(), found, strict=True):
                    parameter.copy_(before)
            self.release()

    def _embedded(self, vectors: Tensor) -> Tensor:
        """Vectors of the restricted space in that of all coordinates."""
        if self.coordinates is None:
            return vectors
        whole = vectors.new_zeros(*vectors.shape[:-1], self._slices[-1].stop)
        whole[..., self.coordinates] = vectors
        return whole

    def restricted(self, vectors: Tensor) -> Tensor:
        """Coordinates of the operator's space, of vectors over all coordinates of its parameters.

        Args:
            vectors: Along the last axis.

        Returns:
            The same vectors where the operator is not restricted.
        """
        return vectors if self.coordinates is None else vectors[..., self.coordinates]

    def _sized(self) -> Iterator[tuple[Any, int, bool]]:
        """Batches with their sizes, and whether there is one only."""
        iterator = iter(self.batches)
        head = list(itertools.islice(iterator, 2))
        for pairs in (head, iterator):
            for batch, num in pairs:
                if num < 1:
                    raise ValueError(f"A batch must hold at least one image, got {num}. Leave empty batches out.")
                yield batch, num, len(head) == 1

    def graphs(self) -> Iterator[tuple[list[Tensor | None], int, bool]]:
        """First derivatives of batch after batch that can be differentiated again; inside `undisturbed`.

        Yields:
            One gradient per parameter, None where it is zero; images of the batch; whether the graph is kept.
        """
        if self._kept:
            yield from ((gradients, num, True) for gradients, num in self._kept)
            return
        kept = []
        for batch, num, is_only in self._sized():
            with ClosedForms(self._together):
                loss = self._forward(batch)
            gradients = self._differentiate([loss], None, create_graph=True)
            del loss
            is_kept = self._is_open and (is_only if self.keeps is None else self.keeps)
            if is_kept:
                kept.append((gradients, num))
            yield gradients, num, is_kept
            del gradients  # the graph must not outlive the making of the next one
        self._kept = kept

    def _forward(self, batch: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            loss = self.loss(batch)
        if loss.numel() != 1 or not bool(torch.isfinite(loss)):
            got = f"shape {tuple(loss.shape)}" if loss.numel() != 1 else f"{loss.item()}"
            raise ValueError(
                f"The loss of a batch must be one finite number, got {got}. Check the loss and the weights."
            )
        return loss.reshape(())

    def _add_second(
        self, total: Tensor, share: int, gradients: list[Tensor | None], vectors: Tensor, *, retain_graph: bool
    ) -> None:
        """Add derivatives of ``gradients`` along each of the vectors, for one batch."""
        is_small = total.numel() <= SMALL
        dtypes = {one.dtype for one in gradients if one is not None}
        if is_small and len(dtypes) == 1:
            vectors = vectors.to(dtypes.pop())
        pairs = [
            (one, vectors[:, place].to(one.dtype).reshape(len(vectors), *one.shape))
            for one, place in zip(gradients, self._slices, strict=True)
            if one is not None and one.requires_grad
        ]
        if not pairs:  # a loss that is linear in all parameters, or has none that can be trained
            return
        blocks = self._second([one for one, _ in pairs], [along for _, along in pairs], retain_graph=retain_graph)
        found = [
            (p, one.reshape(len(vectors), -1)) for p, one in zip(self._slices, blocks, strict=True) if one is not None
        ]
        if is_small and len(found) == len(self._slices):
            found = [(slice(None), torch.cat([one for _, one in found], dim=1))]
        for place, one in found:
            total[:, place].add_(one, alpha=share)  # in float64, as the total is

    def rows(
        self, gradients: list[Tensor | None], tensor: int, entries: Int[Tensor, " row"]
    ) -> Float64[Tensor, "row column"]:
        """Rows of the Hessian of one batch's loss, from their own tensor on; the rest is known by symmetry.

        No backward pass goes further down than the tensor: for late layers that is a small part of the graph.

        Args:
            gradients: From `graphs`.
            tensor: Place of the parameter among all.
            entries: Places within it, one per row.

        Returns:
            Columns of all coordinates of this parameter and those after it, restricted or not.
        """
        begin = self._slices[tensor].start
        found = torch.zeros(len(entries), self._slices[-1].stop - begin, dtype=torch.float64, device=self.device)
        gradient = gradients[tensor]
        if gradient is None or not gradient.requires_grad:
            return found
        units = torch.nn.functional.one_hot(entries, gradient.numel()).to(gradient)
        along = units.view(len(entries), *gradient.shape)
        blocks = self._second([gradient], [along], retain_graph=True, first=tensor)
        for place, block in zip(self._slices[tensor:], blocks, strict=True):
            if block is not None:
                found[:, place.start - begin : place.stop - begin] = block.reshape(len(entries), -1)
        return found

    def _second(
        self, outputs: list[Tensor], along: list[Tensor], *, retain_graph: bool, first: int = 0
    ) -> list[Tensor | None]:
        """Derivatives of first derivatives along one vector per row of ``along``; several share a backward pass."""
        if len(along[0]) == 1:
            return self._differentiate(outputs, [one[0] for one in along], first, retain_graph=retain_graph)
        return self._differentiate(outputs, along, first, retain_graph=retain_graph, is_grads_batched=True)

    def _differentiate(
        self, outputs: list[Tensor], along: list[Tensor] | None, first: int = 0, **options: bool
    ) -> list[Tensor | None]:
        """One entry per parameter from the first on: derivative of the outputs, None where it is zero throughout."""
        wanted = list(self.parameters.values())[first:]
        trainable = [parameter for parameter in wanted if parameter.requires_grad]
        if not trainable or not any(output.requires_grad for output in outputs):
            return [None] * len(wanted)
        try:
            blocks = iter(torch.autograd.grad(outputs, trainable, along, allow_unused=True, **options))
        except RuntimeError as error:
            if any(sign in str(error) for sign in _NOT_TWICE):
                raise ValueError(
                    f"The loss must be twice differentiable in plain PyTorch, got: {str(error).splitlines()[0]} "
                    "Replace the fused or compiled operation (attention, torch.compile) by its plain form."
                ) from error
            raise
        return [next(blocks) if parameter.requires_grad else None for parameter in wanted]
