"""The ways to a spectrum side by side, on a small network whose Hessian is known."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pandas import DataFrame
from torch import nn

from ssat_probe.measures import methods
from ssat_probe.measures.basis import DiskBasis, MemoryBasis
from ssat_probe.measures.certificate import certify
from ssat_probe.measures.dense import dense
from ssat_probe.measures.directions import eigenvectors
from ssat_probe.measures.hessian import Evaluation, HessianOperator
from ssat_probe.measures.lanczos import Krylov, LanczosRun
from ssat_probe.measures.methods import METHODS, Settings, compared, rows_of
from ssat_probe.measures.spectrum import entry_of, methods_in, rows_by
from ssat_probe.measures.stopping import Until
from ssat_probe.probes.hessian import Probe


@pytest.fixture(scope="module")
def operator() -> HessianOperator:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    images, labels = torch.randn(17, 3).double(), torch.randint(3, (17,))
    pairs = [((x, y), len(x)) for x, y in zip(images.split(7), labels.split(7), strict=True)]
    return HessianOperator(dict(net.named_parameters()), lambda b: F.cross_entropy(net(b[0]), b[1]), pairs)


@pytest.fixture(scope="module")
def exact(operator: HessianOperator) -> np.ndarray:
    return torch.linalg.eigvalsh(dense(operator)).numpy()


@pytest.fixture(scope="module")
def table(operator: HessianOperator) -> DataFrame:
    rows = compared(METHODS, operator, certify(operator), operator.evaluate(), Settings(steps=30))
    defaults = dict.fromkeys(("tau", "low", "high", "standard_error", "residual", "converged", "weight"), np.nan)
    return DataFrame([{"probe": -1, "index": 0, "unit": ""} | defaults | row for row in rows])


def test_every_method_names_its_rows(table):
    assert methods_in(table) == list(METHODS)
    for method in METHODS:
        assert entry_of(rows_by(table, method), "products_used")["value"] > 0
        assert entry_of(rows_by(table, method), "seconds")["value"] > 0


@pytest.mark.parametrize("method", ["lanczos", "exact", "lissa"])
def test_ends_are_those_of_the_dense_hessian(table, exact, method):
    rows = rows_by(table, method)
    for quantity, true in (("lambda_max", exact[-1]), ("lambda_min", exact[0])):
        found = entry_of(rows, quantity)
        assert found["value"] == pytest.approx(true, rel=5e-2 if method == "lissa" else 1e-6)
        assert not found["low"] > true + 1e-9 * exact[-1]
        assert not found["high"] < true - 1e-9 * exact[-1]


def test_exact_counts_what_is_negative(table, exact):
    rows = rows_by(table, "exact")
    share = entry_of(rows, "negative_fraction")
    assert share["low"] <= (exact < 0).mean() <= share["high"]
    assert share["high"] > share["low"]  # shifts that softmax and normalisation do not see: zeros without a sign
    energy = -exact[exact < 0].sum() / np.abs(exact).sum()
    assert entry_of(rows, "negative_energy")["value"] == pytest.approx(energy)
    assert entry_of(rows, "trace")["value"] == pytest.approx(exact.sum())
    assert entry_of(rows, "asymmetry")["value"] < 1e-12


def test_distances_are_to_the_exact_spectrum(table, exact):
    distances = {m: entry_of(rows_by(table, m), "wasserstein")["value"] for m in ("lanczos", "exact", "lissa")}
    assert distances["exact"] == 0
    assert 0 < distances["lanczos"] < 0.05 * exact[-1]
    assert not (table["quantity"] == "pyhessian:wasserstein").any()


@pytest.mark.parametrize("method", ["lanczos", "lissa", "pyhessian"])
def test_errors_are_to_the_exact_quantities(table, exact, method):
    rows = rows_by(table, method)
    top = entry_of(rows, "lambda_max")["value"]
    assert entry_of(rows, "lambda_max_error")["value"] == pytest.approx(abs(top - exact[-1]) / exact[-1])
    listed = rows[(rows["quantity"] == "top_eigenvalue") & (rows["index"] <= 5)].sort_values("index")["value"]
    worst = np.abs(listed.to_numpy() / exact[::-1][: len(listed)] - 1).max()
    assert entry_of(rows, "top_eigenvalue_error")["value"] == pytest.approx(worst)
    trace = entry_of(rows, "trace")["value"]
    assert entry_of(rows, "trace_error")["value"] == pytest.approx(abs(trace / exact.sum() - 1))
    if method == "pyhessian":
        assert not rows["quantity"].isin(["lambda_min_error", "negative_energy_error"]).any()
        return
    true = {0.01: (exact < -0.01 * exact[-1]).mean(), 0.001: (exact < -0.001 * exact[-1]).mean()}
    for tau, share in true.items():
        found = entry_of(rows, "mass_below", tau)["value"]
        assert entry_of(rows, "mass_below_error", tau)["value"] == pytest.approx(abs(found - share), abs=1e-12)
    assert not (table["quantity"] == "exact:lambda_max_error").any()


def test_batches_give_shares_and_means_of_their_dominant_ends(table):
    rows = rows_by(table, "batches")
    largest, smallest = (rows.loc[rows["quantity"] == name, "value"].to_numpy() for name in ("batch_max", "batch_min"))
    assert len(largest) == len(smallest) == 3
    dominant = np.where(largest >= -smallest, largest, smallest)
    assert entry_of(rows, "nep")["value"] == pytest.approx((dominant < 0).mean())
    assert entry_of(rows, "ape")["value"] == pytest.approx(dominant[dominant > 0].mean())
    power = rows.loc[rows["quantity"] == "batch_power", "value"].to_numpy()
    assert power == pytest.approx(dominant, rel=0.2)


def test_pyhessian_has_the_largest(table, exact):
    assert entry_of(rows_by(table, "pyhessian"), "lambda_max")["value"] == pytest.approx(exact[-1], rel=1e-2)


def test_one_method_alone_has_no_prefix(operator):
    rows = rows_of("exact", operator, certify(operator), operator.evaluate(), Settings())
    assert methods_in(DataFrame(rows)) == []
    assert sum(row["quantity"] == "eigenvalue" for row in rows) == operator.size


def test_lissa_alone_shows_every_solver_on_one_right_hand_side(operator):
    rows = DataFrame(rows_of("lissa", operator, certify(operator), operator.evaluate(), Settings(solvers=True)))
    for solver in ("lissa", "cg", "minres"):
        assert entry_of(rows, f"inverse_residual_{solver}")["value"] <= 1e-3
        assert entry_of(rows, f"inverse_residual_{solver}")["converged"] == 1
        assert entry_of(rows, f"inverse_products_{solver}")["value"] >= 1
    assert entry_of(rows, "inverse_residual_lissa_batches")["value"] < 1
    damping, scale = entry_of(rows, "damping")["value"], entry_of(rows, "scale")["value"]
    assert entry_of(rows, "damping_koh_liang")["value"] == damping / scale  # their recursion adds it times scale


class StopError(Exception):
    """What an interruption looks like."""


def rows_and_steps(operator: HessianOperator, **options: object) -> tuple[list, int]:
    """Rows of a Lanczos run, and products that it took."""
    certificate, evaluation, before = certify(operator), operator.evaluate(), operator.num_images
    rows = rows_of("lanczos", operator, certificate, evaluation, Settings(steps=19, probes=2, **options))
    return [row for row in rows if row["quantity"] != "num_products"], (
        operator.num_images - before
    ) // evaluation_size(evaluation)


def evaluation_size(evaluation: Evaluation) -> int:
    return sum(evaluation.batch_sizes)


def interrupted(operator: HessianOperator, after: int, **options: object) -> None:
    def on_step(step: int) -> None:
        if step >= after:
            raise StopError

    with pytest.raises(StopError):
        rows_and_steps(operator, on_step=on_step, **options)


class TestGoingOn:
    @pytest.fixture(autouse=True)
    def at_every_step(self, monkeypatch):
        monkeypatch.setattr(methods, "SAVE_EVERY_S", 0.0)

    @pytest.mark.parametrize("home", ["device", "cpu", "disk"])
    @pytest.mark.parametrize("after", [1, 7, 18, 19, 24])
    def test_an_interrupted_run_goes_on_bit_by_bit(self, operator, tmp_path, after, home):
        places = {"home": home, "key": "a"}
        whole, num = rows_and_steps(operator, folder=tmp_path / "whole", **places)
        interrupted(operator, after, folder=tmp_path / "cut", **places)
        again, rest = rows_and_steps(operator, folder=tmp_path / "cut", **places)
        assert num == 38
        assert rest == 38 - after
        np.testing.assert_equal(again, whole)

    def test_a_break_survives(self, tmp_path):
        weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
        data = torch.randn(2, 5, dtype=torch.float64)
        low_rank = HessianOperator({"w": weight}, lambda b: ((b @ weight) ** 2).mean(), [(data, 2)])
        whole, _ = rows_and_steps(low_rank, folder=tmp_path / "whole")
        interrupted(low_rank, 4, folder=tmp_path / "cut")
        again, _ = rows_and_steps(low_rank, folder=tmp_path / "cut")
        np.testing.assert_equal(again, whole)
        assert any(row["quantity"] == "beta" and row["converged"] for row in whole)

    def test_another_key_or_number_of_steps_begins_anew(self, operator, tmp_path):
        interrupted(operator, 7, folder=tmp_path, key="a")
        _, num = rows_and_steps(operator, folder=tmp_path, key="b")
        assert num == 38
        _, num = rows_and_steps(operator, folder=tmp_path, key="b")
        assert num == 0

    def test_a_basis_that_was_cut_off_begins_anew(self, operator, tmp_path):
        interrupted(operator, 7, folder=tmp_path)
        path = tmp_path / "probe0" / "basis.float64"
        path.write_bytes(path.read_bytes()[: 8 * operator.size * 7])
        _, num = rows_and_steps(operator, folder=tmp_path)
        assert num == 38

    def test_bases_of_runs_that_are_done_take_no_memory(self, operator, monkeypatch):
        made: weakref.WeakSet[LanczosRun] = weakref.WeakSet()
        counts: list[int] = []

        class Counted(LanczosRun):
            def __init__(self, *args: object, **options: object) -> None:
                super().__init__(*args, **options)
                made.add(self)

        monkeypatch.setattr(methods, "LanczosRun", Counted)
        certificate, evaluation = certify(operator), operator.evaluate()
        settings = Settings(steps=4, probes=6, chunk=2, on_step=lambda _: counts.append(len(made)))
        rows_of("lanczos", operator, certificate, evaluation, settings)
        assert len(counts) == 12
        assert set(counts) == {2}

    @pytest.mark.parametrize("chunk", [0, 2])
    def test_progress_rises_through_runs_and_jackknife_to_what_was_announced(self, operator, chunk):
        told: list[int] = []
        rows_and_steps(operator, chunk=chunk, on_step=told.append, jackknife=True)
        assert told == sorted(set(told))
        assert told[-1] == Probe(steps=19, probes=2, jackknife=True).num_steps == 2 * 19 + 11
        assert len(told) == 38 // max(chunk, 1) + len(operator.batches)

    def test_a_basis_on_disk_lies_in_a_temporary_folder_and_changes_no_number(self, operator, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        seen: set[str] = set()

        def look(step: int) -> None:
            seen.update(path.name for path in tmp_path.rglob("*.float64"))

        kept: list[Krylov] = []
        spectra: list[np.ndarray] = []

        def keep(krylov: Krylov) -> None:
            kept.append(krylov)
            spectra.append(torch.stack([one.vector for end in eigenvectors(krylov, 2) for one in end]).numpy())

        there, _ = rows_and_steps(operator, home="disk", on_step=look, jackknife=True, on_run=keep)
        here, _ = rows_and_steps(operator, jackknife=True, on_run=keep)
        np.testing.assert_equal(there, here)
        np.testing.assert_equal(*spectra)
        assert [type(krylov.basis) for krylov in kept] == [DiskBasis, MemoryBasis]
        assert any(row.get("data_error", 0) > 0 for row in there)
        assert seen == {"basis.float64"}
        assert list(tmp_path.iterdir()) == []


def test_rules_stop_every_run_and_say_so(operator):
    rows, num = rows_and_steps(operator, until=(Until("residual", 1e-3),))
    used = [row["value"] for row in rows if row["quantity"] == "steps_used"]
    assert sum(used) == num < 38
    reached = [row for row in rows if row["quantity"] == "until_residual"]
    assert all(row["converged"] == 1 and row["value"] <= row["high"] == 1e-3 for row in reached)
    assert [row["converged"] for row in rows if row["quantity"] in ("lambda_max", "lambda_min")] == [1, 1]
