"""Brackets hold for hundreds of spectra; estimates are right within their errors; exact cases are exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssat_probe.measures.lanczos import Krylov, lanczos, ritz
from ssat_probe.measures.quadrature import (
    Estimate,
    counts,
    deflated,
    density,
    distribution,
    mass,
    negative_energy,
    spectrum_mass,
    trace,
)


def network_like(size: int = 2003, seed: int = 0) -> np.ndarray:
    """Nine outliers up to 40, a bulk of both signs over four decades, a tenth exact zeros, one isolated negative."""
    generator = np.random.default_rng(seed)
    num_zero, num_negative = size // 10, 3 * size // 10
    num_positive = size - num_zero - num_negative - 10
    negative, positive = (10 ** generator.uniform(-5, -1.2, num) for num in (num_negative, num_positive))
    return np.concatenate([[40, 30, 24, 18, 12, 8, 5, 3, 1.5, -0.67], -negative, positive, np.zeros(num_zero)])


def run(eigenvalues: np.ndarray, steps: int, seed: int = 0, precision: float = 2.0**-52) -> Krylov:
    """Lanczos on the diagonal matrix; in float32 if the precision says so."""
    diagonal = torch.as_tensor(eigenvalues)
    if precision > 1e-10:
        return lanczos(
            lambda v: (diagonal.float() * v.float()).double(), len(diagonal), steps, seed=seed, precision=precision
        )
    return lanczos(lambda v: diagonal * v, len(diagonal), steps, seed=seed)


def weights_of(size: int, seed: int = 0) -> np.ndarray:
    """What the probe of this seed gives to each eigenvector of a diagonal matrix."""
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((start / start.norm()) ** 2).numpy()


@st.composite
def spectra(draw: st.DrawFn) -> np.ndarray:
    """Both signs, exact zeros, exact multiples, tight clusters, outliers; any scale."""
    atoms = draw(st.lists(st.sampled_from([0.0, 1.0, -1.0, 3.0, -0.01, 1e-6, 100.0]), min_size=0, max_size=40))
    seed = draw(st.integers(0, 10**6))
    generator = np.random.default_rng(seed)
    bulk = generator.normal(size=draw(st.integers(3, 60))) * 10 ** generator.uniform(-6, 0)
    cluster = draw(st.sampled_from([0.0, 1.0, -2.0])) + 1e-9 * np.arange(draw(st.integers(0, 7)))
    return np.concatenate([atoms, bulk, cluster]) * 10 ** draw(st.floats(-6, 6))


class TestDistribution:
    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(spectra(), st.integers(1, 70), st.integers(0, 99), st.sampled_from([2.0**-52, 2.0**-23]), st.data())
    def test_bracket_contains_the_mass_of_the_probe(self, eigenvalues, steps, seed, precision, data):
        krylov = run(eigenvalues, steps, seed, precision)
        weights, scale = weights_of(len(eigenvalues), seed), np.abs(eigenvalues).max()
        thresholds = data.draw(
            st.lists(
                st.sampled_from([0.0, *eigenvalues, *(scale * np.array([-1e-2, -1e-3, 1e-3, 0.5]))]),
                min_size=1,
                max_size=5,
            )
        )
        guard = 100 * precision * scale if precision > 1e-10 else 0.0
        low, high = distribution(krylov, np.array(thresholds), guard)
        strictly = np.array([weights[eigenvalues < threshold].sum() for threshold in thresholds])
        upto = np.array([weights[eigenvalues <= threshold].sum() for threshold in thresholds])
        slack = 1e-6 if precision < 1e-10 else 1e-3
        assert (low <= strictly + slack).all()
        assert (upto <= high + slack).all()
        assert ((low >= 0) & (high <= 1) & (low <= high)).all()

    def test_width_falls_with_every_step(self):
        eigenvalues = network_like()
        thresholds = np.array([-0.4, -0.04, -0.004, 0.0, 0.02, 1.0])
        widths = [
            np.subtract(*distribution(run(eigenvalues, steps), thresholds)[::-1]) for steps in (5, 10, 20, 40, 80, 160)
        ]
        assert (np.diff(widths, axis=0) <= 1e-9).all()
        assert widths[-1][:2].max() < 1e-3
        assert widths[-1][3] > 0.2  # the fraction below zero is not known even then

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(spectra(), st.integers(0, 99), st.integers(1, 40), st.integers(1, 30), st.data())
    def test_width_never_grows_with_steps(self, eigenvalues, seed, steps, more, data):
        scale = np.abs(eigenvalues).max()
        choices = [0.0, *eigenvalues, *(scale * np.array([-1e-2, -1e-3, 1e-3, 0.5]))]
        thresholds = np.array(data.draw(st.lists(st.sampled_from(choices), min_size=1, max_size=5)))
        few, many = (distribution(run(eigenvalues, num, seed), thresholds) for num in (steps, steps + more))
        assert (many[0] >= few[0] - 1e-6).all()
        assert (many[1] <= few[1] + 1e-6).all()

    def test_bounds_grow_with_the_threshold(self):
        low, high = distribution(run(network_like(), 30), np.linspace(-1, 41, 300))
        assert (np.diff(low) >= -1e-9).all()
        assert (np.diff(high) >= -1e-9).all()

    def test_invariant_space_gives_exact_masses_with_ties_between_the_bounds(self):
        eigenvalues = np.repeat([-1.0, 0.0, 2.0], [5, 6, 7])
        low, high = distribution(run(eigenvalues, 10), np.array([-2, -0.5, 0.0, 1.0, 3.0]))
        weights = weights_of(18)
        a, b = weights[:5].sum(), weights[:11].sum()
        np.testing.assert_allclose(low, [0, a, a, b, 1], atol=1e-12)
        np.testing.assert_allclose(high, [0, a, b, b, 1], atol=1e-12)

    def test_guard_widens_the_bracket_to_both_sides(self):
        krylov = run(network_like(), 60)
        plain, guarded = (np.array(distribution(krylov, np.array([-0.01]), guard)) for guard in (0.0, 0.005))
        wider = np.array([distribution(krylov, np.array([at]))[side] for side, at in ((0, -0.015), (1, -0.005))])
        np.testing.assert_allclose(guarded, wider, atol=1e-9)
        assert guarded[0] < plain[0] < plain[1] < guarded[1]


class TestMass:
    def test_share_near_zero_and_below_thresholds(self):
        eigenvalues = network_like()
        krylovs = [run(eigenvalues, 80, seed) for seed in (0, 1)]
        weights = np.mean([weights_of(2003, seed) for seed in (0, 1)], axis=0)
        for above, below in ((None, -0.04), (-0.04, 0.04), (0.04, None)):
            found = mass(krylovs, above, below)
            inside = np.ones_like(eigenvalues, dtype=bool)
            inside &= eigenvalues >= above if above is not None else True
            inside &= eigenvalues < below if below is not None else True
            assert found.low <= weights[inside].sum() <= found.high
            assert found.value == (found.low + found.high) / 2
            assert abs(found.value - inside.mean()) < found.width / 2 + 3 * found.standard_error

    def test_standard_error_is_that_of_random_vectors(self):
        eigenvalues = np.repeat([-1.0, 1.0], [150, 347])
        seen = [mass([run(eigenvalues, 3, seed)], None, 0.0) for seed in range(300)]
        assert np.std([one.value for one in seen]) == pytest.approx(seen[0].standard_error, rel=0.15)

    @pytest.mark.parametrize("num_negative", [2, 150])
    def test_interval_for_the_spectrum_covers_at_its_level(self, num_negative):
        eigenvalues = np.repeat([-1.0, 1.0], [num_negative, 497 - num_negative])
        covered = 0
        for seed in range(300):
            low, high = spectrum_mass(mass([run(eigenvalues, 3, seed)], None, 0.0), 497, 1)
            covered += low <= num_negative / 497 <= high
        assert 0.92 * 300 <= covered <= 0.985 * 300

    def test_interval_at_the_ends(self):
        assert spectrum_mass(Estimate(0.0, 0.0, 0.0, 0.0), 100, 1) == (0, 0)
        assert spectrum_mass(Estimate(1.0, 1.0, 1.0, 0.0), 100, 1) == (1, 1)


class TestEnergyAndTrace:
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(spectra(), st.integers(1, 70), st.integers(0, 99))
    def test_bracket_contains_the_negative_energy_of_the_probe(self, eigenvalues, steps, seed):
        krylov = run(eigenvalues, steps, seed)
        part = deflated(krylov)
        weights = weights_of(len(eigenvalues), seed)
        if len(part.atoms):  # atoms count as one eigenvalue each; what remains is scaled to the rest of the spectrum
            factor = part.num_rest / (1 - part.atom_weights.sum()) if part.num_rest else 0.0
            inside = weights * eigenvalues

            def total(values: np.ndarray, atoms: np.ndarray) -> float:
                return atoms.sum() + factor * ((weights * values).sum() - part.atom_weights @ atoms)

            negative = total(np.maximum(-eigenvalues, 0), np.maximum(-part.atoms, 0))
            absolute = total(np.abs(eigenvalues), np.abs(part.atoms))
            assert np.isfinite(inside).all()
        else:
            negative, absolute = (weights * np.maximum(-eigenvalues, 0)).sum(), (weights * np.abs(eigenvalues)).sum()
        found = negative_energy([krylov])
        assert found.low <= found.value <= found.high
        assert found.low - 1e-6 <= negative / absolute <= found.high + 1e-6

    def test_energy_and_trace_of_a_network_like_spectrum(self):
        eigenvalues = network_like()
        krylovs = [run(eigenvalues, 80)]
        energy, total = negative_energy(krylovs), trace(krylovs)
        true = -eigenvalues[eigenvalues < 0].sum() / np.abs(eigenvalues).sum()
        assert energy.width < 0.004
        assert abs(energy.value - true) < 3 * energy.standard_error + energy.width
        assert abs(total.value - eigenvalues.sum()) < 3 * total.standard_error
        assert total.standard_error < 0.02 * total.value  # 46 % without deflation

    def test_standard_errors_are_those_of_random_vectors(self):
        eigenvalues = network_like(997)
        runs = [[run(eigenvalues, 40, seed)] for seed in range(60)]
        true = -eigenvalues[eigenvalues < 0].sum() / np.abs(eigenvalues).sum()
        for quantity, truth in ((trace, eigenvalues.sum()), (negative_energy, true)):
            found = [quantity(krylovs) for krylovs in runs]
            errors = np.array([one.value - truth for one in found])
            stated = np.mean([one.standard_error for one in found])
            assert np.sqrt((errors**2).mean()) == pytest.approx(stated, rel=0.4)

    @pytest.mark.parametrize("quantity", [trace, negative_energy])
    def test_nominal_intervals_cover_the_spectrum(self, quantity):
        eigenvalues = network_like(499)
        energy = -eigenvalues[eigenvalues < 0].sum() / np.abs(eigenvalues).sum()
        truth = eigenvalues.sum() if quantity is trace else energy
        covered = 0
        for seed in range(100):
            found = quantity([run(eigenvalues, 30, seed)])
            reach = 1.96 * found.standard_error
            covered += found.low - reach <= truth <= found.high + reach
        assert covered >= 0.9 * 100

    def test_two_probes_have_the_smaller_error(self):
        eigenvalues = network_like(997)
        one, two = [run(eigenvalues, 40)], [run(eigenvalues, 40, seed) for seed in (0, 1)]
        assert trace(two).standard_error == pytest.approx(trace(one).standard_error / 2**0.5, rel=0.2)

    def test_whole_space_is_exact_whatever_the_start_vector(self):
        eigenvalues = np.random.default_rng(2).normal(size=17)
        krylovs = [run(eigenvalues, 17)]
        assert trace(krylovs).value == pytest.approx(eigenvalues.sum())
        assert trace(krylovs).standard_error == 0
        true = -eigenvalues[eigenvalues < 0].sum() / np.abs(eigenvalues).sum()
        assert negative_energy(krylovs).value == pytest.approx(true)
        assert negative_energy(krylovs).width < 1e-9

    def test_signs_of_one_kind_have_energy_zero_or_one(self):
        positive = np.random.default_rng(2).uniform(0.5, 2, size=101)
        assert negative_energy([run(positive, 30)]).value == 0
        assert negative_energy([run(-positive, 30)]).value == 1
        assert np.isnan(negative_energy([run(np.zeros(11), 5)]).value)

    def test_multiple_eigenvalue_is_not_taken_for_one(self):
        eigenvalues = np.concatenate([np.full(50, 2.0), np.random.default_rng(2).normal(size=450) * 0.1])
        krylov = run(eigenvalues, 40)
        assert ritz(krylov).converged[-1]
        assert not np.isclose(deflated(krylov).atoms, 2).any()
        assert abs(trace([krylov]).value - eigenvalues.sum()) < 4 * trace([krylov]).standard_error


class TestDensity:
    @pytest.mark.parametrize("narrowest", [0.0, 0.01, 0.7])
    def test_integrates_to_the_weights_with_width_from_the_spacing(self, narrowest):
        nodes, weights = np.array([-1.0, 0.0, 2.0]), np.array([0.2, 0.5, 0.3])
        grid = np.linspace(-20, 20, 40001)
        assert np.trapezoid(density(nodes, weights, grid, narrowest), grid) == pytest.approx(1, rel=1e-3)
        alone = density(nodes, np.array([0.0, 1.0, 0.0]), grid, narrowest)
        mean = np.trapezoid(alone * grid, grid)
        assert mean == pytest.approx(0.25, abs=1e-3)  # even from -0.5 to 1
        variance = np.trapezoid(alone * (grid - mean) ** 2, grid)
        assert variance == pytest.approx(1.5**2 / 12 + narrowest**2, rel=1e-3)

    def test_wide_gaps_in_the_bulk_leave_the_ends_alone(self):
        nodes, weights = np.array([-6.0, -5.0, 0.0, 5.0, 6.0]), np.array([1.0, 1.0, 10_000.0, 1.0, 1.0])
        assert density(nodes, weights, np.array([-6.0, 6.0]), 0.1) == pytest.approx([1, 1], rel=1e-6)

    def test_more_steps_resolve_more(self):
        eigenvalues = np.repeat([-1.0, 0.0, 1.0], 300) + 0.01 * np.random.default_rng(0).normal(size=900)
        grid = np.array([-0.5, 0.0])
        for steps, ratio in ((4, 1.0), (40, 0.05)):
            found = ritz(run(eigenvalues, steps))
            between, at = density(found.values, found.weights, grid)
            assert between < ratio * at

    def test_counts_integrate_to_the_number_of_parameters(self):
        krylovs = [run(network_like(), 60, seed) for seed in (0, 1)]
        grid = np.sinh(np.linspace(-12, 12, 8001)) * 0.04
        assert np.trapezoid(counts(krylovs, grid, 0.04), grid) == pytest.approx(2003, rel=1e-3)
