"""Lanczos runs on spectra that are known: both ends, clusters, exact zeros, breakdown, low precision."""

import numpy as np
import pytest
import torch
from scipy.special import betaincinv

from ssat_probe.measures.lanczos import Krylov, beyond_ends, lanczos, ritz


def symmetric(eigenvalues: np.ndarray, seed: int = 0) -> torch.Tensor:
    """Dense matrix with these eigenvalues in random directions."""
    generator = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator).double())
    return directions @ torch.diag(torch.as_tensor(eigenvalues).double()) @ directions.T


def run(matrix: torch.Tensor, steps: int, **options: object) -> Krylov:
    return lanczos(lambda vector: matrix @ vector, len(matrix), steps, **options)


def network_like(size: int = 499) -> np.ndarray:
    """Few large eigenvalues, a bulk of both signs, exact zeros."""
    generator = np.random.default_rng(3)
    bulk = generator.choice([-1, 1], size - 60, p=[0.3, 0.7]) * 10 ** generator.uniform(-4, -1, size - 60)
    return np.concatenate([[40, 30, 24, 12, 5, -0.8, -0.5], bulk, np.zeros(53)])


class TestCoefficients:
    def test_basis_is_orthonormal_and_tridiagonalises(self):
        matrix = symmetric(network_like())
        krylov = run(matrix, 97, with_basis=True)
        basis = krylov.basis.first(97)
        identity = basis @ basis.T
        assert float((identity - torch.eye(97)).abs().max()) < 1e-14
        projected = basis @ matrix @ basis.T
        np.testing.assert_allclose(projected.numpy(), krylov.matrix, atol=1e-12)
        assert krylov.breaks == ()

    def test_same_seed_same_run_and_other_seed_another(self):
        matrix = symmetric(network_like())
        one, two, three = run(matrix, 11, seed=5), run(matrix, 11, seed=5), run(matrix, 11, seed=6)
        assert np.array_equal(one.alphas, two.alphas)
        assert not np.allclose(one.alphas, three.alphas)

    def test_start_vector_is_taken_at_any_length(self):
        matrix, start = symmetric(network_like()), torch.ones(499).double()
        np.testing.assert_allclose(run(matrix, 7, start=start).alphas, run(matrix, 7, start=3e5 * start).alphas)

    def test_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        run(symmetric(network_like()), 3)
        assert torch.equal(torch.get_rng_state(), before)

    def test_progress_is_told_after_each_step(self):
        told = []
        run(symmetric(network_like()), 5, on_step=told.append)
        assert told == [1, 2, 3, 4, 5]


class TestRitz:
    @pytest.mark.parametrize("steps", [2, 20, 80, 200])
    def test_an_eigenvalue_lies_within_each_residual(self, steps):
        eigenvalues = network_like()
        found = ritz(run(symmetric(eigenvalues), steps))
        distances = np.abs(found.values[:, None] - eigenvalues).min(axis=1)
        assert (distances <= found.residuals).all()
        assert found.weights.sum() == pytest.approx(1)

    @pytest.mark.parametrize(("place", "steps"), [(0, 11), (-1, 8), (-3, 8), (-3, 9)])
    def test_no_smaller_radius_would_be_certain(self, place, steps):
        # Another operator leaves the very same run: with the next coefficient, which the run has not seen, such that
        # the Ritz value splits in two, each a residual away. A smaller radius (residual² over gap) would miss both.
        krylov = run(symmetric(network_like()), steps)
        found = ritz(krylov)
        value, radius = found.values[place], found.residuals[place]
        rest = np.delete(np.arange(steps), place)
        split = value - (found.residuals[rest] ** 2 / (value - found.values[rest])).sum()
        matrix = np.diag(np.append(krylov.alphas, split)) + np.diag(krylov.betas, 1) + np.diag(krylov.betas, -1)
        again = ritz(run(torch.from_numpy(matrix), steps, start=torch.eye(steps + 1).double()[0]))
        np.testing.assert_allclose(again.values, found.values, atol=1e-10)
        np.testing.assert_allclose(again.residuals, found.residuals, atol=1e-10)
        nearest = np.abs(np.linalg.eigvalsh(matrix) - value).min()
        assert 0.99 * radius < nearest <= radius
        gap = np.abs(value - found.values[rest]).min()
        assert radius < 0.1 * gap  # where one would be tempted
        assert nearest > 9 * radius**2 / gap

    def test_both_ends_are_found_without_ghosts(self):
        eigenvalues = np.sort(network_like())
        found = ritz(run(symmetric(eigenvalues), 80))
        np.testing.assert_allclose(found.values[-5:], eigenvalues[-5:], rtol=1e-10)
        np.testing.assert_allclose(found.values[:2], eigenvalues[:2], rtol=1e-6)
        assert found.converged[-5:].all()
        assert found.converged[:2].all()
        assert not found.converged.all()

    def test_ritz_values_never_lie_outside_the_eigenvalue_of_their_rank(self):
        eigenvalues = np.sort(network_like())
        found = ritz(run(symmetric(eigenvalues), 30))
        assert (found.values <= eigenvalues[-30:] + 1e-12).all()
        assert (found.values >= eigenvalues[:30] - 1e-12).all()

    def test_tight_cluster_is_resolved_or_flagged_never_doubled(self):
        eigenvalues = np.sort(np.concatenate([network_like(), 40 + 1e-7 * np.arange(1, 6)]))
        found = ritz(run(symmetric(eigenvalues), 60))
        near = found.values[found.values > 39]
        assert len(near) <= 6
        assert np.abs(near[:, None] - eigenvalues).min(axis=1).max() < 1e-5

    def test_float32_products_give_both_ends_to_float32(self):
        eigenvalues = np.sort(network_like())
        matrix = symmetric(eigenvalues).float()
        eps = torch.finfo(torch.float32).eps
        found = ritz(lanczos(lambda v: (matrix @ v.float()).double(), 499, 120, precision=eps))
        assert abs(found.values[-5:] - eigenvalues[-5:]).max() < 1e-5 * 40
        assert abs(found.values[:2] - eigenvalues[:2]).max() < 1e-5 * 40
        assert found.converged[[0, -1]].all()
        assert (np.abs(found.values[:, None] - eigenvalues).min(axis=1) <= found.residuals).all()


