"""Figures of methods side by side and of mini-batches: labels, data, and what is missing is left out."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ssat_probe import curvature_drawing
from ssat_probe.probe import measure_all
from ssat_probe.probes import hessian
from ssat_probe.sample import Sample

PARAMS = ("norm.*", "head.*")


def table(checkpoints: dict[str, Path], **options: object) -> pd.DataFrame:
    steps = {} if options.get("method") in ("exact", "pyhessian") else {"steps": 12}
    probe = hessian.Probe(**steps, params=PARAMS, **options)
    sample = Sample(num_images=11, batch_size=4, device="cpu", dtype="float64")
    found = measure_all(probe, list(checkpoints.values()), sample)[0]
    return pd.read_csv(io.StringIO(found.to_csv(index=False)))


@pytest.fixture(scope="module")
def compared(checkpoints: dict[str, Path]) -> pd.DataFrame:
    """Methods really compared on one checkpoint; as if of three, whose eigenvalues differ by a factor."""
    one = table({"ssat": checkpoints["ssat"]}, compare=("lanczos", "lissa", "exact", "pyhessian"))
    parts = []
    for factor, method in ((1.0, "ssat"), (1.5, "ssl_ft"), (0.7, "scratch")):
        part = one.assign(method=method, checkpoint=method)
        part.loc[part["unit"] == "loss", ["value", "low", "high", "residual"]] *= factor
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def test_comparison_shows_each_training_method_and_each_curvature_method(compared):
    figure = hessian.Probe().draw(compared)
    figure.canvas.draw()
    titles = {ax.get_title(loc="left") for ax in figure.axes}
    assert {"SSAT: spectrum", "SSL+FT: negative part", "scratch: spectrum", "Cost (medians)"} <= titles
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"exact", "Lanczos", "LiSSA", "PyHessian"}
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
    one = compared[compared["method"] == "ssat"]
    assert len(curvature_drawing.draw(one).axes) == 5


def test_a_checkpoint_that_was_held_up_does_not_move_the_seconds_shown(compared):
    def shown(found: pd.DataFrame) -> list[str]:
        figure = curvature_drawing.draw(found)
        (costs,) = (ax for ax in figure.axes if ax.get_title(loc="left") == "Cost (medians)")
        return [text.get_text() for text in costs.texts]

    held_up = compared.copy()
    held_up.loc[(held_up["method"] == "ssat") & (held_up["quantity"] == "lanczos:seconds"), "value"] += 100
    assert any(text.endswith(" s") for text in shown(compared))
    assert shown(held_up) == shown(compared)


def test_an_end_at_zero_of_a_convex_part_is_drawn(compared):
    found = compared[compared["method"] == "ssat"].copy()
    for method, value in (("exact", 0.0), ("lanczos", -4.7e-19), ("lissa", 1e-18)):
        found.loc[found["quantity"] == f"{method}:lambda_min", "value"] = value
    figure = curvature_drawing.draw(found)
    figure.canvas.draw()
    (errors,) = (ax for ax in figure.axes if ax.get_title(loc="left") == "Ends against exact")
    dots = [float(y) for line in errors.lines if line.get_marker() in ("o", "^", "D") for y in line.get_ydata()]
    assert len(dots) == 5  # PyHessian has no λmin
    assert max(dots) < 1


def test_summary_has_a_row_per_checkpoint_and_method(compared):
    shown = hessian.Probe().summary(compared)
    assert shown["by"].tolist() == 3 * ["lanczos", "lissa", "exact", "pyhessian"]
    assert len(shown.columns) <= 12
    assert (shown.loc[shown["by"] == "exact", "wasserstein"] == "0").all()


def test_mini_batches_stand_beside_spectra_with_cells_of_their_own(checkpoints):
    found = table({"ssat": checkpoints["ssat"]}, compare=("lanczos", "batches", "pyhessian"))
    shown = hessian.Probe().summary(found).set_index("by")
    assert shown.loc["batches", "nep"] != ""
    assert shown.loc["batches", "lambda_max"] == shown.loc["lanczos", "nep"] == ""
    assert not shown.isin(["nan"]).any(axis=None)
    assert shown.notna().all(axis=None)
    hessian.Probe().draw(found).canvas.draw()


def test_mini_batches(checkpoints):
    found = table(checkpoints, method="batches")
    figure = hessian.Probe().draw(found)
    figure.canvas.draw()
    assert [ax.get_ylabel() for ax in figure.axes] == ["share of mini-batches per unit", "NEP", "APE [loss]"]
    assert (found["quantity"] == "batch_max").sum() == 3 * 3
    assert list(hessian.Probe().summary(found))[:3] == ["checkpoint", "nep", "ape"]


def test_mini_batches_along_a_training_are_drawn(checkpoints):
    one = table({"ssat": checkpoints["ssat"]}, method="batches")
    epochs = [one.assign(epoch=epoch, checkpoint=f"{epoch}") for epoch in (0, 1, 4)]
    hessian.Probe().draw(pd.concat(epochs, ignore_index=True)).canvas.draw()


def test_exact_alone_is_drawn_as_a_spectrum(checkpoints):
    found = table(checkpoints, method="exact")
    figure = hessian.Probe().draw(found)
    figure.canvas.draw()
    assert len(figure.axes) == 6
    assert np.isfinite(found.loc[found["quantity"] == "negative_energy", "value"]).all()


@pytest.mark.parametrize("method", ["lissa", "pyhessian"])
def test_a_method_alone_is_drawn(checkpoints, method):
    hessian.Probe().draw(table({"ssat": checkpoints["ssat"]}, method=method)).canvas.draw()
