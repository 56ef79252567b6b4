"""Curvature along trainings: what is drawn is what the table holds."""

import numpy as np
import pandas as pd
import pytest
from pandas import DataFrame

from ssat_probe.trajectory_drawing import draw, is_trajectory

EPOCHS = (0, 3, 11)


def table_of(edge: float | None = None, converged: float = 1.0) -> DataFrame:
    """Largest eigenvalue 10 + epoch + seed; smallest -(1 + seed); negative energy a tenth of the seed and a half."""
    rows = []
    for method in ("scratch", "ssat"):
        for seed in (0, 2):
            for epoch in EPOCHS:
                name = f"vit-digits-{method}-seed{seed}"
                own = {"checkpoint": name if epoch == 0 else f"{name} (runs/{name}/train-{epoch}.pt)", "seed": seed}
                own |= {"model": "vit", "method": method, "data": "digits", "epoch": epoch, "setting": "8x8"}
                values = {"lambda_max": 10.0 + epoch + seed, "lambda_min": -1.0 - seed}
                values |= {"negative_energy": 0.05 + seed / 10}
                values |= {"edge_of_stability": edge} if edge and method == "scratch" else {}
                rows += [own | {"quantity": q, "value": v, "converged": converged} for q, v in values.items()]
    return DataFrame(rows)


def test_lines_are_means_over_the_seeds_at_each_epoch() -> None:
    figure = draw(table_of())
    for ax, expected in zip(figure.axes, ([11, 14, 22], [-2] * 3, [0.15] * 3), strict=True):
        lines = {line.get_label(): line for line in ax.get_lines()}
        seeds = [np.asarray(line.get_ydata(), float).mean() for line in ax.get_lines() if line.get_linewidth() == 0.5]
        shift = 0.1 if ax is figure.axes[2] else 1.0
        around = np.mean(expected) + shift * np.array([-1, 1, -1, 1])
        assert sorted(seeds[:4]) == pytest.approx(sorted(around))
        for name in ("scratch", "SSAT"):
            assert list(lines[name].get_xdata()) == list(EPOCHS)
            assert np.asarray(lines[name].get_ydata(), float) == pytest.approx(expected)
        assert len(ax.collections) == 2  # a band each
    (legend,) = figure.legends
    assert legend.get_title().get_text().replace("\n", " ") == (
        "thin: seeds, thick: mean with 95 % t interval; hollow: not converged; "
        "no 2 / learning rate: AdamW's bound is of the preconditioned Hessian"
    )


def test_fractions_of_epochs_are_short_at_the_axis() -> None:
    table = table_of()
    table["epoch"] /= 9
    (ax, *_) = draw(table).axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "0.33", "1.2"]


def test_the_edge_is_drawn_for_those_that_have_one_alone() -> None:
    figure = draw(table_of(edge=25.0))
    edges = [line for ax in figure.axes for line in ax.get_lines() if "edge" in str(line.get_label())]
    assert [line.get_label() for line in edges] == ["edge of stability, scratch"]
    assert edges[0] in figure.axes[0].get_lines()
    assert (list(edges[0].get_xdata()), list(edges[0].get_ydata())) == (list(EPOCHS), [25.0] * 3)
    assert figure.axes[0].get_ylim()[1] > 25
    assert "dashed: 2 (1 + momentum) / learning rate" in figure.legends[0].get_title().get_text()


def test_a_far_edge_does_not_press_the_curves_flat() -> None:
    assert draw(table_of(edge=1e6)).axes[0].get_ylim() == pytest.approx(draw(table_of()).axes[0].get_ylim())


def test_values_that_have_not_converged_are_hollow() -> None:
    for converged, num in ((1.0, 0), (0.0, 3)):
        hollow = [
            len(np.asarray(line.get_xdata()))
            for line in draw(table_of(converged=converged)).axes[0].get_lines()
            if line.get_markerfacecolor() == "white"
        ]
        assert hollow == [num] * 2


def test_stages_of_a_run_are_lines_of_their_own() -> None:
    table = table_of().query("method == 'ssat'").assign(method="ssl_ft")
    before = table.assign(checkpoint=table["checkpoint"].str.replace(r"(seed\d)", r"\1-pretrain", regex=True))
    labels = {line.get_label() for line in draw(pd.concat([table, before])).axes[0].get_lines()}
    assert {"SSL+FT", "SSL+FT, pre-training, vit, digits"} <= labels


def test_a_table_is_one_of_trajectories_when_a_run_is_in_it_at_several_epochs() -> None:
    table = table_of()
    assert is_trajectory(table)
    assert not is_trajectory(table[table["epoch"] == 3])
    assert not is_trajectory(table.drop(columns="epoch"))
    apart = table[(table["epoch"] == 3) == (table["seed"] == 2)]
    assert not is_trajectory(apart[apart["epoch"] != 0])  # two runs, each at an epoch of its own
