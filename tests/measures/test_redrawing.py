"""Other thresholds and another smoothing, from coefficients that stand in a table."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

from ssat_probe.measures import spectrum
from ssat_probe.measures.lanczos import Krylov, lanczos
from ssat_probe.measures.quadrature import mass
from ssat_probe.measures.redrawing import bandwidth_of, redrawn

VALUES = np.array([-3.0, -0.5, -1e-4, 0.0, 0.0, 2e-4, 1.0, 10.0])
FACTS = [
    {"quantity": "num_parameters", "value": 8},
    {"quantity": "precision", "value": 2.0**-52},
    {"quantity": "noise_floor", "value": 0.0},
]
TAUS = (0.04, 0.2)


def as_table(rows: list) -> pd.DataFrame:
    names = ("tau", "low", "high", "standard_error", "residual", "converged", "weight")
    return pd.DataFrame([{"probe": -1, "index": 0, "unit": ""} | dict.fromkeys(names, np.nan) | row for row in rows])


def run(steps: int) -> Krylov:
    return lanczos(lambda x: torch.from_numpy(VALUES) * x, len(VALUES), steps)


def rows_of(krylov: Krylov) -> list:
    middle = spectrum.negative_part([krylov], spectrum.distance_kept([krylov], 0.0))
    return [*spectrum.ends([krylov]), *middle, *FACTS, *spectrum.coefficients([krylov])]


def share(table: pd.DataFrame, quantity: str, tau: float) -> dict:
    return spectrum.entry_of(table, quantity, tau)


def test_shares_of_known_eigenvalues_by_hand():
    table = redrawn(as_table([*spectrum.exact_rows(VALUES), *FACTS]), TAUS, 0.1)
    assert share(table, "mass_below", 0.04)["value"] == 2 / 8
    assert share(table, "mass_below", 0.2)["value"] == 1 / 8
    assert share(table, "near_zero_mass", 0.04)["value"] == 4 / 8
    assert set(table["tau"].dropna()) == {0.0, *TAUS}
    assert share(redrawn(table, (0.2, 0.06), 0.1), "near_zero_mass", 0.06)["value"] == 5 / 8


def test_brackets_are_those_of_the_run():
    krylov = run(4)
    table = redrawn(as_table(rows_of(krylov)), TAUS, 0.1)
    top = np.linalg.eigvalsh(krylov.matrix)[-1]
    for tau in TAUS:
        wanted = asdict(mass([krylov], None, -tau * top, spectrum.distance_kept([krylov], 0.0)))
        found = share(table, "mass_below", tau)
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)


def test_shares_of_bare_nodes_have_no_bracket():
    weights = np.arange(8) / 28
    nodes = [{"quantity": "node", "index": i, "value": v, "weight": weights[i]} for i, v in enumerate(VALUES)]
    rows = [*spectrum.node_shares(VALUES, weights), *nodes]
    found = share(redrawn(as_table(rows), TAUS, 0.1), "mass_below", 0.04)
    assert found["value"] == pytest.approx((0 + 1) / 28)
    assert np.isnan(found["low"])


def test_all_other_rows_stay_in_their_place():
    table = as_table(rows_of(run(5)))
    again = redrawn(redrawn(table, TAUS, 0.3), spectrum.TAUS, 0.2)
    pd.testing.assert_frame_equal(again.iloc[:-1], table, check_dtype=False, rtol=1e-12)
    assert bandwidth_of(again) == 0.2
    assert bandwidth_of(table) == spectrum.BANDWIDTH


def test_several_methods_keep_their_names_and_get_their_errors():
    parts = {"exact": [*spectrum.exact_rows(VALUES), *FACTS], "lanczos": rows_of(run(4))}
    tables = {method: as_table(rows) for method, rows in parts.items()}
    parts["lanczos"] += spectrum.errors(tables["lanczos"], tables["exact"])
    table = as_table([row | {"quantity": f"{m}:{row['quantity']}"} for m, rows in parts.items() for row in rows])
    found = redrawn(table, TAUS, 0.1)
    assert spectrum.methods_in(found) == ["exact", "lanczos"]
    errors = found[found["quantity"] == "lanczos:mass_below_error"]
    assert errors["tau"].tolist() == list(TAUS)
    for tau in TAUS:
        pair = [share(spectrum.rows_by(found, method), "mass_below", tau)["value"] for method in parts]
        assert errors.loc[errors["tau"] == tau, "value"].item() == pytest.approx(abs(pair[0] - pair[1]))
    stay = "lanczos:lambda_max_error"
    assert (
        found.loc[found["quantity"] == stay, "value"].tolist() == table.loc[table["quantity"] == stay, "value"].tolist()
    )


def test_a_method_without_a_spectrum_stays_as_it_is():
    rows = [{"quantity": "batch_max", "value": 2.0}, {"quantity": "nep", "value": 0.5}]
    pd.testing.assert_frame_equal(redrawn(as_table(rows), TAUS, 0.1).iloc[:-1], as_table(rows), check_dtype=False)
