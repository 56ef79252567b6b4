import numpy as np
import pytest
import torch

from ssat_probe.measures import features

BATCH, TOKENS, DIM = 3, 7, 5


def random_tokens() -> torch.Tensor:
    return torch.randn(BATCH, TOKENS, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_constant_map_has_no_variance():
    tokens = torch.full((BATCH, TOKENS, DIM), 3.0)
    assert features.feature_map_variance(tokens).tolist() == [0] * BATCH
    assert features.relative_variance(tokens).tolist() == [0] * BATCH


def test_map_of_half_plus_one_and_half_minus_one():
    tokens = torch.tensor([1.0, -1.0]).repeat(4)[None, :, None].expand(BATCH, 8, DIM)
    assert features.feature_map_variance(tokens).tolist() == pytest.approx([8 / 7] * BATCH, abs=1e-14)
    assert features.relative_variance(tokens).tolist() == [1] * BATCH


def test_against_the_formula_of_park_and_kim():
    tokens = random_tokens()
    theirs = np.var(tokens.numpy(), axis=1, ddof=1).mean()
    assert features.feature_map_variance(tokens).mean().item() == pytest.approx(theirs, abs=1e-12)


def test_relative_variance_is_the_share_of_energy_outside_the_zero_frequency():
    tokens = random_tokens()
    energy = np.abs(np.fft.fft(tokens.numpy(), axis=1)) ** 2
    share = energy[:, 1:].sum((1, 2)) / energy.sum((1, 2))
    np.testing.assert_allclose(features.relative_variance(tokens).numpy(), share, atol=1e-12)


def test_order_of_the_patches_does_not_matter():
    tokens, order = random_tokens(), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    for measure in (features.feature_map_variance, features.relative_variance):
        torch.testing.assert_close(measure(tokens[:, order]), measure(tokens), rtol=0, atol=1e-12)


def test_rescaling_changes_the_variance_but_not_its_scale_free_form():
    tokens = random_tokens()
    torch.testing.assert_close(features.feature_map_variance(3 * tokens), 9 * features.feature_map_variance(tokens))
    torch.testing.assert_close(features.relative_variance(3 * tokens), features.relative_variance(tokens))


def test_features_that_are_all_zero_have_no_share():
    assert features.relative_variance(torch.zeros(BATCH, TOKENS, DIM)).isnan().all()


def test_sums_are_in_float64():
    tokens = (random_tokens() + 1e4).float()
    expected = np.var(tokens.double().numpy(), axis=1, ddof=1).mean(-1)
    np.testing.assert_allclose(features.feature_map_variance(tokens).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_both_variances_at_once_are_those_one_by_one(dtype: torch.dtype, tolerance: float):
    tokens = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1), dtype=dtype) + 2
    variance, relative = features.both_variances(tokens)
    torch.testing.assert_close(variance, features.feature_map_variance(tokens), rtol=tolerance, atol=0)
    torch.testing.assert_close(relative, features.relative_variance(tokens), rtol=tolerance, atol=0)
    assert variance.dtype == relative.dtype == torch.float64
    assert features.both_variances(torch.zeros(1, 4, 2))[1].isnan().all()
    assert features.both_variances(torch.ones(1, 4, 2))[1].item() == 0
    with pytest.raises(ValueError, match="at least 2 tokens per image, got 1"):
        features.both_variances(tokens[:, :1])


def test_variance_of_park_and_kim_is_over_height_and_width():
    tokens = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    maps = tokens.unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    torch.testing.assert_close(features.park_kim_variance(tokens), maps.var(dim=[-1, -2]).mean(dim=1))
    torch.testing.assert_close(features.park_kim_variance(tokens), features.feature_map_variance(tokens))


def test_parity_with_park_and_kim_is_the_number_of_their_code():
    # xxxnell/how-do-vits-work at 9571ff1, featuremap_variance.ipynb, cell 13 ("aggregate feature map variances").
    tokens = torch.randn(3, 49, 5, generator=torch.Generator().manual_seed(41), dtype=torch.float64)
    tokens = tokens + torch.linspace(0, 2, 5, dtype=torch.float64)
    for measure in (features.park_kim_variance, features.feature_map_variance):
        assert measure(tokens).mean().item() == pytest.approx(0.9825073384487369, rel=1e-12)


def test_gain_counts_doublings():
    assert features.gain(torch.tensor([1.0, 4.0, 3.0]), torch.tensor([8.0, 1.0, 3.0])).tolist() == [3, -2, 0]


def test_one_token_has_no_variance_over_positions():
    with pytest.raises(ValueError, match=r"needs at least 2 tokens per image, got 1\."):
        features.feature_map_variance(torch.zeros(BATCH, 1, DIM))
