"""Diagonal blocks of one Hessian in lock-step: forward and first backward pass once for all of them."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from ssat_probe.measures.hessian import HessianOperator, random_state_kept
from ssat_probe.measures.lanczos import Krylov

_BREAKDOWN, _ROUNDINGS = 1e-13, 20  # as in the runs of a single operator
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
        with torch.inference_mode(False), torch.enable_grad(), random_state_kept():
            for gradients, num in self._graphs():
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
        live = [name for name in names if (one := gradients[name]) is not None and one.requires_grad]
        total = torch.zeros_like(vector)
        if not live:
            return total
        outputs = [gradients[name] for name in live]
        along = [vector[places[name]].view_as(self.parameters[name]).to(self.parameters[name].dtype) for name in live]
        inputs = [self.parameters[name] for name in live]
        second = torch.autograd.grad(outputs, inputs, along, retain_graph=True, allow_unused=True)
        for name, part in zip(live, second, strict=True):
            if part is not None:
                total[places[name]] = part.detach().reshape(-1).double()
        return total


class _Run:
    """The recurrence of `lanczos`, given its products from outside, so that many can go in step."""

    def __init__(self, size: int, steps: int, *, seed: int, precision: float, device: torch.device) -> None:
        self.size, self.precision = size, precision
        self._generator = torch.Generator().manual_seed(seed)
        self._basis = torch.zeros(min(steps, size), size, dtype=torch.float64, device=device)
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._breaks: list[int] = []
        self._scale = 0.0
        self._set(self._random())

    @property
    def is_done(self) -> bool:
        return len(self._alphas) == len(self._basis)

    @property
    def vector(self) -> Tensor:
        return self._basis[len(self._alphas)]

    def take(self, image: Tensor) -> None:
        step = len(self._alphas)
        self._alphas.append(float(self.vector @ image))
        self._scale = max(self._scale, float(image.norm()))
        vector = self._orthogonal(image, step + 1)
        self._betas.append(float(vector.norm()))
        is_zero = self._betas[-1] <= max(_BREAKDOWN, _ROUNDINGS * self.precision) * self._scale
        if step + 1 == self.size or is_zero:
            self._breaks.append(step)
            vector = self._orthogonal(self._random(), step + 1)
        if not self.is_done:
            self._set(vector)

    def krylov(self) -> Krylov:
        return Krylov(np.array(self._alphas), np.array(self._betas), tuple(self._breaks), self.size, self.precision)

    def _set(self, vector: Tensor) -> None:
        self._basis[len(self._alphas)] = vector / vector.norm()

    def _random(self) -> Tensor:
        return torch.randn(self.size, generator=self._generator, dtype=torch.float64).to(self._basis)

    def _orthogonal(self, vector: Tensor, num: int) -> Tensor:
        for _ in range(2):
            vector = vector - self._basis[:num].T @ (self._basis[:num] @ vector)
        return vector


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
    runs = {label: _Run(operator.block_size(label), steps, **options) for label in operator.blocks}
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
