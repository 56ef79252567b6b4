"""Singular values of a matrix whose rows, images, arrive in batches, in constant memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from ssat_probe.measures.tokens import rank_ceiling

# Rows are all equal if their norm about the mean is below this many roundings of their norm.
_DEGENERATE_ROUNDINGS = 8


# Rows kept until they are worth a decomposition. Tuned, no source.
_MOST_WAITING = 64

NUM_GROUPS = 10
"Groups that the jackknife leaves out one after another; memory grows with it. Tuned, no source."


class StreamingSingularValues:
    """Singular values of rows centred over all of them, float64; what is held grows with dim², not with the rows.

    The triangular factor of a QR decomposition is brought up to date with each batch, so that small singular values
    keep the accuracy that those of a summed covariance lose.

    References:
        Chan, Golub & LeVeque (1979), "Updating formulae ..." (means of two parts); Demmel et al. (2012),
        https://arxiv.org/abs/0808.2664 (the factor of a stack from the factors of its parts)
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._count = 0
        self._mean = torch.zeros(0)
        self._factor = torch.zeros(
            0
        )  # rows, while there are few; then the upper triangle of R in a row: half of it is 0
        self._waiting: list[Tensor] = []
        self._squares = 0.0
        self._rounding = 0.0

    def add(self, rows: Float[Tensor, "image dim"]) -> None:
        """Take in one batch.

        Args:
            rows: One per image; as wide in every batch.
        """
        wide = rows.detach().to("cpu", torch.float64)
        self._waiting.append(wide)
        self._squares += float(wide.square().sum())
        self._rounding = torch.finfo(rows.dtype).eps
        if sum(map(len, self._waiting)) >= _MOST_WAITING:
            self._reduce()

    def merge(self, other: "StreamingSingularValues") -> None:
        """Take in everything that another one has seen.

        Args:
            other: As wide; its values stay as they are.
        """
        for one in (self, other):
            one._reduce()
        if other._count:
            self._take_in(other._count, other._mean, other._rows)
            self._squares += other._squares
            self._rounding = max(self._rounding, other._rounding)

    def _reduce(self) -> None:
        if self._waiting:
            rows, self._waiting = torch.cat(self._waiting), []
            self._take_in(len(rows), rows.mean(0), rows - rows.mean(0))

    def _take_in(self, count: int, mean: Tensor, centred: Tensor) -> None:
        """Rows, or the factor of rows, about their mean."""
        if not self._count:
            self._mean, self._factor = torch.zeros_like(mean), torch.zeros(0, len(mean)).double()
        total = self._count + count
        step = mean - self._mean
        apart = (self._count * count / total) ** 0.5 * step
        stack = torch.cat([self._rows, centred, apart[None]])
        is_tall = len(stack) > len(mean)
        self._factor = torch.linalg.qr(stack, mode="r").R[_triangle(len(mean))] if is_tall else stack
        self._mean = self._mean + step * count / total
        self._count = total

    @property
    def _rows(self) -> Tensor:
        """As few rows as have the singular values of all, centred."""
        if self._factor.ndim == 2:
            return self._factor
        rows = self._factor.new_zeros(len(self._mean), len(self._mean))
        rows[_triangle(len(rows))] = self._factor
        return rows

    @property
    def count(self) -> int:
        """Rows seen."""
        return self._count + sum(map(len, self._waiting))

    @property
    def ceiling(self) -> int:
        """Largest rank that the rows can have."""
        self._reduce()
        return rank_ceiling(self._count, len(self._mean))

    @property
    def values(self) -> Float[Tensor, " value"]:
        """As many as `ceiling`, descending; NaN where all rows are equal up to rounding."""
        ceiling = self.ceiling
        values = torch.linalg.svdvals(self._rows)[:ceiling]
        is_degenerate = values.square().sum() ** 0.5 <= _DEGENERATE_ROUNDINGS * self._rounding * self._squares**0.5
        return values.masked_fill(is_degenerate, torch.nan)


class JackknifedSingularValues:
    """As `StreamingSingularValues`, in groups by the number of the image, so that each can be left out.

    Ranks of rows are no means over them: they grow with the number of rows, and a bootstrap's repeated rows make them
    smaller. Leaving out a group changes their number little.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._groups = [StreamingSingularValues() for _ in range(NUM_GROUPS)]

    def add(self, ids: Int[Tensor, " image"], rows: Float[Tensor, "image dim"]) -> None:
        """Take in one batch.

        Args:
            ids: Number of each image within the sample.
            rows: One per image; as wide in every batch.
        """
        for place, group in enumerate(self._groups):
            if (chosen := (ids % NUM_GROUPS == place).to(rows.device)).any():
                group.add(rows[chosen])

    @property
    def whole(self) -> StreamingSingularValues:
        """All groups together."""
        return reduce(_merged, self._groups)

    def without_each(self) -> tuple[list[int], list[Float[Tensor, " value"]]]:
        """Singular values about the mean of all rows but those of a group, one group after another.

        Returns:
            Rows of each group that has any, and the singular values of the others.
        """
        groups = [group for group in self._groups if group.count]
        nothing = StreamingSingularValues()
        before, after = (list(accumulate(order, _merged, initial=nothing)) for order in (groups, groups[::-1]))
        others = [_merged(one, other) for one, other in zip(before[:-1], after[-2::-1], strict=True)]
        return [group.count for group in groups], [one.values for one in others if one.count]

    def spread(self, measures: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, float]:
        """Functions of the singular values, and how sure they are.

        Args:
            measures: From singular values to a number, by name.

        Returns:
            Each ``name``; ``name_sd``, over √images the jackknife's standard error; ``name_low`` and ``name_high``, the
            ends of the 95 % interval with Student's t; ``name_undefined``. NaN below three images.

        References:
            Busing, Meijer & van der Leeden (1999), "Delete-m jackknife for unequal m",
            https://doi.org/10.1023/A:1008800423698
        """
        whole = self.whole
        counts, others = self.without_each()
        result: dict[str, float] = {}
        for name, measure in measures.items():
            value = float(measure(whole.values))
            left_out = [float(measure(one)) for one in others if len(one)]
            error = _standard_error(value, left_out, counts)
            half = error * float(stats.t.ppf(0.975, max(len(counts) - 1, 1)))
            result |= {
                name: value,
                f"{name}_sd": error * whole.count**0.5,
                f"{name}_undefined": float(math.isnan(value)),
            }
            result |= {f"{name}_low": value - half, f"{name}_high": value + half}
        return result


def _triangle(size: int) -> Tensor:
    """(row, column): True on and above the diagonal."""
    return torch.ones(size, size, dtype=torch.bool).triu()


def _merged(one: StreamingSingularValues, other: StreamingSingularValues) -> StreamingSingularValues:
    result = StreamingSingularValues()
    result.merge(one)
    result.merge(other)
    return result


def _standard_error(value: float, left_out: Sequence[float], counts: Sequence[int]) -> float:
    """Of the delete-a-group jackknife: Busing, Meijer & van der Leeden (1999), Eq. 8."""
    if len(counts) < 3:
        return math.nan
    times = [sum(counts) / count for count in counts]
    centre = len(counts) * value - sum((1 - 1 / h) * one for h, one in zip(times, left_out, strict=True))
    parts = [(h * value - (h - 1) * one - centre) ** 2 / (h - 1) for h, one in zip(times, left_out, strict=True)]
    return math.sqrt(sum(parts) / len(counts))
