import numpy as np
import pytest
import torch

from ssat_probe.measures.bootstrap import ImageStatistics, resample_counts
from ssat_probe.measures.statistics import bootstrap_interval

IMAGES, HEADS = 211, 3


def values(word: str, generator) -> torch.Tensor:
    return torch.randn(IMAGES, HEADS, generator=generator(word), dtype=torch.float64)


def streamed(data: torch.Tensor, size: int, order: torch.Tensor | None = None) -> ImageStatistics:
    one = ImageStatistics()
    order = torch.arange(len(data)) if order is None else order
    for ids in order.split(size):
        one.add(ids, {"x": data[ids]})
    return one


def test_the_interval_agrees_with_the_ordinary_bootstrap(generator):
    data = values("bootstrap", generator)
    low, high = streamed(data, 50).interval("x")
    for head in range(HEADS):
        expected = bootstrap_interval(data[:, head].tolist(), num_resamples=5000)
        width = expected.high - expected.low
        assert abs(low[head] - expected.low) < 0.1 * width
        assert abs(high[head] - expected.high) < 0.1 * width


@pytest.mark.parametrize("size", [1, 7, 64])
def test_neither_batch_size_nor_order_enters(generator, size: int):
    data = values("order", generator)
    data[3, 1] = torch.nan
    shuffled = torch.randperm(IMAGES, generator=generator("shuffle"))
    whole, part = streamed(data, IMAGES), streamed(data, size, shuffled)
    for a, b in zip(whole.spread("x", 1).values(), part.spread("x", 1).values(), strict=True):
        assert a == pytest.approx(b, abs=1e-12)


def test_the_interval_covers_the_truth_about_95_times_in_100(generator):
    data = torch.randn(60, 400, generator=generator("coverage"), dtype=torch.float64)
    one = ImageStatistics()
    one.add(torch.arange(60), {"x": data})
    low, high = one.interval("x")
    assert 0.91 < float(((low < 0) & (high > 0)).double().mean()) < 0.98


def test_a_paired_difference_is_the_bootstrap_of_the_differences(generator):
    first = values("pair", generator)
    second = first + 0.1 + 0.01 * values("noise", generator)
    ours, theirs = streamed(second, 40), streamed(first, 13)
    effect, low, high = ours.difference("x", theirs)
    expected = bootstrap_interval((second - first).mean(1).tolist())
    assert effect == pytest.approx(expected.mean)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=3e-4)
    # Unpaired, the interval would be ten times as wide as this.
    assert high - low < 0.005


def test_the_mean_and_sd_leave_out_what_is_undefined():
    one = streamed(torch.tensor([[1.0], [torch.nan], [3.0]], dtype=torch.float64), 2)
    assert (one.mean("x").item(), one.count("x").item()) == (2, 2)
    assert one.sd("x").item() == pytest.approx(2**0.5)
    assert 1 <= one.interval("x")[0].item() <= one.interval("x")[1].item() <= 3


def test_a_single_image_has_no_interval():
    one = streamed(torch.ones(1, 1), 1)
    assert all(end.isnan().all() for end in one.interval("x"))


def test_without_another_the_differences_are_nan():
    found = streamed(torch.ones(3, 1), 1).differences(("x",), None)
    assert list(found) == ["x_difference", "x_difference_low", "x_difference_high"]
    assert np.isnan(list(found.values())).all()


def test_counts_have_mean_one_and_belong_to_the_image():
    counts = resample_counts(torch.tensor([5, 900]))
    assert counts.mean() == pytest.approx(1, abs=0.1)
    assert torch.equal(counts[1], resample_counts(torch.tensor([900]))[0])
    assert not torch.equal(counts[0], counts[1])
    assert resample_counts(torch.arange(0)).shape == (0, 1000)


def test_an_interval_is_renewed_when_more_images_come(generator):
    data = values("more", generator)
    one = streamed(data[:100], 100)
    before = one.interval("x")
    one.add(torch.arange(100, IMAGES), {"x": data[100:]})
    torch.testing.assert_close(one.interval("x"), streamed(data, IMAGES).interval("x"))
    assert not torch.equal(one.interval("x")[0], before[0])


def test_many_images_of_several_quantities_are_those_of_the_formula(generator):
    # More images than resamples, so that the sums by resample are added to again and again.
    data, single = values("many", generator), values("single", generator)[:, 0]
    data[torch.rand(IMAGES, HEADS, generator=generator("holes")) < 0.1] = torch.nan
    share = values("share", generator).abs()
    one = ImageStatistics(num_resamples=13)
    for ids in torch.arange(IMAGES).split(5):
        one.add(ids, {"x": data[ids], "y": single[ids], "z": share[ids]}, {"z": share[ids]})
    counts = resample_counts(torch.arange(IMAGES), 13).numpy()
    known = ~np.isnan(data.numpy())
    expected = counts.T @ np.nan_to_num(data.numpy()) / (counts.T @ known)
    np.testing.assert_allclose(one.replicates("x"), expected, rtol=1e-12)
    np.testing.assert_allclose(one.replicates("y"), counts.T @ single.numpy() / counts.sum(0), rtol=1e-12)
    np.testing.assert_allclose(one.mean("x"), np.nanmean(data, 0), rtol=1e-12)
    np.testing.assert_allclose(one.sd("x"), np.nanstd(data, 0, ddof=1), rtol=1e-12)
    assert one.mean("y").shape == one.sd("y").shape == ()
    assert one.count("x").tolist() == known.sum(0).tolist()
    assert one.spread("x", 1)["x_undefined"] == pytest.approx(1 - known.mean(0)[1])
    assert one.spread("z", 1)["z_undefined"] == pytest.approx(share[:, 1].mean().item())
