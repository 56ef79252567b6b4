"""Figures and terminal rows of spectra, of a network of a few parameters as if of many checkpoints."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssat_probe import spectrum_drawing
from ssat_probe.measures.certificate import certify
from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.methods import Settings, rows_of
from ssat_probe.probes import hessian


def spectrum(steps: int) -> pd.DataFrame:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    images, labels = torch.randn(17, 5).double(), torch.randint(3, (17,))
    operator = HessianOperator(
        dict(net.named_parameters()), lambda b: F.cross_entropy(net(b[0]), b[1]), [((images, labels), 17)]
    )
    rows = rows_of("lanczos", operator, certify(operator), operator.evaluate(), Settings(steps=steps))
    names = [column.name for column in hessian.Probe.columns]
    table = pd.DataFrame([{"probe": -1, "index": 0, "unit": ""} | row for row in rows], columns=names)
    return table.astype({name: float for name in names[3:-1]})


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return spectrum(20)


def compared(table: pd.DataFrame, num_seeds: int, methods: tuple[str, ...]) -> pd.DataFrame:
    """The table as if of several checkpoints, eigenvalues scaled by different factors, through csv and back."""
    pieces = []
    for place, method in enumerate(methods):
        for seed in range(num_seeds):
            piece = table[table["probe"] <= 0].copy()
            is_scaled = piece["unit"] == "loss"
            piece.loc[is_scaled, ["value", "low", "high", "residual"]] *= 1 + 0.3 * place + 0.1 * seed
            identity = {
                "checkpoint": f"{method or 'foreign'}-{seed}",
                "model": "vit",
                "method": method,
                "data": "digits",
            }
            for index, (name, value) in enumerate((identity | {"seed": seed, "epoch": 7}).items()):
                piece.insert(index, name, value)
            pieces.append(piece)
    return pd.read_csv(io.StringIO(pd.concat(pieces).to_csv(index=False)))


class TestFigure:
    @pytest.mark.parametrize(
        ("num_seeds", "methods"), [(1, ("",)), (1, ("ssat", "ssl_ft", "scratch")), (4, ("scratch", "ssl_ft", "ssat"))]
    )
    def test_draws_from_a_saved_table(self, table, num_seeds, methods):
        figure = spectrum_drawing.draw(compared(table, num_seeds, methods))
        assert len(figure.axes) == 6
        assert figure.axes[0].get_title(loc="left") == "Spectrum"
        assert figure.axes[1].get_title(loc="left") == "Negative part alone"
        assert figure.axes[1].get_xlim()[1] == 0
        for ax in figure.axes[:3]:
            assert ax.get_xlabel()
        assert all(ax.get_ylabel() for ax in figure.axes)
        labels = {text.get_text() for text in figure.legends[0].get_texts()}
        assert labels == ({"scratch", "SSL+FT", "SSAT"} if any(methods) else {"foreign-0"})
        figure.canvas.draw()

    @pytest.mark.parametrize("error", [np.nan, 0.1])
    def test_bars_are_explained_where_there_are_some(self, table, error):
        lone = compared(table, 1, ("ssat",)).assign(data_error=error)
        note = spectrum_drawing.draw(lone).legends[0].get_title().get_text()
        assert ("two standard errors" in note) == (not np.isnan(error))
        assert "certain bounds" in note

    def test_points_are_the_values_and_bars_their_mean(self, table):
        many = compared(table, 4, ("scratch", "ssl_ft", "ssat"))
        ax = spectrum_drawing.draw(many).axes[3]
        rows = many[(many["quantity"] == "lambda_max") & (many["method"] == "ssat")]
        drawn = [line for line in ax.get_lines() if line.get_label() == "SSAT"]
        np.testing.assert_allclose(drawn[0].get_ydata(), rows["value"])
        means = [float(line.get_ydata()[0]) for line in ax.get_lines() if len(line.get_ydata()) == 1]
        assert any(np.isclose(mean, rows["value"].mean()) for mean in means)


class TestSummary:
    def test_one_row_per_checkpoint_in_the_order_of_report(self, table):
        summary = spectrum_drawing.summary(compared(table, 2, ("scratch", "ssat")))
        assert list(summary.columns) == [
            "checkpoint",
            "lambda_max",
            "lambda_min",
            "lambda_ratio",
            "negative_energy",
            "below -0.001 λmax",
            "below -0.01 λmax",
            "near_zero_mass",
            "negative_fraction",
            "trace",
        ]
        assert summary["checkpoint"].tolist() == ["scratch-0", "scratch-1", "ssat-0", "ssat-1"]
        assert summary["negative_fraction"].str.match(r"\[0\.\d+, 0\.\d+\]").all()

    def test_star_marks_an_end_that_has_not_converged(self):
        few = spectrum(3).assign(checkpoint="a")
        assert spectrum_drawing.summary(few)["lambda_min"].iloc[0].endswith("*")
