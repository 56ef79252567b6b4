"""Inverse-Hessian-vector products against dense solves; both conventions; divergence and what it says."""

import re

import numpy as np
import pytest
import torch

from ssat_probe.measures.calibration import Calibration, calibrate, calibrated, from_koh_liang
from ssat_probe.measures.inverse import (
    CHECK_EVERY,
    SOLVERS,
    inverse_eigenvalues,
    inverse_product,
    krylov_solve,
    lissa,
)

SIZE = 53


@pytest.fixture(scope="module")
def eigenvalues() -> np.ndarray:
    return np.sort(np.concatenate([[-0.61, -0.2, 7.3, 4.1], np.random.default_rng(0).normal(0, 0.02, SIZE - 4)]))


@pytest.fixture(scope="module")
def matrix(eigenvalues: np.ndarray) -> torch.Tensor:
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((SIZE, SIZE)))[0]
    return torch.from_numpy(basis * eigenvalues @ basis.T)


@pytest.fixture(scope="module")
def vector() -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def solved(matrix: torch.Tensor, damping: float, vector: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(matrix + damping * torch.eye(SIZE).double(), vector)


class TestLissa:
    def test_equals_the_dense_solve_within_its_true_residual(self, matrix, vector, eigenvalues):
        calibration = calibrate(eigenvalues[0], eigenvalues[-1])
        found = lissa(matrix.__matmul__, vector, calibration, tolerance=1e-6)
        assert found.converged
        assert found.residual <= 1e-6
        true = float((matrix @ found.vector + calibration.damping * found.vector - vector).norm() / vector.norm())
        assert found.residual == pytest.approx(true, rel=1e-6)
        torch.testing.assert_close(found.vector, solved(matrix, calibration.damping, vector), rtol=0, atol=1e-4)

    @pytest.mark.parametrize(("make", "added"), [(from_koh_liang, 1.1), (Calibration, 0.7)])
    def test_its_limit_is_the_dense_solve_in_either_convention(self, matrix, vector, make, added):
        scale = 11.0
        found = lissa(
            matrix.__matmul__, vector, make(added / scale if make is from_koh_liang else added, scale), tolerance=1e-11
        )
        torch.testing.assert_close(found.vector, solved(matrix, added, vector), rtol=0, atol=1e-8)

    def test_is_the_recursion_of_koh_and_liang(self, matrix, vector):
        damping, scale, depth = 0.1, 11.0, 40
        theirs = vector
        for _ in range(depth):
            theirs = vector + (1 - damping) * theirs - matrix @ theirs / scale
        ours = lissa(matrix.__matmul__, vector, from_koh_liang(damping, scale), tolerance=0.0, max_steps=depth + 2)
        torch.testing.assert_close(ours.vector, theirs / scale, rtol=1e-12, atol=1e-14)
        assert from_koh_liang(damping, scale).in_convention("koh_liang") == pytest.approx((damping, scale))
        assert from_koh_liang(damping, scale).in_convention("absolute") == pytest.approx((1.1, scale))

    def test_is_their_recursion_on_mini_batches_and_the_mean_of_their_samples(self, matrix, vector):
        damping, scale, depth = 0.1, 11.0, 61
        shift = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 50
        batches = [matrix + sign * (shift + shift.T) for sign in (1, -1)]
        samples = []
        for sample in range(3):
            draw, theirs = np.random.default_rng((7, sample)), vector
            for step in range(1, depth + 1):
                one = matrix if step % CHECK_EVERY == 0 else batches[int(draw.integers(2))]
                theirs = vector + (1 - damping) * theirs - one @ theirs / scale
            samples.append(theirs / scale)
        settings = {"tolerance": 0.0, "max_steps": depth + 1, "batch_products": [one.__matmul__ for one in batches]}
        for repeats in (1, 3):
            ours = lissa(matrix.__matmul__, vector, from_koh_liang(damping, scale), repeats=repeats, seed=7, **settings)
            theirs = torch.stack(samples[:repeats]).mean(dim=0)
            torch.testing.assert_close(ours.vector, theirs, rtol=1e-12, atol=1e-14)
            left = matrix @ theirs + damping * scale * theirs - vector
            assert ours.residual == pytest.approx(float(left.norm() / vector.norm()))

    def test_mini_batches_come_near_and_the_residual_is_that_of_all_images(self, matrix, vector):
        noise = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 400
        halves = [(matrix + sign * (noise + noise.T)) for sign in (1, -1)]
        largest = max(float(torch.linalg.eigvalsh(half)[-1]) for half in halves)
        calibration = calibrate(-0.61, 7.3, largest)
        products = [half.__matmul__ for half in halves]
        found = lissa(matrix.__matmul__, vector, calibration, tolerance=0.05, batch_products=products)
        true = float((matrix @ found.vector + calibration.damping * found.vector - vector).norm() / vector.norm())
        assert found.converged
        assert found.residual == pytest.approx(true, rel=1e-6)

    def test_is_the_recursion_of_agarwal_and_others(self, matrix, vector):
        damping, scale, depth = 1.1, 11.0, 40
        scaled = (matrix + damping * torch.eye(SIZE).double()) / scale  # between 0 and 1, as they ask
        theirs = vector / scale
        for _ in range(depth):
            theirs = vector / scale + theirs - scaled @ theirs
        ours = lissa(matrix.__matmul__, vector, Calibration(damping, scale), tolerance=0.0, max_steps=depth + 2)
        torch.testing.assert_close(ours.vector, theirs, rtol=1e-12, atol=1e-14)

    def test_repeats_average_the_noise_of_mini_batches(self, matrix, vector):
        noise = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 50
        products = [(matrix + sign * (noise + noise.T)).__matmul__ for sign in (1, -1)]
        calibration = calibrated(matrix.__matmul__, SIZE, products)
        options = {"tolerance": 1e-9, "batch_products": products, "max_steps": 150}
        few = [lissa(matrix.__matmul__, vector, calibration, repeats=3, seed=seed, **options) for seed in range(5)]
        many = lissa(matrix.__matmul__, vector, calibration, repeats=75, seed=7, **options)
        exact = solved(matrix, calibration.damping, vector)
        errors = [float((found.vector - exact).norm()) for found in (*few, many)]
        assert errors[-1] < 0.4 * np.mean(errors[:-1])  # a fifth, but for chance
        assert (many.num_products, many.num_batch_products) == (75 * 6 + 1, 75 * 144)
        assert not many.converged
        with pytest.raises(ValueError, match="at least 1, got 2 with 0 mini-batches"):
            lissa(matrix.__matmul__, vector, calibration, repeats=2)

    def test_too_few_steps_are_told(self, matrix, vector):
        found = lissa(matrix.__matmul__, vector, calibrate(-0.61, 7.3), tolerance=1e-9, max_steps=3)
        assert not found.converged
        assert found.num_products == 3
        assert found.residual > 1e-9

    @pytest.mark.parametrize(
        ("make", "damping", "scale", "got"),
        [
            (Calibration, 0.3, 8.0, "damping 0.3 and scale 8"),
            (Calibration, 1.0, 3.0, "damping 1 and scale 3"),
            (Calibration, 0.3, 3.0, "damping 0.3 and scale 3"),
            (from_koh_liang, 0.01, 8.0, "damping 0.01 and scale 8"),
            (from_koh_liang, 0.01, 2.0, "damping 0.01 and scale 2"),
            (from_koh_liang, 0.1, 3.0, "damping 0.1 and scale 3"),  # more scale is more damping
            (from_koh_liang, 0.0, 1e-3, "damping 0 and scale 0.001"),
        ],
    )
    def test_divergence_names_numbers_that_converge(self, matrix, vector, make, damping, scale, got):
        convention = make(damping, scale).convention
        with pytest.raises(
            ValueError, match=rf"convention {convention}\) .* λmin = -0\.61 .* λmax = 7\.3, {got},"
        ) as told:
            lissa(matrix.__matmul__, vector, make(damping, scale))
        advice = str(told.value).rpartition("Take a ")[2]
        found = dict(re.findall(r"(damping|scale) above ([\d.]*\d)", advice))
        raised = [1.01 * float(found.get(name, old / 1.01)) for name, old in (("damping", damping), ("scale", scale))]
        assert lissa(matrix.__matmul__, vector, make(*raised), tolerance=1e-4).converged
        for name, old in (("damping", damping), ("scale", scale)):  # and none of them is raised in vain
            kept = {"damping": raised[0], "scale": raised[1]} | {name: old}
            if name in found:
                with pytest.raises(ValueError, match="LiSSA"):
                    lissa(matrix.__matmul__, vector, make(kept["damping"], kept["scale"]))

    def test_divergence_is_explained_where_numbers_have_overflowed(self, matrix, vector):
        single = (100 * matrix).float()
        products = [lambda x: (single @ x.float()).double()] * 2  # to infinity before the first look at the residual
        with pytest.raises(ValueError, match=r"λmax = 730 of a mini-batch, .* a residual nan .* scale above 3\d\d\."):
            lissa(products[0], vector, from_koh_liang(0.0, 0.1), batch_products=products)


class TestKrylovSolve:
    @pytest.mark.parametrize("solver", ["cg", "minres"])
    def test_equals_the_dense_solve(self, matrix, vector, solver):
        found = krylov_solve(matrix.__matmul__, vector, 1.22, solver, tolerance=1e-8)
        assert found.converged
        torch.testing.assert_close(found.vector, solved(matrix, 1.22, vector), rtol=0, atol=1e-6)

    def test_minres_needs_no_damping(self, matrix, vector):
        found = krylov_solve(matrix.__matmul__, vector, 0.05, "minres", tolerance=1e-6)
        assert found.converged
        torch.testing.assert_close(found.vector, solved(matrix, 0.05, vector), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("solver", ["cg", "minres"])
    def test_goes_on_until_the_true_residual_is_small(self, vector, solver):
        # eigenvalues at zero that hold half of the vector: MINRES' own test passes at twice the residual asked for
        eigenvalues = torch.from_numpy(np.concatenate([np.zeros(26), np.linspace(0.001, 0.4, SIZE - 26)])) + 0.02
        found = krylov_solve(eigenvalues.__mul__, vector, 0.0, solver, tolerance=1e-4)
        assert found.converged
        assert found.residual == pytest.approx(float((eigenvalues * found.vector - vector).norm() / vector.norm()))
        few = krylov_solve(eigenvalues.__mul__, vector, 0.0, solver, tolerance=1e-9, max_steps=3)
        assert not few.converged
        assert few.num_products <= 5

    def test_unknown_solver(self, vector):
        with pytest.raises(ValueError, match="must be one of cg, minres, got 'gmres'"):
            krylov_solve(lambda x: x, vector, 1.0, "gmres")


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_has_the_same_interface(matrix, vector, solver):
    calibration = calibrated(matrix.__matmul__, SIZE)
    found = inverse_product(matrix.__matmul__, vector, calibration, solver, tolerance=1e-7)
    assert found.converged
    torch.testing.assert_close(found.vector, solved(matrix, calibration.damping, vector), rtol=0, atol=1e-5)


class TestEigenvalues:
    def test_negative_edge_is_resolved_and_every_interval_holds_one(self, matrix, eigenvalues):
        calibration = calibrate(eigenvalues[0], eigenvalues[-1])
        found = inverse_eigenvalues(matrix.__matmul__, SIZE, calibration, 12, tolerance=1e-8)
        assert found.values[0] == pytest.approx(-0.61, rel=1e-6)
        assert found.weights.sum() == pytest.approx(1)
        inside = (found.lows[:, None] <= eigenvalues) & (eigenvalues <= found.highs[:, None])
        assert inside.any(axis=1).all()
        assert found.num_products > 12
        assert found.worst_residual <= 1e-8

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_negative_edge_is_resolved_among_as_many_directions_as_a_network_has(self, dtype):
        # one direction is a share of 1/√n of the start vector: inner solutions to 1e-3 would hide it
        size = 40_009
        bulk = np.random.default_rng(0).standard_cauchy(size - 7) * 1e-3
        spectrum = np.concatenate([[-30.0, -21.0, -4.0, 11.0, 50.0, 70.0, 120.0], bulk.clip(-1, 1)])
        diagonal = torch.from_numpy(spectrum).to(dtype)
        found = inverse_eigenvalues(
            lambda x: (diagonal * x.to(dtype)).double(),
            size,
            calibrate(-30.0, 120.0),
            15,
            precision=torch.finfo(dtype).eps,
        )
        assert found.values[0] == pytest.approx(-30, rel=1e-3)
        assert found.values[1] == pytest.approx(-21, rel=2e-2)
        assert found.lows[0] < -30 < found.highs[0]
        assert found.highs[0] - found.lows[0] < 0.3
        assert abs(found.weights @ found.values - spectrum.mean()) < 6 * (2 * (spectrum**2).mean() / size) ** 0.5

    def test_a_recursion_that_only_rounding_keeps_from_its_tolerance_ends(self, matrix, vector, eigenvalues):
        single = matrix.float()
        found = lissa(
            lambda x: (single @ x.float()).double(), vector, calibrate(eigenvalues[0], eigenvalues[-1]), tolerance=1e-12
        )
        assert not found.converged
        assert found.residual < 1e-5
        assert found.num_products < 300