class TestBreakdown:
    @pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
    def test_low_rank_is_noticed_at_any_scale(self, scale):
        eigenvalues = scale * np.concatenate([[-3, 2, 7, 11], np.zeros(95)])
        krylov = run(symmetric(eigenvalues), 19)
        assert krylov.breaks[0] == 4  # four eigenvectors and one of the null space
        found = ritz(krylov)
        assert found.converged.all()
        np.testing.assert_allclose(found.values[[0, -3, -2, -1]], scale * np.array([-3, 2, 7, 11]), rtol=1e-12)
        assert abs(found.values[1:-3]).max() < 1e-12 * scale

    def test_low_rank_is_noticed_in_float32(self):
        matrix = symmetric(np.concatenate([[-3, 2, 7, 11], np.zeros(499)])).float()
        eps = torch.finfo(torch.float32).eps
        krylov = lanczos(lambda v: (matrix @ v.float()).double(), 503, 10, precision=eps)
        assert krylov.breaks
        assert krylov.breaks[0] == 4
        np.testing.assert_allclose(ritz(krylov).values[[0, -3, -2, -1]], [-3, 2, 7, 11], atol=1e-5)

    def test_copies_of_a_multiple_eigenvalue_are_found_after_the_break(self):
        eigenvalues = np.repeat([-2.0, 1.0, 5.0], [2, 3, 4])
        found = ritz(run(symmetric(eigenvalues), 9))
        np.testing.assert_allclose(found.values, eigenvalues, atol=1e-12)
        assert found.converged.all()
        assert (found.weights > 1e-12).sum() <= 9

    def test_identity_breaks_at_every_step(self):
        krylov = run(torch.eye(7).double(), 5)
        assert krylov.breaks == (0, 1, 2, 3, 4)
        assert krylov.num_first == 1
        np.testing.assert_allclose(ritz(krylov).values, 1)

    def test_zero_matrix(self):
        found = ritz(run(torch.zeros(7, 7).double(), 5))
        assert found.values.tolist() == [0] * 5
        assert found.converged.all()

    def test_whole_space_is_exact_and_ends_the_run(self):
        eigenvalues = np.sort(np.random.default_rng(1).normal(size=13))
        krylov = run(symmetric(eigenvalues), 80)
        assert len(krylov.alphas) == 13
        np.testing.assert_allclose(ritz(krylov).values, eigenvalues, atol=1e-13)
        assert beyond_ends(krylov) == 0


class TestBeyondEnds:
    def test_bound_holds_for_a_hundred_start_vectors_and_falls_with_steps(self):
        eigenvalues = torch.linspace(-1, 1, 997, dtype=torch.float64)
        for steps, factor in ((20, 1.0), (40, 0.3)):
            for seed in range(50):
                krylov = lanczos(lambda vector: eigenvalues * vector, 997, steps, seed=seed)
                slack = beyond_ends(krylov)
                found = ritz(krylov).values
                assert max(1 - found[-1], found[0] + 1) <= slack
                assert slack < factor

    @pytest.mark.parametrize("probability", [0.05, 0.4])
    def test_it_is_wrong_as_often_as_it_says_at_most_and_not_far_wider_than_needed(self, probability):
        """On the spectrum that makes the derivation an equality but for what is left out: extrema of Chebyshev's."""
        steps, share = 6, 0.1
        s = np.cos(np.arange(steps) * np.pi / (2 * steps - 1))  # |T(s)| = 1 for the degree 2 * steps - 1
        eigenvalues = torch.from_numpy(np.append((1 - share) * (1 - s**2), np.ones(1)).repeat([3] * steps + [1]))
        errors, bounds = [], []
        for seed in range(600):
            krylov = lanczos(lambda vector: eigenvalues * vector, len(eigenvalues), steps, seed=seed)
            errors.append(1 - ritz(krylov).values[-1])
            bounds.append(beyond_ends(krylov, probability))
        assert np.mean(np.array(errors) > bounds) <= probability
        assert np.median(bounds) < 4 * np.quantile(errors, 1 - probability / 2)

    def test_component_of_a_random_vector_has_the_law_that_is_used(self):
        first = torch.randn(20_000, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        first = (first[:, 0].abs() / first.norm(dim=1)).numpy()
        for probability in (0.01, 0.3):
            least = np.sqrt(betaincinv(0.5, 3, probability))
            assert np.mean(first < least) == pytest.approx(probability, abs=0.01)

    def test_too_few_steps_say_nothing(self):
        assert beyond_ends(run(symmetric(network_like()), 3)) == float("inf")


class TestRefusals:
    def test_no_step(self):
        with pytest.raises(ValueError, match="at least one step, got 0"):
            run(torch.eye(3).double(), 0)

    def test_start_vector_of_zeros(self):
        with pytest.raises(ValueError, match=r"must have a length, got 0\.0"):
            run(torch.eye(3).double(), 2, start=torch.zeros(3).double())

    def test_product_that_is_not_finite(self):
        with pytest.raises(ValueError, match="must be finite, got nan at step 0"):
            run(torch.full((3, 3), torch.nan).double(), 2)
