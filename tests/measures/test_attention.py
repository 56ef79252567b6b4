import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from ssat_probe.measures import attention

BATCH, HEADS, QUERIES, KEYS = 2, 3, 5, 7


def random_scores(scale: float = 2.0, keys: int = KEYS, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return scale * torch.randn(BATCH, HEADS, QUERIES, keys, generator=generator, dtype=dtype)


def row(*weights: float) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64)[None, None, None]


def uniform_on(count: int, keys: int) -> torch.Tensor:
    return row(*([1 / count] * count + [0.0] * (keys - count)))


def test_entropy_of_uniform_attention_is_log_of_the_number_of_keys():
    weights = torch.full((BATCH, HEADS, QUERIES, KEYS), 1 / KEYS, dtype=torch.float64)
    entropy = attention.entropy(weights)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(KEYS)), rtol=0, atol=1e-14)
    normalised = attention.normalised_entropy(entropy, attention.num_keys(weights))
    torch.testing.assert_close(normalised, torch.ones_like(normalised), rtol=0, atol=1e-14)


def test_entropy_of_uniform_attention_is_exact_from_scores():
    entropy = attention.entropy_from_scores(torch.full((BATCH, HEADS, QUERIES, KEYS), 1e3))
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(KEYS)), rtol=0, atol=1e-14)


def test_one_hot_row_has_no_entropy_and_the_largest_kurtosis():
    weights = uniform_on(1, KEYS)
    assert attention.entropy(weights).item() == 0
    kurtosis, skew = attention.excess_kurtosis_and_skewness(weights)
    assert kurtosis.item() == pytest.approx(KEYS - 2 + 1 / (KEYS - 1) - 3, abs=1e-12)
    assert attention.normalised_kurtosis(kurtosis, attention.num_keys(weights)).item() == pytest.approx(1, abs=1e-12)
    assert skew.item() > 0


@pytest.mark.parametrize(("keys", "pearson"), [(196, 194.005), (49, 47.02), (784, 782.001)])
def test_kurtosis_of_a_one_hot_row_at_usual_sizes(keys: int, pearson: float):
    # Values made with scipy 1.17.
    assert attention.excess_kurtosis(uniform_on(1, keys)).item() + 3 == pytest.approx(pearson, abs=1e-2)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_uniform_on_some_keys_has_closed_forms(count: int):
    weights, share = uniform_on(count, KEYS), count / KEYS
    assert attention.entropy(weights).item() == pytest.approx(math.log(count), abs=1e-12)
    assert attention.excess_kurtosis(weights).item() == pytest.approx(KEYS**2 / (count * (KEYS - count)) - 6, abs=1e-12)
    expected = (1 - 2 * share) / math.sqrt(share * (1 - share))
    assert attention.skewness(weights).item() == pytest.approx(expected, abs=1e-12)


def test_half_of_the_keys_gives_the_smallest_kurtosis():
    weights = uniform_on(4, 8)
    kurtosis = attention.excess_kurtosis(weights)
    assert kurtosis.item() == pytest.approx(-2, abs=1e-12)
    assert attention.normalised_kurtosis(kurtosis, attention.num_keys(weights)).item() == pytest.approx(0, abs=1e-12)


