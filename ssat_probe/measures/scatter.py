"""Singular values of a matrix whose rows, images, arrive in batches, in constant memory."""

import torch
from jaxtyping import Float
from torch import Tensor

from ssat_probe.measures.tokens import rank_ceiling

# Rows are all equal if their norm about the mean is below this many roundings of their norm.
_DEGENERATE_ROUNDINGS = 8


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
        self.count = 0
        "Rows seen."
        self._mean = torch.zeros(0)
        self._factor = torch.zeros(0)
        self._squares = 0.0
        self._rounding = 0.0

    def add(self, rows: Float[Tensor, "image dim"]) -> None:
        """Take in one batch.

        Args:
            rows: One per image; as wide in every batch.
        """
        wide = rows.detach().to("cpu", torch.float64)
        if not self.count:
            self._mean, self._factor = torch.zeros(wide.shape[1]).double(), torch.zeros(0, wide.shape[1]).double()
        mean, total = wide.mean(0), self.count + len(wide)
        step = mean - self._mean
        apart = (self.count * len(wide) / total) ** 0.5 * step
        self._factor = torch.linalg.qr(torch.cat([self._factor, wide - mean, apart[None]]), mode="r").R
        self._mean = self._mean + step * len(wide) / total
        self._squares += float(wide.square().sum())
        self._rounding = torch.finfo(rows.dtype).eps
        self.count = total

    @property
    def ceiling(self) -> int:
        """Largest rank that the rows can have."""
        return rank_ceiling(self.count, len(self._mean))

    @property
    def values(self) -> Float[Tensor, " value"]:
        """As many as `ceiling`, descending; NaN where all rows are equal up to rounding."""
        values = torch.linalg.svdvals(self._factor)[: self.ceiling]
        is_degenerate = values.square().sum() ** 0.5 <= _DEGENERATE_ROUNDINGS * self._rounding * self._squares**0.5
        return values.masked_fill(is_degenerate, torch.nan)
