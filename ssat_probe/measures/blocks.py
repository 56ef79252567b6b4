"""Diagonal blocks of one Hessian in lock-step: forward and first backward pass once for all of them."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.isolation import undisturbed
from ssat_probe.measures.lanczos import Krylov, LanczosRun

_BLOCK = re.compile(r"(?:.*\.)?blocks\.\d+(?=\.)")
_EMBEDDING = ("patch_embed", "cls_token", "dist_token", "reg_token", "pos_embed", "mask_token", "norm_pre")


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameters by the part of a transformer that they belong to.

    Args:
        names: Of parameters.

    Returns:
        ``embedding`` (patches, positions, extra tokens), each ``blocks.N`` under its name, and everything else under
            the first word of its name, such as ``norm`` and ``head``; in the order of the names.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        first = name.partition(".")[0]
        found = _BLOCK.match(name)
        label = found.group() if found else "embedding" if first in _EMBEDDING else first
        groups.setdefault(label, []).append(name)
    return groups


class BlockOperator(HessianOperator):
    """Hessian that can also be multiplied block by block, for the cost of one graph and a second backward per block.

    The blocks are those of the diagonal: derivatives of a block's gradient with respect to the same parameters, along
    a vector of these alone. One backward pass for all of them at once would add what lies off the diagonal; one per
    block, told which parameters it is for, visits only the part of the graph between these and their gradient.
    """

    def __init__(
        self,
        blocks: Mapping[str, Mapping[str, Tensor]],
        loss: Callable[[Any], Tensor],
        batches: Iterable[tuple[Any, int]],
    ) -> None:
        """Nothing is computed yet.

        Args:
            blocks: Parameters by name, by the name of their block.
            loss: As for `HessianOperator`, mean over the images of a batch.
            batches: As for `HessianOperator`.
        """
        super().__init__({name: one for block in blocks.values() for name, one in block.items()}, loss, batches)
        self._together = []  # a block's product passes through the blocks behind it, whose parameters it is not for
        self.blocks = {label: list(block) for label, block in blocks.items()}
        self.num_graphs = 0
        "Forward and first backward passes over a batch so far, for block products."

    def block_size(self, label: str) -> int:
        """Number of scalar parameters of a block.

        Args:
            label: Of the block.

        Returns:
            At least 1.
        """
        return sum(self.parameters[name].numel() for name in self.blocks[label])

    def block_products(self, vectors: Mapping[str, Float64[Tensor, "..."]]) -> dict[str, Float64[Tensor, "..."]]:
        """Each block of the diagonal times a vector of its own.

        Args:
            vectors: By block; blocks that are left out cost nothing.

        Returns:
            One product per vector.
        """
        totals = {label: torch.zeros_like(vector) for label, vector in vectors.items()}
        num_images = 0
        with undisturbed():
            for gradients, num, _ in self.graphs():
                by_name = dict(zip(self.parameters, gradients, strict=True))
                for label, vector in vectors.items():
                    totals[label] += num * self._second_of(label, by_name, vector)
                num_images += num
                self.num_graphs += 1
        return {label: total / num_images for label, total in totals.items()}

    def _second_of(self, label: str, gradients: Mapping[str, Tensor | None], vector: Tensor) -> Tensor:
        """Derivative of a block's gradient along a vector, for one batch."""
        names = self.blocks[label]
        ends = itertools.accumulate((self.parameters[name].numel() for name in names), initial=0)
        places = {name: slice(a, b) for name, (a, b) in zip(names, itertools.pairwise(ends), strict=True)}
        live = {name: one for name in names if (one := gradients[name]) is not None and one.requires_grad}
        total = torch.zeros_like(vector)
        if not live:
            return total
        along = [vector[places[name]].view_as(self.parameters[name]).to(self.parameters[name].dtype) for name in live]
        inputs = [self.parameters[name] for name in live]
        second = torch.autograd.grad(list(live.values()), inputs, along, retain_graph=True, allow_unused=True)
        for name, part in zip(live, second, strict=True):
            if part is not None:
                total[places[name]] = part.detach().reshape(-1).double()
        return total


def block_runs(
    operator: BlockOperator, steps: int, *, seed: int = 0, on_step: Callable[[int], None] | None = None
) -> dict[str, Krylov]:
    """A Lanczos run on every block, all in step.

    Args:
        operator: Whose blocks.
        steps: Of each run; a block of fewer parameters ends when it is spanned.
        seed: Of every start vector.
        on_step: Called after each step with the number so far.

    Returns:
        The same runs, to rounding, as one after the other on operators of their own.
    """
    options: dict[str, Any] = {"seed": seed, "precision": operator.precision, "device": operator.device}
    runs = {label: LanczosRun(operator.block_size(label), steps, **options) for label in operator.blocks}
    step = 0
    with operator:
        while going := {label: run for label, run in runs.items() if not run.is_done}:
            images = operator.block_products({label: run.vector for label, run in going.items()})
            for label, run in going.items():
                run.take(images[label])
            step += 1
            if on_step is not None:
                on_step(step)
    return {label: run.krylov() for label, run in runs.items()}
