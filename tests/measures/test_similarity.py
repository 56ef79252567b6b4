import numpy as np
import pytest
import torch

from ssat_probe.measures import similarity as measures

IMAGES = 13


def random(generator, word: str, shape=(IMAGES, 7)) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(word), dtype=torch.float64)


def grams(*layers: torch.Tensor) -> torch.Tensor:
    """Of layers whose images make one group."""
    return torch.stack([measures.centred_gram(layer)[None] for layer in layers])


def by_formula(x: np.ndarray, y: np.ndarray) -> float:
    """Song et al. (2012), Eq. 5, entry by entry of the Grams."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def test_against_the_formula_of_the_unbiased_estimator(generator):
    x, y = random(generator, "x"), random(generator, "y", (IMAGES, 5))
    x, y = x / x.norm(), y / y.norm()
    found = measures.hsic(grams(x), grams(y)).item()
    assert found == pytest.approx(by_formula(x.numpy(), y.numpy()), rel=1e-10)


def test_groups_are_summed_before_the_ratio(generator):
    xs = [random(generator, f"x{i}") + 3 for i in range(3)]
    ys = [x[:, :5] + random(generator, f"y{i}", (IMAGES, 5)) for i, x in enumerate(xs)]
    first, second = (torch.stack([measures.centred_gram(one) for one in group])[None] for group in (xs, ys))
    xs, ys = ([(one / one.norm()).numpy() for one in group] for group in (xs, ys))
    pairs = {
        name: sum(by_formula(a, b) for a, b in zip(*both, strict=True))
        for name, both in {"xy": (xs, ys), "xx": (xs, xs), "yy": (ys, ys)}.items()
    }
    expected = pairs["xy"] / (pairs["xx"] * pairs["yy"]) ** 0.5
    assert measures.cka(first, second).item() == pytest.approx(expected, rel=1e-10)


def test_rotation_scale_and_shift_make_no_difference(generator):
    x = random(generator, "x")
    rotation = torch.linalg.qr(random(generator, "rotation", (7, 7)))[0]
    assert measures.cka(grams(x), grams(5 * x @ rotation)).item() == pytest.approx(1)
    assert measures.cka(grams(x), grams(x + random(generator, "shift", (1, 7)))).item() == pytest.approx(1)


def test_independent_features_are_not_similar_though_they_have_many_channels(generator):
    x, y = random(generator, "x", (64, 768)), random(generator, "y", (64, 768))
    assert abs(measures.cka(grams(x), grams(y)).item()) < 0.05
    # The biased estimator calls them alike.
    a, b = (one - one.mean(0) for one in (x, y))
    biased = ((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())).item()
    assert biased > 0.85


def test_matrix_over_layers_is_symmetric_with_ones_on_the_diagonal(generator):
    layers = grams(*(random(generator, f"layer {i}") for i in range(3)))
    found = measures.cka(layers, layers)
    torch.testing.assert_close(found, found.mT)
    torch.testing.assert_close(found.diagonal(), torch.ones(3).double())


def test_constant_features_have_no_similarity(generator):
    constant = torch.full((IMAGES, 7), 0.3).double()
    assert measures.cka(grams(constant), grams(random(generator, "x"))).isnan().all()
    assert measures.cka(grams(torch.zeros(IMAGES, 7)), grams(random(generator, "x"))).isnan().all()


def test_shuffled_pairs_are_as_if_the_images_were_unrelated(generator):
    x = random(generator, "x", (64, 32))
    layer = grams(x)
    assert abs(measures.cka(layer, measures.shuffled(layer)).item()) < 0.1
    torch.testing.assert_close(measures.shuffled(layer), grams(x.roll(32, 0)))


def test_cka_is_the_number_of_two_public_codes():
    def draw(seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    x, mix = draw(44, 2, 11, 3, 5), draw(45, 5, 7)
    y = torch.stack([x[0] @ mix + draw(46, 11, 3, 7), draw(47, 11, 3, 7)])
    found = measures.cka(*(grams(*layers.flatten(2)) for layers in (x, y)))
    # wangsr126/mae-lite at f3090d4, projects/eval_tools/visualize/rep_cmp_analyzer.py, RepCmpAnalyzer, one batch.
    theirs = [[0.7139124386836811, -0.10167251482547439], [0.14517999881056654, 0.004210011925183962]]
    np.testing.assert_allclose(found, theirs, rtol=1e-11)
    # AntixK/PyTorch-Model-Compare at 869d3ec, torch_cka/cka.py, CKA._HSIC of the first layers: (x, y), (x, x), (y, y).
    cross, own, other = 104.88382595216248, 17.18798703447485, 1255.7469361662677
    assert found[0, 0].item() == pytest.approx(cross / (own * other) ** 0.5, rel=1e-12)


def test_a_centred_gram_has_rows_that_sum_to_0(generator):
    gram = measures.centred_gram(random(generator, "x"))
    assert gram.sum(1).abs().max() < 1e-15
    assert gram.diagonal().abs().max() == 0


def test_three_images_are_too_few(generator):
    with pytest.raises(ValueError, match=r"groups of at least 4 images, got 3\."):
        measures.centred_gram(torch.ones(3, 2))


def groups_of(x: torch.Tensor, size: int) -> torch.Tensor:
    """Grams of a layer whose images make several groups."""
    return torch.stack([measures.centred_gram(part) for part in x.split(size)])[None]


def test_contributions_are_those_of_leaving_out_one_image_after_another(generator):
    x, y = random(generator, "x"), random(generator, "y", (IMAGES, 5)) + random(generator, "x")[:, :5]
    x, y = x / x.norm(), y / y.norm()
    whole = by_formula(x.numpy(), y.numpy())
    kept = [[j for j in range(IMAGES) if j != i] for i in range(IMAGES)]
    expected = [IMAGES * whole - (IMAGES - 1) * by_formula(x[one].numpy(), y[one].numpy()) for one in kept]
    found = measures.contributions(grams(x), grams(y))[0, 0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found.mean().item() == pytest.approx(whole, rel=1e-12)


def test_sd_of_the_contributions_is_the_jackknife_of_the_ratio(generator):
    """To first order in 1/images, in which the linearised contributions and the jackknife of the ratio agree."""
    x = random(generator, "x", (200, 3))
    y = x @ random(generator, "mix", (3, 4)) + random(generator, "noise", (200, 4))
    whole = measures.cka(grams(x), grams(y)).item()
    kept = [[j for j in range(200) if j != i] for i in range(200)]
    pseudo = [200 * whole - 199 * measures.cka(grams(x[one]), grams(y[one])).item() for one in kept]
    found = measures.cka_spread(grams(x), grams(y), torch.arange(200)[None])
    assert found["sd"].item() == pytest.approx(np.std(pseudo, ddof=1), rel=0.05)
    # As the normal interval of the same standard error, for a bootstrap of many images.
    half = 1.96 * found["sd"].item() / 200**0.5
    assert found["low"].item() == pytest.approx(whole - half, abs=0.25 * half)
    assert found["high"].item() == pytest.approx(whole + half, abs=0.25 * half)


@pytest.mark.parametrize("size", [32, 96])
def test_the_interval_holds_the_population_in_95_of_100_samples(generator, size):
    """For normal features the population's CKA is ||Sxy||² / (||Sxx|| ||Syy||): no estimator enters."""
    covariance = torch.cov(random(generator, "covariance", (7, 20)))
    x_part, y_part = covariance[:4, :4], covariance[4:, 4:]
    truth = (covariance[:4, 4:].norm() ** 2 / (x_part.norm() * y_part.norm())).item()
    root = torch.linalg.cholesky(covariance)
    hits = []
    for i in range(200):
        xy = random(generator, f"sample {i}", (96, 7)) @ root.T
        first, second = groups_of(xy[:, :4], size), groups_of(xy[:, 4:], size)
        found = measures.cka_spread(first, second, torch.arange(96).unflatten(0, (-1, size)) + 1000 * i)
        hits.append(found["low"].item() <= truth <= found["high"].item())
    assert 0.9 <= np.mean(hits) <= 1


