import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.stats import pearsonr

from ssat_probe.measures import repetition as measures

BLOCKS, IMAGES, HEADS, QUERIES, KEYS = 2, 3, 5, 7, 11


def random(generator, word: str, shape=(BLOCKS, IMAGES, HEADS, QUERIES, KEYS)) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(word), dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize(
    ("measure", "theirs"),
    [
        (measures.cosine_of_maps, lambda a, b: 1 - cosine(a, b)),
        (measures.correlation_of_maps, lambda a, b: pearsonr(a, b).statistic),
    ],
)
def test_against_scipy_row_by_row(generator, measure, theirs):
    weights = random(generator, "weights")
    found = measure(weights)
    assert found.shape == (IMAGES, BLOCKS, BLOCKS, HEADS, QUERIES)
    for place in np.ndindex(*found.shape):
        image, block, other, head, query = place
        rows = (weights[one, image, head, query].numpy() for one in (block, other))
        assert found[place].item() == pytest.approx(theirs(*rows), rel=1e-12)


def test_blocks_that_attend_alike_have_1(generator):
    weights = random(generator, "weights")[:1].expand(3, -1, -1, -1, -1)
    for measure in (measures.cosine_of_maps, measures.correlation_of_maps):
        torch.testing.assert_close(measure(weights), torch.ones(IMAGES, 3, 3, HEADS, QUERIES).double())


def test_one_hot_rows_on_different_keys_have_cosine_0_and_the_correlation_of_a_draw_without_repetition():
    weights = torch.eye(KEYS).double()[:2, None, None, None]
    assert measures.cosine_of_maps(weights)[0, 0, 1].item() == 0
    assert measures.correlation_of_maps(weights)[0, 0, 1].item() == pytest.approx(-1 / (KEYS - 1))


def test_a_spike_and_uniform_attention_have_cosine_1_over_the_root_of_n_and_no_correlation():
    weights = torch.stack([torch.eye(KEYS)[0], torch.full((KEYS,), 1 / KEYS)])[:, None, None, None]
    assert measures.cosine_of_maps(weights)[0, 0, 1].item() == pytest.approx(KEYS**-0.5)
    assert measures.correlation_of_maps(weights)[0, 0, 1].isnan().all()


def test_nearly_uniform_rows_are_alike_by_cosine_alone(generator):
    """Why the correlation stands beside the measure of DeepViT."""
    weights = (0.01 * torch.randn(2, 1, 1, 200, 97, generator=generator("noise")).double()).softmax(-1)
    assert measures.cosine_of_maps(weights)[0, 0, 1].mean() > 0.999
    assert abs(measures.correlation_of_maps(weights)[0, 0, 1].mean()) < 0.03


def test_keys_that_do_not_count_have_no_say(generator):
    weights = random(generator, "weights")
    wider = torch.cat([weights, torch.full_like(weights[..., :3], torch.nan)], -1)
    torch.testing.assert_close(measures.correlation_of_maps(wider), measures.correlation_of_maps(weights))


def test_the_same_permutation_of_keys_in_both_blocks_makes_no_difference(generator):
    weights = random(generator, "weights")
    order = torch.randperm(KEYS, generator=generator("order"))
    for measure in (measures.cosine_of_maps, measures.correlation_of_maps):
        torch.testing.assert_close(measure(weights[..., order]), measure(weights))
