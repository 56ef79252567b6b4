"""Means, intervals and verdicts: what may be said from few seeds or many images."""

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

Verdict = Literal["supported", "contradicted", "inconclusive"]

# Resamples drawn at a time, so that memory does not grow with their number.
_CHUNK = 256


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval, in the unit of the values; NaN where undefined."""

    mean: float
    low: float
    high: float


class StreamingMean:
    """Mean and standard deviation over images that arrive in batches, entry by entry, in float64.

    Undefined (NaN) entries are left out and not counted. The result does not depend on how the images were cut into
    batches, up to the rounding of float64.

    References:
        Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    def __init__(self) -> None:
        """Nothing seen yet; the shape of an entry is that of the first batch."""
        self._count: Tensor | None = None
        self._mean = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, values: Float[Tensor, " image *entry"]) -> None:
        """Take in one batch.

        Args:
            values: One value per image, images first; NaN where undefined. A ValueError if the entries have another
                shape than before.
        """
        values = values.detach().to("cpu", torch.float64)
        is_defined = ~values.isnan()
        count = is_defined.sum(0).double()
        mean = values.nan_to_num(nan=0.0).sum(0) / count.clamp(min=1)
        squares = torch.where(is_defined, values - mean, 0.0).square().sum(0)
        self._merge(count, mean, squares)

    def merge(self, other: "StreamingMean") -> None:
        """Take in everything that another one has seen.

        Args:
            other: Left as it is. A ValueError if its entries have another shape.
        """
        if other._count is not None:
            self._merge(other._count, other._mean, other._squares)

    def _merge(self, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        if self._count is None:
            self._count, self._mean, self._squares = count.clone(), mean.clone(), squares.clone()
            return
        if count.shape != self._count.shape:
            raise ValueError(
                f"Every batch must have entries of shape {tuple(self._count.shape)}, got {tuple(count.shape)}. "
                "Use one StreamingMean per quantity."
            )
        total = self._count + count
        share = count / total.clamp(min=1)
        step = mean - self._mean
        self._squares = self._squares + squares + step.square() * self._count * share
        self._mean = self._mean + step * share
        self._count = total

    def _seen(self) -> Tensor:
        if self._count is None:
            raise ValueError("A mean needs at least one batch, got none. Check that the images are not empty.")
        return self._count

    @property
    def count(self) -> Float[Tensor, " *entry"]:
        """Number of defined values per entry."""
        return self._seen()

    @property
    def mean(self) -> Float[Tensor, " *entry"]:
        """Mean of the defined values; NaN where there was none."""
        return torch.where(self._seen() > 0, self._mean, torch.nan)

    @property
    def sd(self) -> Float[Tensor, " *entry"]:
        """Standard deviation over the images (n - 1 in the denominator); NaN below two values."""
        count = self._seen()
        return torch.where(count > 1, (self._squares / (count - 1).clamp(min=1)).sqrt(), torch.nan)


def quantiles_of_defined(
    values: Float[Tensor, "*entry row"], shares: tuple[float, ...]
) -> tuple[Float[Tensor, "*entry"], ...]:
    """Quantiles over the last axis of the values that are not NaN.

    Args:
        values: NaN where undefined.
        shares: Between 0 and 1; 0.5 gives the median.

    Returns:
        One each, between neighbours in proportion, as numpy's ``nanquantile``; NaN where none is defined.
    """
    ordered = values.sort(-1).values  # NaN comes last
    last = ((~values.isnan()).sum(-1, keepdim=True) - 1).clamp(min=0)
    found = []
    for share in shares:
        place = share * last.double()
        low, high = (ordered.gather(-1, at.long()) for at in (place.floor(), place.ceil()))
        found.append((low + (high - low) * (place - place.floor()))[..., 0])
    return tuple(found)


def bootstrap_interval(
    values: Iterable[float], *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of many values with its percentile bootstrap interval.

    For values of independent images; for a handful of seeds use `t_interval`, which the bootstrap undercuts.

    Args:
        values: One number per image; a NaN among them makes the result NaN.
        confidence: Between 0 and 1, else a ValueError.
        num_resamples: Tuned, no source: moves the ends by about a hundredth of the width.
        seed: Of the generator that draws the resamples; nothing global is touched.

    Returns:
        Mean and interval in the unit of the values. The ends are NaN below two values.

    References:
        Efron & Tibshirani (1993), "An introduction to the bootstrap", Sec. 13.3.
    """
    _check(confidence)
    sample = np.fromiter(values, dtype=np.float64)
    if len(sample) < 2 or np.isnan(sample).any():
        return Interval(_mean(sample), math.nan, math.nan)
    generator = np.random.default_rng(seed)
    sizes = [min(_CHUNK, num_resamples - start) for start in range(0, num_resamples, _CHUNK)]
    draws = (generator.integers(len(sample), size=(size, len(sample))) for size in sizes)
    means = np.concatenate([sample[draw].mean(axis=1) for draw in draws])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(_mean(sample), float(low), float(high))


def t_interval(values: Iterable[float], *, confidence: float = 0.95) -> Interval:
    """Mean of few values, such as one per seed, with Student's t interval.

    Args:
        values: One number per seed; a NaN among them makes the result NaN, so that no seed is dropped in silence.
        confidence: Between 0 and 1, else a ValueError.

    Returns:
        Mean and interval in the unit of the values. The ends are NaN below two values.

    Example:
        >>> t_interval([1.0, 2.0, 3.0]).mean
        2.0
    """
    _check(confidence)
    sample = np.fromiter(values, dtype=np.float64)
    mean = _mean(sample)
    if len(sample) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + confidence) / 2, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))
    return Interval(mean, mean - half, mean + half)


def paired_difference(
    first: Mapping[Hashable, float], second: Mapping[Hashable, float], *, confidence: float = 0.95
) -> Interval:
    """Mean of ``first - second`` over the seeds that both have, with the t interval of the differences.

    Pairs by seed, because two methods with one seed share data order and initial weights.

    Args:
        first: Value per seed.
        second: Value per seed.
        confidence: Between 0 and 1, else a ValueError.

    Returns:
        Mean and interval of the differences. The ends are NaN below two common seeds.

    Raises:
        ValueError: If no seed is common.
    """
    common = [seed for seed in first if seed in second]
    if not common:
        raise ValueError(
            f"A paired difference needs a common seed, got {list(first)} and {list(second)}. Train both with one seed."
        )
    return t_interval([first[seed] - second[seed] for seed in common], confidence=confidence)


def verdict(low: float, high: float, claimed_sign: int) -> Verdict:
    """What an interval of an effect says about a claim on the effect's sign.

    Args:
        low: Lower end of the interval of the effect.
        high: Upper end.
        claimed_sign: 1 if the claim is that the effect is positive, -1 if negative.

    Returns:
        ``supported`` if the whole interval lies on the claimed side of 0, ``contradicted`` if the whole interval lies
        on the other side, ``inconclusive`` if it contains 0 or is undefined.

    Raises:
        ValueError: If the sign is not 1 or -1, or the ends are in the wrong order.

    Example:
        >>> verdict(0.2, 0.7, claimed_sign=1)
        'supported'
    """
    if claimed_sign not in (-1, 1):
        raise ValueError(f"claimed_sign must be 1 or -1, got {claimed_sign!r}.")
    if low > high:
        raise ValueError(f"low must not exceed high, got {low} and {high}.")
    if claimed_sign * low > 0 and claimed_sign * high > 0:
        return "supported"
    if claimed_sign * low < 0 and claimed_sign * high < 0:
        return "contradicted"
    return "inconclusive"


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}. Write 0.95 for 95 percent.")


def _mean(sample: np.ndarray) -> float:
    return float(sample.mean()) if len(sample) else math.nan