def test_independent_layers_have_0_in_expectation_and_intervals_that_hold_it(generator):
    values, hits = [], []
    for i in range(100):
        first, second = (
            groups_of(random(generator, f"x{i}", (64, 5)), 16),
            groups_of(random(generator, f"y{i}", (64, 5)), 16),
        )
        values.append(measures.hsic(first, second).item() / measures.hsic(first, first).item())
        found = measures.cka_spread(first, second, torch.arange(64).unflatten(0, (4, 16)) + 100 * i)
        hits.append(found["low"].item() <= 0 <= found["high"].item())
    assert abs(np.mean(values)) < 3 * np.std(values) / 10
    assert np.mean(hits) >= 0.95


def test_the_interval_of_a_layer_with_its_rotation_is_a_point(generator):
    x = random(generator, "x")
    rotation = torch.linalg.qr(random(generator, "rotation", (7, 7)))[0]
    found = measures.cka_spread(grams(x), grams(3 * x @ rotation), torch.arange(IMAGES)[None])
    for name, value in {"sd": 0, "low": 1, "high": 1}.items():
        assert found[name].item() == pytest.approx(value, abs=1e-9), name


def test_an_image_that_is_in_several_groups_counts_as_one(generator):
    x, y = random(generator, "x"), random(generator, "y")
    once = measures.cka_spread(grams(x), grams(y), torch.arange(IMAGES)[None])
    ids = torch.arange(IMAGES).expand(3, -1)
    thrice = measures.cka_spread(grams(x).expand(-1, 3, -1, -1), grams(y).expand(-1, 3, -1, -1), ids)
    for name, value in once.items():
        torch.testing.assert_close(thrice[name], value, msg=name, equal_nan=True)  # of resamples without images


def test_constant_layers_and_groups_of_four_have_no_interval(generator):
    x = grams(random(generator, "x"))
    constant = grams(torch.full((IMAGES, 7), 0.3).double())
    assert all(one.isnan().all() for one in measures.cka_spread(constant, x, torch.arange(IMAGES)[None]).values())
    four = groups_of(random(generator, "x", (8, 7)), 4)
    found = measures.cka_spread(four, four, torch.arange(8).unflatten(0, (2, 4)))
    assert all(one.isnan().all() for one in found.values())
