"""Surroundings of a real checkpoint: exact centre, agreement with the Hessian, kept grids, budgets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ssat_probe import surroundings
from ssat_probe.probes.landscape import Probe
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject
from ssat_probe.terms import Terms

Paths = dict[str, Path]
QUICK: dict[str, Any] = {"points": 3, "num_random": 2, "steps": 8}


def subject(path: Path, dtype: Any = "float64") -> Subject:
    return Subject.of(path, Sample(num_images=13, batch_size=13, device="cpu", dtype=dtype), "train")


@pytest.fixture(scope="module")
def table(checkpoints: Paths) -> pd.DataFrame:
    return Probe(**QUICK).measure(subject(checkpoints["ssat"]))


def test_ticks_are_symmetric_about_an_exact_zero() -> None:
    assert surroundings.ticks(5, 0.3) == [-0.3, -0.15, 0.0, 0.15, 0.3]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_centre_of_every_line_and_surface_is_exactly_the_loss_of_the_checkpoint(
    checkpoints: Paths, dtype: str
) -> None:
    one = subject(checkpoints["ssat"], dtype)
    expected = Terms(one, one.parameters())()[0]
    table = Probe(**QUICK).measure(one)
    at_zero = (table["x"].fillna(0) == 0) & (table["y"].fillna(0) == 0) & (table["term"] == "cross_entropy")
    points = table[at_zero & table["quantity"].isin(("centre", "line", "surface"))]
    assert len(points) == 1 + 5 + 1
    assert set(points["value"]) == {expected}


def test_second_differences_agree_with_the_hessian_along_every_axis(table: pd.DataFrame) -> None:
    errors = table[table["quantity"] == "check_error"].set_index("direction")["value"]
    assert set(errors.index) == {"random0", "random1", "gradient", "top", "bottom"}
    assert (errors < 1e-4).all(), errors


def test_curvature_along_an_eigenvector_is_its_eigenvalue(table: pd.DataFrame) -> None:
    for name in ("top", "bottom"):
        facts = table[table["direction"] == name].set_index("quantity")["value"]
        assert facts["curvature"] == pytest.approx(facts["eigenvalue"], rel=1e-9)
        assert facts["length"] == pytest.approx(1)


def test_slope_along_the_gradient_is_its_length_and_sharpness_is_ordered(table: pd.DataFrame) -> None:
    facts = table.set_index(["quantity", "direction"])["value"]
    assert facts["slope", "gradient"] > 0
    assert facts["sharpness_worst", ""] >= facts["sharpness_sam", ""] > 0


def test_terms_stand_apart(table: pd.DataFrame) -> None:
    surface = table[table["quantity"] == "surface"].pivot_table(index=["x", "y"], columns="term", values="value")
    assert set(surface) == {"cross_entropy", "reconstruction", "joint", "l2", "accuracy"}
    expected = 0.1 * surface["cross_entropy"] + 0.9 * surface["reconstruction"]
    np.testing.assert_allclose(surface["joint"], expected)


def test_a_loss_with_the_decoder_moves_the_decoder_too(checkpoints: Paths) -> None:
    options = QUICK | {"loss": "reconstruction", "lines": ("random",), "plane": ()}
    lengths = []
    for loss in ("cross_entropy", "reconstruction"):
        table = Probe(**options | {"loss": loss}).measure(subject(checkpoints["ssat"]))
        lengths.append(table.loc[table["quantity"] == "length", "value"].iloc[0])
    assert lengths[1] > lengths[0]
    with pytest.raises(ValueError, match="must hold a decoder"):
        Probe(**options).measure(subject(checkpoints["scratch"]))


def test_a_kept_grid_is_finished_and_gives_the_same_table(
    checkpoints: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = subject(checkpoints["ssat"])
    options = QUICK | {"lines": ("random",), "keep": tmp_path}
    whole = Probe(**options).measure(one)
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({k: v for k, v in kept.items() if int(k) < 5}), encoding="utf-8")
    calls = []
    original = Terms.__call__
    monkeypatch.setattr(Terms, "__call__", lambda self: (calls.append(1), original(self))[1])
    again = Probe(**options).measure(one)
    pd.testing.assert_frame_equal(whole, again)
    checks = 2 * 9 * 4 // 3  # three losses for each of four steps and two axes
    assert len(calls) <= len(kept) - 5 + 4 + checks  # four say how long one takes
    Probe(**options | {"seed": 1}).measure(one)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_grid_over_the_budget_is_refused_with_what_to_do(checkpoints: Paths) -> None:
    with pytest.raises(
        ValueError, match=r"must fit into budget_s, 1e-06 s per checkpoint, got 20 points .* fewer points"
    ):
        Probe(**QUICK | {"lines": ("random",), "budget_s": 1e-6}).measure(subject(checkpoints["ssat"]))


def test_the_number_of_points_is_known_before_any_direction_is(checkpoints: Paths) -> None:
    for options in ({"num_random": 1}, {"lines": ("top", "bottom2"), "plane": ("random", "top")}):
        probe = Probe(**QUICK | options)  # type: ignore[arg-type]
        one = subject(checkpoints["scratch"])
        assert f"{surroundings.num_points(probe._settings())} points of " in probe.estimate(one)
        table = probe.measure(one)
        points = table[table["quantity"].isin(("centre", "line", "surface")) & (table["term"] == "accuracy")]
        has_random = "random" in (*probe.lines, *probe.plane)
        num_random = max(probe.num_random, probe.plane.count("random"))
        assert len(points) + 2 * num_random * has_random == surroundings.num_points(probe._settings())


def test_low_and_high_are_means_over_parts_of_the_images(checkpoints: Paths) -> None:
    options = QUICK | {"lines": ("random",), "plane": ()}
    one = subject(checkpoints["ssat"])
    table = Probe(**options, num_batches=13).measure(one)
    centre = table[table["quantity"] == "centre"].set_index("term")
    losses = [float(one.loss(batch).detach()) for batch in subject_by_image(checkpoints["ssat"]).batches()]
    assert centre.loc["cross_entropy", "low"] == pytest.approx(min(losses))
    assert centre.loc["cross_entropy", "high"] == pytest.approx(max(losses))
    assert np.isnan(centre.loc["l2", "low"])
    whole = Probe(**options, num_batches=1).measure(one)
    points = whole[(whole["quantity"] == "line") & (whole["term"] == "reconstruction")]
    assert points["low"].tolist() == points["high"].tolist() == pytest.approx(points["value"].tolist())


def subject_by_image(path: Path) -> Subject:
    return Subject.of(path, Sample(num_images=13, batch_size=1, device="cpu", dtype="float64"), "train")


def test_an_augmented_landscape_is_another(checkpoints: Paths) -> None:
    options = QUICK | {"lines": ("random",), "plane": ()}
    values = [
        Probe(**options, is_augmented=kind).measure(subject(checkpoints["ssat"]))["value"].iloc[0]
        for kind in (False, True)
    ]
    assert values[0] != values[1]
