"""Means over images with bootstrap intervals, while the images stream past, and paired differences of such means."""

from collections.abc import Mapping, Sequence
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

# Images whose resampling is looked at together.
_AT_A_TIME = 64


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

    Undefined (NaN) values are left out. Values wait until as many images as resamples are there, and then go into sums
    by resample: what it holds grows with the images up to these sums, of one number per resample and entry.
    """

    def __init__(self, num_resamples: int = NUM_RESAMPLES) -> None:
        """Nothing seen yet.

        Args:
            num_resamples: Resamples of the bootstrap.
        """
        self._num_resamples = num_resamples
        self._places: dict[str, tuple[slice, torch.Size]] = {}  # of a name among the entries of all
        self._waiting: list[tuple[list[int], Tensor]] = []
        self._means = StreamingMean()
        self._num_images = 0
        self._undefined = torch.zeros(1, dtype=torch.float64)  # sums over images
        self._sums = self._drawn = torch.zeros(num_resamples, 1, dtype=torch.float64)
        self._missing: dict[str, Tensor] = {}  # images drawn without a value, for names that have such
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
        if not self._places:
            end = 0
            for name, value in values.items():
                start, end = end, end + value[0].numel()
                self._places[name] = slice(start, end), value.shape[1:]
        rows = _flat([values[name] for name in self._places])
        shares = rows.isnan().sum(0).double()
        for name, share in (undefined or {}).items():
            shares[self._places[name][0]] = share.sum(0).flatten().to(shares)
        self._undefined = self._undefined + shares
        self._num_images += len(rows)
        self._waiting.append((ids.tolist(), rows))
        self._intervals.clear()
        if sum(len(one) for one, _ in self._waiting) >= self._num_resamples:
            self._settle()

    def _settle(self) -> None:
        """Take what waits into the sums."""
        if not self._waiting:
            return
        ids = [one for some, _ in self._waiting for one in some]
        values = torch.cat([rows for _, rows in self._waiting])
        self._waiting.clear()
        self._means.add(values)
        for start in range(0, len(ids), _AT_A_TIME):
            counts = _counts(tuple(ids[start : start + _AT_A_TIME]), self._num_resamples).double().mT
            part = values[start : start + _AT_A_TIME]
            self._sums = self._sums + counts @ part.nan_to_num(nan=0.0)
            self._drawn = self._drawn + counts.sum(1, keepdim=True)
            for name, (place, _) in self._places.items():
                is_missing = part[:, place].isnan()
                if is_missing.any():
                    self._missing[name] = self._missing.get(name, 0.0) + counts @ is_missing.double()

    def _of(self, rows: Tensor, name: str) -> Tensor:
        """What belongs to a name, in the shape of its entries."""
        place, shape = self._places[name]
        return rows[..., place].unflatten(-1, shape) if shape else rows[..., place.start]

    def mean(self, name: str) -> Float[Tensor, " *entry"]:
        """Mean over the images for which a quantity is defined.

        Args:
            name: Of the quantity.

        Returns:
            Float64; NaN where it is defined for no image.
        """
        self._settle()
        return self._of(self._means.mean, name)

    def sd(self, name: str) -> Float[Tensor, " *entry"]:
        """Standard deviation over images.

        Args:
            name: Of the quantity.

        Returns:
            With n - 1 in the denominator; NaN below two images.
        """
        self._settle()
        return self._of(self._means.sd, name)

    def count(self, name: str) -> Float[Tensor, " *entry"]:
        """Number of images for which a quantity is defined.

        Args:
            name: Of the quantity.

        Returns:
            Whole numbers, float64.
        """
        self._settle()
        return self._of(self._means.count, name)

    def replicates(self, name: str) -> Float[Tensor, " resample *entry"]:
        """Means of the bootstrap resamples.

        Args:
            name: Of the quantity.

        Returns:
            NaN where a resample holds no image, and everywhere below two images.
        """
        count, place = self.count(name), self._places[name][0]
        totals = self._drawn - self._missing.get(name, torch.zeros(place.stop - place.start))
        means = self._sums[:, place] / totals.where(totals > 0, torch.nan)
        return means.reshape(-1, *count.shape).where(count > 1, torch.nan)

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
        values |= {f"{name}_undefined": self._of(self._undefined / self._num_images, name)}
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


@lru_cache(maxsize=32)
def _counts(ids: tuple[int, ...], num_resamples: int) -> Tensor:
    """As `resample_counts`, once for all blocks and measures; as bytes, since no Poisson number of mean 1 is large."""
    return resample_counts(torch.tensor(ids, dtype=torch.int64), num_resamples).byte()


def _flat(values: Sequence[Tensor]) -> Tensor:
    """(image, entry): those of all names, side by side."""
    return torch.cat([value.detach().reshape(len(value), -1).double() for value in values], 1).cpu()


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