def test_hole_has_the_kurtosis_of_a_spike_but_negative_skew():
    hole, spike = row(0.0, *[1 / (KEYS - 1)] * (KEYS - 1)), uniform_on(1, KEYS)
    torch.testing.assert_close(attention.excess_kurtosis(hole), attention.excess_kurtosis(spike), rtol=0, atol=1e-11)
    assert attention.skewness(hole).item() < 0
    assert attention.entropy(hole).item() == pytest.approx(math.log(KEYS - 1), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keys", [7, 49, 196, 197])
def test_uniform_row_has_no_kurtosis_whatever_rounding_says(keys: int, dtype: torch.dtype):
    weights = torch.zeros(1, 1, 1, keys, dtype=dtype).softmax(-1)
    kurtosis, skew = attention.excess_kurtosis_and_skewness(weights)
    assert kurtosis.isnan().all()
    assert skew.isnan().all()


def test_rounded_softmax_is_judged_by_the_dtype_of_the_softmax():
    weights = (torch.full((1, 1, 1, KEYS), 1 / KEYS) + torch.tensor([1e-5] + [0.0] * (KEYS - 1))).double()
    assert attention.excess_kurtosis(weights).isfinite().all()
    assert attention.excess_kurtosis(weights, softmax_dtype=torch.float16).isnan().all()


def test_small_variances_do_not_kill_the_kurtosis():
    # MEASURES fact 6: an absolute epsilon gives 0.0005 instead of about 7 for such rows.
    scores = 0.5 * torch.randn(1, 1, 211, 196, generator=torch.Generator().manual_seed(0))
    weights = scores.softmax(-1)
    expected = stats.kurtosis(weights.double().numpy(), axis=-1)
    np.testing.assert_allclose(attention.excess_kurtosis(weights).numpy(), expected, rtol=1e-4)


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(0.01, 30), keys=st.integers(2, 41), seed=st.integers(0, 10_000))
def test_against_scipy(scale: float, keys: int, seed: int):
    scores = scale * torch.randn(1, 2, 3, keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = scores.softmax(-1)
    expected = special.entr(weights.numpy()).sum(-1)
    np.testing.assert_allclose(attention.entropy(weights).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(attention.entropy_from_scores(scores).numpy(), expected, atol=1e-12)
    kurtosis, skew = attention.excess_kurtosis_and_skewness(weights)
    np.testing.assert_allclose(kurtosis.numpy(), stats.kurtosis(weights.numpy(), axis=-1), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(skew.numpy(), stats.skew(weights.numpy(), axis=-1), rtol=1e-8, atol=1e-8)
    low, high = attention.kurtosis_bounds(attention.num_keys(weights))
    assert ((kurtosis >= low - 1e-9) & (kurtosis <= high + 1e-9)).all()


def test_entropy_from_scores_agrees_with_that_of_the_weights_in_float32():
    scores = random_scores(scale=5, keys=197, dtype=torch.float32)
    expected = attention.entropy(scores.double().softmax(-1))
    torch.testing.assert_close(attention.entropy_from_scores(scores), expected, rtol=0, atol=1e-5)


def test_entropy_from_scores_is_zero_where_other_weights_underflow():
    assert attention.entropy_from_scores(row(0.0, -1e4, -torch.inf)).item() == 0


def test_measures_do_not_depend_on_the_order_of_the_keys():
    scores, order = random_scores(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    for measure in (attention.entropy_from_scores, lambda s: attention.excess_kurtosis(s.softmax(-1))):
        torch.testing.assert_close(measure(scores[..., order]), measure(scores), rtol=0, atol=1e-12)


@pytest.mark.parametrize("spare", [0.0, 17.0])
def test_invalid_keys_are_as_if_they_were_not_there(spare: float):
    scores, part = random_scores(), slice(0, 4)
    is_valid = torch.zeros(1, 1, QUERIES, KEYS, dtype=torch.bool)
    is_valid[..., part] = True
    masked = scores.clone()
    masked[..., 4:] = spare
    weights = attention.weights_from_scores(masked, is_valid)
    assert (weights[..., 4:] == 0).all()
    expected = scores[..., part].softmax(-1)
    torch.testing.assert_close(weights[..., part], expected)
    torch.testing.assert_close(attention.entropy_from_scores(masked, is_valid), attention.entropy(expected))
    torch.testing.assert_close(attention.entropy(weights, is_valid), attention.entropy(expected))
    for ours, theirs in zip(
        attention.excess_kurtosis_and_skewness(weights, is_valid),
        attention.excess_kurtosis_and_skewness(expected),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert (attention.num_keys(weights, is_valid) == 4).all()


def test_renormalised_weights_equal_the_softmax_over_that_part():
    scores, part = random_scores(), slice(1, None)
    ours = attention.renormalised(scores.softmax(-1)[..., part])
    torch.testing.assert_close(ours, attention.weights_from_scores(scores[..., part]))
    is_valid = torch.ones(1, 1, 1, KEYS, dtype=torch.bool).expand(1, 1, QUERIES, KEYS).clone()
    is_valid[..., 0] = False
    masked = attention.renormalised(scores.softmax(-1), is_valid)
    torch.testing.assert_close(masked[..., part], ours)


def test_rows_without_a_valid_key_are_undefined():
    scores = random_scores()
    is_valid = torch.ones(1, 1, QUERIES, KEYS, dtype=torch.bool)
    is_valid[0, 0, 2] = False
    weights = attention.weights_from_scores(scores, is_valid)
    for result in (attention.entropy_from_scores(scores, is_valid), attention.excess_kurtosis(weights, is_valid)):
        assert result[:, :, 2].isnan().all()
        assert result[:, :, [0, 1, 3, 4]].isfinite().all()
    assert attention.renormalised(torch.zeros(1, 1, 1, KEYS)).isnan().all()


def test_normalised_forms_are_undefined_for_too_few_keys():
    values, counts = torch.zeros(1, 1, 3, dtype=torch.float64), torch.tensor([[[1, 2, 3]]])
    assert attention.normalised_entropy(values, counts).isnan().tolist() == [[[True, False, False]]]
    assert attention.normalised_kurtosis(values, counts).isnan().tolist() == [[[True, True, False]]]


def test_entropy_splits_exactly_into_the_mass_of_groups_and_their_spread():
    scores = random_scores()
    weights = scores.softmax(-1)
    mass = torch.stack([weights[..., :2].sum(-1), weights[..., 2:].sum(-1)], -1)
    inner = torch.stack([attention.entropy_from_scores(scores[..., part]) for part in (slice(2), slice(2, None))], -1)
    torch.testing.assert_close(attention.entropy(mass) + (mass * inner).sum(-1), attention.entropy(weights))


def test_half_precision_is_widened_before_summing():
    assert attention.entropy(torch.zeros(1, 1, 1, 8, dtype=torch.float16).softmax(-1)).dtype == torch.float64


def test_weights_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match=r"must sum to 1 over the valid keys, got sums from 2 to 2\. Pass them"):
        attention.entropy(torch.full((1, 1, 2, 4), 0.5))


def test_all_measures_of_a_row_at_once_are_those_one_by_one():
    scores = random_scores()
    is_valid = torch.rand(scores.shape, generator=torch.Generator().manual_seed(12)) > 0.3
    is_valid[..., 0] = True
    for valid in (None, is_valid):
        weights = attention.weights_from_scores(scores, valid)
        found = attention.row_measures(scores, valid)
        kurtosis, skew = attention.excess_kurtosis_and_skewness(weights, valid)
        torch.testing.assert_close(found["entropy"], attention.entropy_from_scores(scores, valid), rtol=0, atol=1e-13)
        torch.testing.assert_close(found["kurtosis"], kurtosis, rtol=1e-11, atol=1e-11, equal_nan=True)
        torch.testing.assert_close(found["skew"], skew, rtol=1e-11, atol=1e-11, equal_nan=True)
        torch.testing.assert_close(found["received"], weights.sum(-2), rtol=1e-12, atol=0)
    np.testing.assert_allclose(
        attention.row_measures(scores)["entropy"], special.entr(scores.softmax(-1).numpy()).sum(-1)
    )
    np.testing.assert_allclose(
        attention.row_measures(scores)["kurtosis"], stats.kurtosis(scores.softmax(-1), axis=-1), rtol=1e-10
    )


def test_all_measures_at_once_keep_to_the_special_rows():
    uniform = attention.row_measures(torch.full((1, 1, 1, 196), 3.0))
    assert uniform["entropy"].item() == pytest.approx(math.log(196), abs=1e-6)
    assert uniform["kurtosis"].isnan().all()
    assert uniform["skew"].isnan().all()
    one_hot = row(*[0.0] * 3, 1.0, *[0.0] * 45).log()
    found = attention.row_measures(one_hot)
    assert found["entropy"].item() == 0
    assert found["kurtosis"].item() == pytest.approx(47 + 1 / 48 - 3)
    hole = attention.row_measures(row(0.0, *[1 / 48] * 48).log())
    assert hole["kurtosis"].item() == pytest.approx(47 + 1 / 48 - 3)
    assert hole["entropy"].item() == pytest.approx(math.log(48))
    assert hole["skew"].item() < 0 < found["skew"].item()
    nobody = attention.row_measures(random_scores(), torch.zeros(BATCH, HEADS, QUERIES, KEYS, dtype=torch.bool))
    assert nobody["entropy"].isnan().all()
    assert nobody["kurtosis"].isnan().all()


def test_single_precision_is_as_good_as_it_can_be():
    scores = random_scores(keys=197)
    wide, single = attention.row_measures(scores), attention.row_measures(scores.float())
    for name in ("entropy", "kurtosis", "skew"):
        torch.testing.assert_close(single[name], wide[name], rtol=2e-5, atol=2e-5)


def test_kurtosis_of_any_numbers_is_scipys():
    values = random_scores()
    np.testing.assert_allclose(attention.kurtosis_of(values), stats.kurtosis(values, axis=-1), rtol=1e-12)
    assert attention.kurtosis_of(torch.full((2, 5), 7.3)).isnan().all()
