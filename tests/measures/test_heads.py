import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from ssat_probe.geometry import distances
from ssat_probe.measures import heads as measures

IMAGES, HEADS, QUERIES, KEYS = 2, 3, 5, 7


def random(generator, word: str, shape=(IMAGES, HEADS, QUERIES, KEYS)) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=generator(word), dtype=torch.float64)


def one_hot(*keys: int, size: int = KEYS) -> torch.Tensor:
    """Log weights of one image and query: head h attends to keys[h] alone."""
    return torch.eye(size, dtype=torch.float64)[list(keys)][None, :, None].log()


def test_the_parts_of_the_entropy_add_up(generator):
    logs = measures.log_weights(random(generator, "parts"))
    for num_prefix in (0, 1, 3):
        parts = measures.entropy_parts(logs, num_prefix)
        torch.testing.assert_close(parts["groups"] + parts["prefix"] + parts["patch"], parts["all"])
        np.testing.assert_allclose(parts["all"], entropy(logs.exp().numpy(), axis=-1))
        np.testing.assert_allclose(parts["mass"], logs.exp()[..., :num_prefix].sum(-1), atol=1e-15)


def test_known_masses_and_conditionals_give_known_parts():
    # 0.4 on the class token, the rest uniform over two of six patches.
    weights = torch.tensor([0.4, 0.3, 0.3, 0, 0, 0, 0], dtype=torch.float64)[None, None, None]
    parts = measures.entropy_parts(weights.log(), 1)
    groups = -0.4 * math.log(0.4) - 0.6 * math.log(0.6)
    assert parts["groups"].item() == pytest.approx(groups)
    assert parts["prefix"].item() == pytest.approx(0)
    assert parts["patch"].item() == pytest.approx(0.6 * math.log(2))
    assert parts["all"].item() == pytest.approx(groups + 0.6 * math.log(2))


def test_everything_on_the_class_token_leaves_no_spatial_part():
    parts = measures.entropy_parts(one_hot(0), 1)
    assert [parts[name].item() for name in ("mass", "all", "groups", "prefix", "patch")] == [1, 0, 0, 0, 0]


def test_weights_and_scores_give_the_same_rows(generator):
    scores = random(generator, "same")
    expected = measures.log_weights(scores)
    torch.testing.assert_close(measures.log_weights(scores.softmax(-1), are_scores=False), expected)
    # Over a part of the keys, renormalised.
    torch.testing.assert_close(
        measures.log_weights(scores.softmax(-1)[..., 2:], are_scores=False).exp().sum(-1)[0, 0, 0],
        torch.tensor(1.0).double(),
    )


def test_uniform_attention_over_14_by_14_patches_of_16_pixels_has_distance_116():
    grid = distances((14, 14), (16, 16))
    uniform = measures.log_weights(torch.zeros(1, 1, 196, 196))
    assert measures.mean_distance(uniform, grid).mean().item() == pytest.approx(116.492, abs=1e-3)
    torch.testing.assert_close(
        measures.uniform_distance(uniform, grid), measures.mean_distance(uniform, grid), rtol=1e-5, atol=0
    )


def test_a_sink_halves_the_distance_unless_weights_are_renormalised():
    grid = distances((1, 2), (16, 16))
    # Each of two patches: 0.4 on the class token, 0.6 on the other patch.
    weights = torch.tensor([[0.4, 0.0, 0.6], [0.4, 0.6, 0.0]], dtype=torch.float64)[None, None]
    found = measures.mean_distance(measures.log_weights(weights[..., 1:], are_scores=False), grid)
    np.testing.assert_allclose(found, 16)


def test_masked_keys_count_neither_for_distance_nor_for_its_reference():
    grid = distances((1, 3), (10, 10))
    scores = torch.zeros(1, 1, 3, 3).double()
    scores[..., 2] = -torch.inf
    logs = measures.log_weights(scores)
    np.testing.assert_allclose(measures.mean_distance(logs, grid)[0, 0], [5, 5, 15])
    np.testing.assert_allclose(measures.uniform_distance(logs, grid)[0, 0], [5, 5, 15])


def test_the_identity_has_mutual_information_1_and_distance_0():
    found = measures.mutual_information(torch.eye(9).double().log()[None, None])
    assert found["nmi"].item() == pytest.approx(1)
    assert found["information"].item() == pytest.approx(math.log(9))
    assert measures.mean_distance(torch.eye(9).double().log()[None, None], distances((3, 3), (2, 2))).max() == 0


def test_queries_that_attend_alike_have_mutual_information_0(generator):
    alike = measures.log_weights(random(generator, "alike", (1, 2, 1, KEYS)).expand(-1, -1, QUERIES, -1))
    assert measures.mutual_information(alike)["nmi"].abs().max() < 1e-12
    on_one_key = one_hot(4).expand(1, 1, QUERIES, KEYS)
    assert measures.mutual_information(on_one_key)["nmi"].item() == 0


