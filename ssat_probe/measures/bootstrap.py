"""Means over images with bootstrap intervals, while the images stream past, and paired differences of such means."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssat_probe.measures.statistics import StreamingMean

NUM_RESAMPLES = 1000
"Tuned, no source: moves the ends of an interval by a few hundredths of its width."

_SEED = 0x5A7


def resample_counts(ids: Int[Tensor, " image"], num_resamples: int = NUM_RESAMPLES) -> Float[Tensor, "image resample"]:
    """How often each image is drawn in each bootstrap resample: Poisson numbers of mean 1, fixed by the image's id.

    Each image has its own stream of numbers, so that no batch size and no order enters, and two models that see
    the same images are resampled alike: the difference of their resampled means is the paired bootstrap.

    Args:
        ids: Number of each image within the sample, not negative.
        num_resamples: Resamples.

    Returns:
        Counts, float64.

    References:
        Hanley & MacGibbon (2006), "Creating non-parametric bootstrap samples using Poisson frequencies"; Chamandy et
        al. (2012), "Estimating uncertainty for massive data streams" (for streams).
    """
    draws = [np.random.default_rng([_SEED, int(one)]).poisson(1.0, num_resamples) for one in ids]
    return torch.from_numpy(np.stack(draws).astype(np.float64)) if draws else torch.zeros(0, num_resamples).double()


class ImageStatistics:
    """Mean, standard deviation and 95 % bootstrap interval over images of several named quantities, in constant memory.

    Undefined (NaN) values are left out. What it holds grows with the number of resamples and of entries, not of images.
    """

    def __init__(self, num_resamples: int = NUM_RESAMPLES) -> None:
        """Nothing seen yet.

        Args:
            num_resamples: Resamples of the bootstrap.
        """
        self._num_resamples = num_resamples
        self._means: dict[str, StreamingMean] = {}
        self._undefined: dict[str, StreamingMean] = {}
        self._sums: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._intervals: dict[str, tuple[Tensor, Tensor]] = {}  # sorting the resamples takes long

    def add(
        self, ids: Int[Tensor, " image"], values: Mapping[str, Tensor], undefined: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take in one batch.

        Args:
            ids: Number of each image within the sample.
            values: (image, *entry) per name; the same names and entries in every batch.
            undefined: Of the same shapes: fraction of what each value is a mean of that does not exist. For names
                without one, 1 where the value is NaN, else 0.
        """
        counts = _counts(tuple(ids.tolist()), self._num_resamples)
        self._intervals.clear()
        for name, value in values.items():
            value = value.detach().to("cpu", torch.float64)
            is_defined = ~value.isnan()
            sums = torch.tensordot(counts, value.nan_to_num(nan=0.0), dims=([0], [0]))
            totals = torch.tensordot(counts, is_defined.double(), dims=([0], [0]))
            self._means.setdefault(name, StreamingMean()).add(value)
            share = (undefined or {}).get(name, (~is_defined).double())
            self._undefined.setdefault(name, StreamingMean()).add(share)
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
            self._totals[name] = self._totals[name] + totals if name in self._totals else totals

    def mean(self, name: str) -> Float[Tensor, " *entry"]:
        """Mean over the images for which a quantity is defined.

        Args:
            name: Of the quantity.

        Returns:
            Float64; NaN where it is defined for no image.
        """
        return self._means[name].mean

    def sd(self, name: str) -> Float[Tensor, " *entry"]:
        """Standard deviation over images.

        Args:
            name: Of the quantity.

        Returns:
            With n - 1 in the denominator; NaN below two images.
        """
        return self._means[name].sd

    def count(self, name: str) -> Float[Tensor, " *entry"]:
        """Number of images for which a quantity is defined.

        Args:
            name: Of the quantity.

        Returns:
            Whole numbers, float64.
        """
        return self._means[name].count

    def replicates(self, name: str) -> Float[Tensor, " resample *entry"]:
        """Means of the bootstrap resamples.

        Args:
            name: Of the quantity.

        Returns:
            NaN where a resample holds no image, and everywhere below two images.
        """
        totals = torch.where((self._totals[name] > 0) & (self.count(name) > 1), self._totals[name], torch.nan)
        return self._sums[name] / totals

    def interval(self, name: str) -> tuple[Float[Tensor, " *entry"], Float[Tensor, " *entry"]]:
        """95 % bootstrap interval over images of a mean.

        Args:
            name: Of the quantity.

        Returns:
            Lower and upper ends; NaN below two images.
        """
        if name not in self._intervals:
            self._intervals[name] = ends(self.replicates(name))
        return self._intervals[name]

    def difference(self, name: str, other: "ImageStatistics", entry: int | None = None) -> tuple[float, float, float]:
        """Mean difference to another model over the same images, with its paired 95 % interval.

        Args:
            name: Of the quantity.
            other: Of the model to compare with; has seen the same images under the same ids.
            entry: Which entry; None is the mean over all of them.

        Returns:
            This minus the other, and the ends of the interval.
        """
        chosen: Any = ... if entry is None else entry
        means = [one.mean(name)[chosen].nanmean() for one in (self, other)]
        ours, theirs = (_over_entries(one.replicates(name)[:, chosen]) for one in (self, other))
        low, high = ends(ours - theirs)
        return float(means[0] - means[1]), float(low), float(high)

    def spread(self, name: str, entry: int | tuple[int, ...] = ()) -> dict[str, float]:
        """What a table says about one quantity: see `ssat_probe.table.with_spread`.

        Args:
            name: Of the quantity.
            entry: Which entry.

        Returns:
            ``name``, ``name_sd``, ``name_low``, ``name_high`` and ``name_undefined``.
        """
        low, high = self.interval(name)
        values = {name: self.mean(name), f"{name}_sd": self.sd(name), f"{name}_low": low, f"{name}_high": high}
        values |= {f"{name}_undefined": self._undefined[name].mean}
        return {key: float(value[entry]) for key, value in values.items()}

    def differences(
        self, names: tuple[str, ...], other: "ImageStatistics | None", entry: int | None = None
    ) -> dict[str, float]:
        """What a table says about differences: see `ssat_probe.table.with_difference`.

        Args:
            names: Of the quantities.
            other: As for `difference`; NaN is returned if there is none.
            entry: As for `difference`.

        Returns:
            ``name_difference``, ``name_difference_low`` and ``name_difference_high`` of each.
        """
        result: dict[str, float] = {}
        for name in names:
            values = (float("nan"),) * 3 if other is None else self.difference(name, other, entry)
            result |= dict(zip((f"{name}_difference{end}" for end in ("", "_low", "_high")), values, strict=True))
        return result


@lru_cache(maxsize=2)
def _counts(ids: tuple[int, ...], num_resamples: int) -> Tensor:
    """As `resample_counts`, once per batch for all blocks and measures."""
    return resample_counts(torch.tensor(ids, dtype=torch.int64), num_resamples)


def _over_entries(replicates: Tensor) -> Tensor:
    return replicates.reshape(len(replicates), -1).nanmean(-1)


def ends(replicates: Float[Tensor, " resample *entry"]) -> tuple[Float[Tensor, " *entry"], Float[Tensor, " *entry"]]:
    """95 % interval of what resamples gave.

    Args:
        replicates: NaN where a resample gives nothing.

    Returns:
        Their quantiles of 2.5 and 97.5 %.
    """
    low, high = torch.nanquantile(replicates, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return low, high
