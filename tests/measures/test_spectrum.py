"""Rows of a spectrum and back: exact ones against numpy, runs through csv, distances of spectra."""

import io

import numpy as np
import pandas as pd
import pytest
import torch

from ssat_probe.measures import spectrum
from ssat_probe.measures.lanczos import lanczos

VALUES = np.array([-3.0, -0.5, -1e-4, 0.0, 0.0, 2e-4, 1.0, 10.0])


def as_table(rows: list) -> pd.DataFrame:
    names = ("tau", "low", "high", "standard_error", "residual", "converged", "weight")
    table = pd.DataFrame([{"probe": -1, "index": 0, "unit": ""} | dict.fromkeys(names, np.nan) | row for row in rows])
    return pd.read_csv(io.StringIO(table.to_csv(index=False)))


def exact() -> pd.DataFrame:
    return as_table([*spectrum.exact_rows(VALUES), {"quantity": "num_parameters", "value": len(VALUES)}])


def lanczos_table(steps: int) -> pd.DataFrame:
    values = torch.from_numpy(VALUES)
    runs = [lanczos(lambda x: values * x, len(VALUES), steps)]
    facts = [{"quantity": "num_parameters", "value": len(VALUES)}, {"quantity": "precision", "value": 2.0**-52}]
    facts.append({"quantity": "noise_floor", "value": 0.0})
    return as_table([*spectrum.ends(runs), *facts, *spectrum.coefficients(runs)])


def test_exact_rows_count_by_hand():
    table = exact()
    assert spectrum.entry_of(table, "lambda_max")["value"] == 10
    assert spectrum.entry_of(table, "lambda_min")["value"] == -3
    assert spectrum.entry_of(table, "lambda_ratio")["value"] == pytest.approx(0.3)
    assert spectrum.entry_of(table, "negative_energy")["value"] == pytest.approx(3.5001 / 14.5003)
    assert spectrum.entry_of(table, "mass_below", 1e-3)["value"] == pytest.approx(2 / 8)
    assert spectrum.entry_of(table, "near_zero_mass")["value"] == pytest.approx(4 / 8)
    below = spectrum.entry_of(table, "negative_fraction")
    assert (below["value"], below["low"], below["high"]) == pytest.approx((3 / 8, 3 / 8, 5 / 8))
    assert (table["quantity"] == "top_eigenvalue").sum() == 4


def test_runs_come_back_from_csv():
    (back,) = spectrum.runs_of(lanczos_table(5))
    again = lanczos(lambda x: torch.from_numpy(VALUES) * x, len(VALUES), 5)
    np.testing.assert_allclose(back.alphas, again.alphas, rtol=1e-14)
    assert spectrum.runs_of(exact()) == []


def test_spectrum_as_places_and_shares():
    values, weights = spectrum.measure_of(exact())
    np.testing.assert_array_equal(values, VALUES)
    np.testing.assert_allclose(weights, 1 / 8)
    nodes, shares = spectrum.measure_of(lanczos_table(5))
    assert shares.sum() == pytest.approx(1)
    assert (np.diff(nodes) >= 0).all()


def test_smoothed_spectrum_integrates_to_the_number_of_parameters():
    grid = 0.01 * np.sinh(np.linspace(-9, 9, 20_001))
    curve = spectrum.smoothed(exact(), grid, 0.01)
    assert np.trapezoid(curve, grid) == pytest.approx(8, rel=1e-3)
    assert (spectrum.smoothed(lanczos_table(6), grid, 0.01) >= 0).all()


def test_bounds_are_points_where_everything_is_known_and_contain_them_elsewhere():
    taus = np.array([1e-3, 1e-2, 0.2])
    low, high = spectrum.bounds_below(exact(), taus)
    np.testing.assert_allclose(low, [2 / 8, 2 / 8, 1 / 8])
    np.testing.assert_array_equal(low, high)
    low, high = spectrum.bounds_below(lanczos_table(4), taus)
    assert (low <= high).all()


def test_distance_of_a_shifted_spectrum_is_the_shift():
    shifted = as_table([*spectrum.exact_rows(VALUES + 0.25), {"quantity": "num_parameters", "value": 8}])
    assert spectrum.wasserstein(exact(), shifted) == pytest.approx(0.25)
    assert np.isnan(spectrum.wasserstein(exact(), as_table([{"quantity": "loss", "value": 1.0}])))


def test_rows_by_method():
    table = exact()
    both = pd.concat([table.assign(quantity=name + ":" + table["quantity"]) for name in ("a", "b")])
    assert spectrum.methods_in(both) == ["a", "b"]
    assert spectrum.methods_in(table) == []
    assert spectrum.rows_by(both, "b")["quantity"].tolist() == table["quantity"].tolist()
