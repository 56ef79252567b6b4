import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from ssat_probe.measures.statistics import (
    Interval,
    StreamingMean,
    bootstrap_interval,
    paired_difference,
    quantiles_of_defined,
    t_interval,
    verdict,
)

IMAGES, HEADS = 13, 3


def values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return 1e3 + torch.randn(IMAGES, HEADS, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_mean_and_sd_do_not_depend_on_the_batches(size: int):
    streaming = StreamingMean()
    for batch in values().split(size):
        streaming.add(batch)
    torch.testing.assert_close(streaming.mean, values().mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(streaming.sd, values().std(0), rtol=0, atol=1e-12)
    assert streaming.count.tolist() == [IMAGES] * HEADS


def test_merged_means_equal_the_mean_of_all():
    first, second = StreamingMean(), StreamingMean()
    first.add(values()[:5])
    second.add(values()[5:])
    first.merge(second)
    first.merge(StreamingMean())
    torch.testing.assert_close(first.mean, values().mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(first.sd, values().std(0), rtol=0, atol=1e-12)


def test_undefined_values_are_left_out_entry_by_entry():
    some = values()
    some[::2, 1] = torch.nan
    some[:, 2] = torch.nan
    streaming = StreamingMean()
    for batch in some.split(4):
        streaming.add(batch)
    assert streaming.count.tolist() == [13, 6, 0]
    torch.testing.assert_close(streaming.mean[1], some[1::2, 1].mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(streaming.sd[1], some[1::2, 1].std(), rtol=0, atol=1e-12)
    assert streaming.mean[2].isnan()


def test_one_image_has_a_mean_but_no_sd():
    streaming = StreamingMean()
    streaming.add(torch.tensor([5.0]))
    assert streaming.mean.item() == 5
    assert streaming.sd.isnan()


def test_float32_values_are_summed_in_float64():
    streaming = StreamingMean()
    for _ in range(1000):
        streaming.add(torch.full((1,), 0.1))
    assert streaming.mean.item() == pytest.approx(torch.tensor(0.1).item(), abs=1e-14)


def test_mean_of_nothing_and_entries_of_another_shape_are_refused():
    streaming = StreamingMean()
    with pytest.raises(ValueError, match="needs at least one batch, got none"):
        _ = streaming.mean
    streaming.add(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"entries of shape \(3,\), got \(5,\)"):
        streaming.add(torch.zeros(2, 5))


def test_quantiles_of_defined_values_are_those_of_numpy():
    rows = torch.tensor([[3.0, 1.0, torch.nan, 2.0, torch.nan], [4.0, torch.nan, 1.0, 3.0, 9.0], [5.0] * 5])
    shares = (0.25, 0.5, 0.75, 1.0)
    found = quantiles_of_defined(rows, shares)
    np.testing.assert_allclose(torch.stack(found), np.nanquantile(rows.numpy(), shares, axis=1), rtol=1e-14)
    assert quantiles_of_defined(torch.full((2, 3), torch.nan), (0.5,))[0].isnan().all()


def test_t_interval_is_that_of_scipy():
    few = [0.3, 0.9, 0.4]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(few), scale=stats.sem(few))
    assert t_interval(few) == pytest.approx((np.mean(few), low, high), abs=1e-12)
    assert t_interval(pd.Series(few)) == t_interval(np.array(few)) == t_interval(few)


def test_t_interval_of_equal_values_has_no_width():
    assert t_interval([2.0, 2.0, 2.0]) == Interval(2, 2, 2)


def test_t_interval_covers_the_true_mean_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(size=(2000, 3))
    intervals = [t_interval(sample) for sample in samples]
    # Binomial standard deviation of the coverage: 0.005.
    assert np.mean([i.low <= 0 <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("interval", [t_interval, bootstrap_interval])
def test_interval_of_fewer_than_two_values_is_undefined(interval):
    one, none = interval([4.0]), interval([])
    assert one.mean == 4
    assert math.isnan(none.mean)
    assert all(math.isnan(end) for end in (one.low, one.high, none.low, none.high))


@pytest.mark.parametrize("interval", [t_interval, bootstrap_interval])
def test_undefined_value_makes_the_interval_undefined(interval):
    assert all(math.isnan(part) for part in interval([1.0, math.nan, 2.0]))


@pytest.mark.parametrize("interval", [t_interval, bootstrap_interval])
def test_confidence_outside_its_range_is_refused(interval):
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        interval([1.0, 2.0], confidence=95.0)


def test_bootstrap_interval_agrees_with_the_normal_one_for_many_values():
    many = np.random.default_rng(1).normal(2, 1, size=1009)
    result = bootstrap_interval(many)
    half = 1.96 * many.std(ddof=1) / math.sqrt(len(many))
    assert result.mean == pytest.approx(many.mean(), abs=1e-12)
    assert result.high - result.low == pytest.approx(2 * half, rel=0.05)


def test_bootstrap_interval_is_the_same_twice_and_leaves_the_global_generator():
    many = np.random.default_rng(1).normal(size=53)
    before = np.random.get_state()[1].copy()
    assert bootstrap_interval(many) == bootstrap_interval(many)
    assert bootstrap_interval(many) != bootstrap_interval(many, seed=1)
    assert (np.random.get_state()[1] == before).all()


def test_paired_difference_matches_by_seed():
    ours = {0: 1.0, 1: 2.0, 2: 4.0}
    theirs = {2: 3.0, 1: 1.5, 0: 0.0, 5: 100.0}
    assert paired_difference(ours, theirs) == t_interval([1.0, 0.5, 1.0])


def test_paired_difference_needs_a_common_seed():
    with pytest.raises(ValueError, match=r"needs a common seed, got \[0\] and \[1, 2\]"):
        paired_difference({0: 1.0}, {1: 1.0, 2: 2.0})


@pytest.mark.parametrize(
    ("low", "high", "sign", "expected"),
    [
        (0.1, 0.2, 1, "supported"),
        (0.1, 0.2, -1, "contradicted"),
        (-0.2, -0.1, -1, "supported"),
        (-0.2, -0.1, 1, "contradicted"),
        (-0.1, 0.2, 1, "inconclusive"),
        (0.0, 0.2, 1, "inconclusive"),
        (-0.2, 0.0, 1, "inconclusive"),
        (math.nan, math.nan, 1, "inconclusive"),
        (0.1, math.nan, 1, "inconclusive"),
    ],
)
def test_verdict_follows_from_the_interval(low: float, high: float, sign: int, expected: str):
    assert verdict(low, high, sign) == expected


def test_verdict_refuses_nonsense():
    with pytest.raises(ValueError, match="claimed_sign must be 1 or -1, got 0"):
        verdict(0.1, 0.2, 0)
    with pytest.raises(ValueError, match=r"low must not exceed high, got 0\.3 and 0\.2"):
        verdict(0.3, 0.2, 1)
