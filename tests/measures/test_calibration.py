"""Damping and scale of LiSSA: found by Lanczos runs, or set in the words of Koh & Liang."""

import numpy as np
import pytest
import torch

from ssat_probe.measures.calibration import Calibration, Recursion, calibrate, calibrated, from_koh_liang, recursion

SIZE = 53


@pytest.fixture(scope="module")
def eigenvalues() -> np.ndarray:
    return np.sort(np.concatenate([[-0.61, -0.2, 7.3, 4.1], np.random.default_rng(0).normal(0, 0.02, SIZE - 4)]))


@pytest.fixture(scope="module")
def matrix(eigenvalues: np.ndarray) -> torch.Tensor:
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((SIZE, SIZE)))[0]
    return torch.from_numpy(basis * eigenvalues @ basis.T)


def test_calibration_finds_the_ends_by_itself(matrix, eigenvalues):
    one = calibrated(matrix.__matmul__, SIZE)
    by_hand = calibrate(eigenvalues[0], eigenvalues[-1])
    assert (one.damping, one.scale) == pytest.approx((by_hand.damping, by_hand.scale))
    larger = calibrated(matrix.__matmul__, SIZE, [matrix.__matmul__, (2 * matrix).__matmul__])
    assert larger.damping == pytest.approx(one.damping)
    assert larger.scale == pytest.approx(calibrate(eigenvalues[0], eigenvalues[-1], 2 * eigenvalues[-1]).scale)


def test_calibration_stands_clear_of_both_conditions():
    one = calibrate(-0.5, 9.0, 12.0)
    assert one.damping == 1.0
    assert one.scale == pytest.approx(7.8)
    assert calibrate(0.0, 9.0).damping == pytest.approx(0.45)
    with pytest.raises(ValueError, match="must be one of absolute, koh_liang, got 'theirs'"):
        one.in_convention("theirs")


class TestWords:
    def test_nothing_means_calibrated(self):
        assert recursion(()) == Recursion(None, None, 1)

    def test_are_those_of_koh_and_liang(self):
        asked = recursion(("damping=0.01", "scale=25", "recursion_depth=5000", "num_samples=4"))
        assert asked == Recursion(from_koh_liang(0.01, 25.0), 5000, 4)
        assert asked.calibration.in_convention("absolute") == pytest.approx((0.25, 25))

    def test_the_other_convention_is_named(self):
        asked = recursion(("convention=absolute", "scale=25", "damping=0.01"))
        assert asked == Recursion(Calibration(0.01, 25.0, "absolute"), None, 1)
        assert asked.calibration.in_convention("koh_liang") == pytest.approx((0.0004, 25))

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (["depth=3"], "No 'depth' in settings of LiSSA: .* Did you mean 'recursion_depth'"),
            (["scale=3", "scale=4"], "given once, got scale twice"),
            (["scale=3"], "damping and scale of LiSSA must be given together, .* got scale=3"),
            (["damping=0.1", "num_samples=2"], "given together, .* got damping=0.1 num_samples=2"),
            (["convention=absolute"], "given together, .* got convention=absolute"),
            (["damping=0.1", "scale=3", "convention=theirs"], "No 'theirs' in damping conventions"),
            (["damping=2", "scale=3"], "damping of LiSSA must be at least 0 and below 2 in .* koh_liang, got '2'"),
            (["damping=-1", "scale=3", "convention=absolute"], "damping of LiSSA must be at least 0, got '-1'"),
            (["damping=0.1", "scale=0"], "scale of LiSSA must be above 0, got '0'"),
            (["damping=0.1", "scale"], "scale of LiSSA must be above 0, got ''"),
            (["damping=0.1", "scale=inf"], "scale of LiSSA must be above 0, got 'inf'"),
            (["recursion_depth=2.5"], "recursion_depth of LiSSA must be a whole number from 1, got '2.5'"),
            (["num_samples=0"], "num_samples of LiSSA must be a whole number from 1, got '0'"),
        ],
    )
    def test_what_means_nothing_is_refused(self, texts, message):
        with pytest.raises(ValueError, match=message):
            recursion(texts)
