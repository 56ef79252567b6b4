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


def test_a_centred_gram_has_rows_that_sum_to_0(generator):
    gram = measures.centred_gram(random(generator, "x"))
    assert gram.sum(1).abs().max() < 1e-15
    assert gram.diagonal().abs().max() == 0


def test_three_images_are_too_few(generator):
    with pytest.raises(ValueError, match=r"groups of at least 4 images, got 3\."):
        measures.centred_gram(torch.ones(3, 2))
