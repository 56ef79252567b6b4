"""Figures of landscapes: what is drawn, from the table alone, and that all panels of a term share one scale."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ssat_probe import landscape_drawing, probe
from ssat_probe.probes.landscape import Probe
from ssat_probe.sample import Sample

METHODS = ("scratch", "SSL+FT", "SSAT")


@pytest.fixture(scope="module")
def table(checkpoints: dict[str, Path]) -> pd.DataFrame:
    sample = Sample(num_images=13, batch_size=13, device="cpu")
    chosen = Probe(points=5, num_random=2, steps=6, plane=("top", "bottom"))
    return probe.measure_all(chosen, list(checkpoints.values()), sample)[0]


def shared_levels(table: pd.DataFrame, term: str) -> list[float]:
    rows = table[(table["quantity"] == "surface") & (table["term"] == term)]
    return landscape_drawing.levels_of(rows["value"], term)


def solids(table: pd.DataFrame) -> list[Any]:
    return [ax for ax in landscape_drawing.draw(table).axes if ax.name == "3d"]


def test_the_figure_shows_lines_terms_apart_and_surfaces_per_method(table: pd.DataFrame) -> None:
    axes = landscape_drawing.draw(table).axes
    flat = [ax.get_title(loc="left") for ax in axes if ax.name != "3d"]
    assert flat[:3] == ["random directions"] * 3
    assert flat[3:6] == ["eigenvector of λmax", "eigenvector of λmin", "gradient"]
    assert flat[6:9] == [f"{method}\ncross-entropy [nat]" for method in METHODS]
    assert flat[9:11] == [f"{method}\nreconstruction [pixel²]" for method in METHODS[1:]]
    assert flat[11:] == [f"{method}\naccuracy" for method in METHODS]
    assert [ax.get_title(loc="left") for ax in solids(table)] == flat[6:9]


def test_surfaces_of_a_term_share_their_levels(table: pd.DataFrame) -> None:
    levels = shared_levels(table, "cross_entropy")
    values = table[(table["quantity"] == "surface") & (table["term"] == "cross_entropy")]["value"]
    assert levels[0] <= values.min()
    assert levels[-1] >= values.max()
    assert levels == sorted(levels)
    level = landscape_drawing._quadratic_level(table, "cross_entropy")
    assert level is not None
    assert level > table.loc[table["quantity"] == "centre", "value"].min()


def test_accuracy_is_drawn_from_the_grid_in_equal_steps_that_all_share(table: pd.DataFrame) -> None:
    axes = [ax for ax in landscape_drawing.draw(table).axes if ax.get_title(loc="left").endswith("accuracy")]
    rows = table[(table["quantity"] == "surface") & (table["term"] == "accuracy")]
    levels = shared_levels(table, "accuracy")
    assert levels[0] <= rows["value"].min()
    assert levels[-1] >= rows["value"].max()
    assert np.diff(levels) == pytest.approx(levels[1] - levels[0])
    for ax, method in zip(axes, ("scratch", "ssl_ft", "ssat"), strict=True):
        filled = ax.collections[0]
        assert list(filled.levels) == levels
        assert (filled.norm.vmin, filled.norm.vmax) == (levels[0], levels[-1])
        x, y, _ = landscape_drawing._grid(rows[rows["method"] == method])
        ends = (x[0], x[-1], y[0], y[-1])
        assert (*ax.get_xlim(), *ax.get_ylim()) == pytest.approx(ends)
    flat = table.copy()
    flat.loc[flat["term"] == "accuracy", "value"] = 1.0
    landscape_drawing.draw(flat).canvas.draw()


def test_the_loss_whose_parameters_moved_comes_first_with_its_quadratic(table: pd.DataFrame) -> None:
    alone = table[table["method"] == "ssat"].copy()
    is_fact = ~alone["quantity"].isin(("line", "surface", "centre"))
    alone.loc[is_fact, "term"] = "joint"
    axes = landscape_drawing.draw(alone).axes
    titles = [ax.get_title(loc="left") for ax in axes]
    assert titles.count("SSAT\njoint loss [weighted]") == 2
    assert [axes[titles.index(kind)].get_ylabel() for kind in ("eigenvector of λmax", "gradient")] == [
        "joint loss [weighted]"
    ] * 2
    assert "SSAT\ncross-entropy [nat]" in titles


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_solid_surfaces_share_their_heights_and_mark_the_centre(table: pd.DataFrame, factor: float) -> None:
    steep = table.copy()
    is_far = (steep["quantity"] == "surface") & (steep["x"] > 0)
    steep.loc[is_far, "value"] *= factor
    shown = solids(steep)
    levels = shared_levels(steep, "cross_entropy")
    is_log = levels[-1] > landscape_drawing.DECADES * levels[0]
    assert is_log or factor == 1
    ends = np.log10([levels[0], levels[-1]]) if is_log else np.array([levels[0], levels[-1]])
    centres = steep[(steep["quantity"] == "centre") & (steep["term"] == "cross_entropy")].set_index("method")["value"]
    for ax, method in zip(shown, ("scratch", "ssl_ft", "ssat"), strict=True):
        assert ax.get_zlim() == pytest.approx(ends)
        height = 10 ** ax.lines[0].get_data_3d()[2][0] if is_log else ax.lines[0].get_data_3d()[2][0]
        assert height == pytest.approx(centres[method])


def test_the_outer_band_spans_the_means_over_parts_of_the_images(table: pd.DataFrame) -> None:
    alone = table[table["method"] == "ssat"]
    ax = next(ax for ax in landscape_drawing.draw(alone).axes if ax.get_title(loc="left") == "eigenvector of λmax")
    rows = alone[(alone["quantity"] == "line") & (alone["direction"] == "top") & (alone["term"] == "cross_entropy")]
    heights = [band.get_paths()[0].vertices[:, 1] for band in ax.collections]
    assert heights[0].min() == pytest.approx(rows["low"].min())
    assert heights[0].max() == pytest.approx(rows["high"].max())
    assert heights[1].max() == pytest.approx(rows["value"].max())


@pytest.mark.parametrize(("low", "high"), [(0.012, 0.019), (2.1, 9.7), (0.13, 41.0), (0.3, 0.3)])
def test_levels_are_round_and_span_the_values(low: float, high: float) -> None:
    levels = landscape_drawing.levels_of(pd.Series([high, low, np.nan]), "cross_entropy")
    assert levels[0] <= low
    assert levels[-1] >= high
    assert levels == sorted(set(levels))
    assert 2 <= len(levels) <= 12
    assert all(level == pytest.approx(float(f"{level:.2g}")) for level in levels)


def test_holes_are_drawn_as_holes(table: pd.DataFrame) -> None:
    holes = table.copy()
    holes.loc[holes["x"] > 0, "value"] = np.nan
    landscape_drawing.draw(holes).canvas.draw()


def test_without_a_surface_there_are_lines_alone(table: pd.DataFrame) -> None:
    assert len(landscape_drawing.draw(table[table["quantity"] != "surface"]).axes) == 6