def test_uniform_windows_seen_globally_have_a_floor():
    windows, size = 64, 49
    blocks = torch.block_diag(*[torch.full((size, size), 1 / size)] * windows)
    found = measures.mutual_information(blocks.log()[None, None])
    assert found["nmi"].item() == pytest.approx(math.log(windows) / math.log(windows * size))
    assert found["nmi"].item() == pytest.approx(0.5166, abs=1e-4)


def test_mutual_information_of_a_joint_table_by_hand(generator):
    logs = measures.log_weights(random(generator, "joint"))
    joint = logs.exp().numpy() / QUERIES
    key = joint.sum(-2, keepdims=True)
    expected = (joint * np.log(joint / (key / QUERIES))).sum((-1, -2))
    found = measures.mutual_information(logs)
    np.testing.assert_allclose(found["information"], expected)
    normaliser = np.sqrt(math.log(QUERIES) * entropy(key[..., 0, :], axis=-1))
    np.testing.assert_allclose(found["nmi"], expected / normaliser)


def test_heads_on_different_keys_are_as_diverse_as_can_be():
    logs = one_hot(0, 1, 2)
    assert measures.entropy_parts(logs, 0)["all"].abs().max() == 0
    assert measures.divergence(logs).mean().item() == pytest.approx(math.log(3))
    assert measures.divergence_bound(3, KEYS) == pytest.approx(math.log(3))
    assert measures.mean_kl(logs).isnan().all()  # infinite


def test_the_mean_divergence_is_the_jensen_shannon_divergence_of_scipy(generator):
    logs = measures.log_weights(random(generator, "jsd", (1, 2, 1, KEYS)))
    first, second = logs.exp()[0, :, 0].numpy()
    assert measures.divergence(logs).mean().item() == pytest.approx(jensenshannon(first, second) ** 2)


def test_mean_kl_against_scipy(generator):
    logs = measures.log_weights(random(generator, "kl"))
    weights = logs.exp().numpy()
    for head in range(HEADS):
        others = [entropy(weights[:, head], weights[:, other], axis=-1) for other in range(HEADS) if other != head]
        np.testing.assert_allclose(measures.mean_kl(logs)[:, head], np.mean(others, axis=0))


def test_a_single_head_has_no_diversity(generator):
    logs = measures.log_weights(random(generator, "one", (1, 1, QUERIES, KEYS)))
    assert measures.divergence(logs).isnan().all()
    assert measures.mean_kl(logs).isnan().all()


def test_permuting_patches_changes_the_distance_alone(generator):
    scores = random(generator, "permute", (1, HEADS, 6, 6))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    one, other = (measures.log_weights(x) for x in (scores, scores[:, :, order][..., order]))
    grid = distances((2, 3), (2, 2))
    for measure in (measures.divergence, measures.mean_kl):
        torch.testing.assert_close(measure(one).mean(-1), measure(other).mean(-1))
    torch.testing.assert_close(measures.mutual_information(one)["nmi"], measures.mutual_information(other)["nmi"])
    assert (measures.mean_distance(one, grid).mean() - measures.mean_distance(other, grid).mean()).abs() > 1e-3


def test_information_of_regions_is_the_mean_over_regions_weighted_by_their_queries():
    draw = torch.Generator().manual_seed(5)
    rows = torch.randn(2, 3, 11, 7, generator=draw, dtype=torch.float64).log_softmax(-1)
    regions = torch.tensor([0, 2, 2, 0, 2, 3, 0, 0, 2, 2, 0])  # 5, none, 5, and one alone
    weights, entropy = rows.exp(), torch.special.entr(rows.exp()).sum(-1)
    sums = torch.zeros(2, 3, 4, 7, dtype=torch.float64).index_add_(2, regions, weights)
    entropies = torch.zeros(2, 3, 4, dtype=torch.float64).index_add_(2, regions, entropy)
    found = measures.information_of_regions(sums, entropies, regions.bincount().double())
    parts = {region: measures.mutual_information(rows[:, :, regions == region]) for region in (0, 2, 3)}
    counts = {0: 5, 2: 5, 3: 1}
    for name in ("information", "key_entropy"):
        expected = sum(counts[region] * part[name] for region, part in parts.items()) / 11
        torch.testing.assert_close(found[name], expected)
    torch.testing.assert_close(found["nmi"], (parts[0]["nmi"] + parts[2]["nmi"]) / 2)  # one query alone has none


def test_uniform_windows_have_no_information_whatever_their_number():
    """Seen as one matrix, 64 such windows of 49 tokens would score ln 64 / ln 3136."""
    sums, entropies = torch.full((1, 1, 64, 49), 1.0).double(), torch.full((1, 1, 64), 49 * math.log(49)).double()
    found = measures.information_of_regions(sums, entropies, torch.full((64,), 49.0).double())
    assert abs(found["nmi"].item()) < 1e-6
    whole = torch.full((49, 49), 1 / 49).double()
    log_whole = torch.block_diag(*[whole] * 8).log()[None, None]
    expected = math.log(8) / math.log(8 * 49)
    assert measures.mutual_information(log_whole)["nmi"].item() == pytest.approx(expected)
