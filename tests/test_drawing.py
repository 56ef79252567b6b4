import io
import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from pandas import DataFrame
from scipy import stats

from ssat_probe import drawing
from ssat_probe.measures.statistics import t_interval
from ssat_probe.table import Column

BLOCKS, HEADS = 5, 2


def table(methods: list[str], seeds: list[int], model: str = "vit_nano", blocks: int = BLOCKS) -> pd.DataFrame:
    """As a probe's table is after a round trip through csv."""
    rng = np.random.default_rng(7)
    rows = [
        {
            "checkpoint": f"{model}-digits-{method or 'foreign'}-seed{seed}",
            "model": model,
            "method": method,
            "data": "digits",
            "seed": seed,
            "epoch": 20 if method == "ssl_ft" else 10,
            "block": block,
            "head": head,
            "value": rng.normal(),
        }
        for method in methods
        for seed in seeds
        for block in range(blocks)
        for head in range(HEADS)
    ]
    return pd.read_csv(io.StringIO(pd.DataFrame(rows).to_csv(index=False)))


def drawn(data: pd.DataFrame) -> tuple[mpl.figure.Figure, Axes, list[drawing.Series]]:
    with drawing.style():
        figure, (ax,) = drawing.panels()
        lines = drawing.lines_with_band(ax, data, "block", "value")
        drawing.label_axes(ax, "block", Column("value", "nat", "of something"), "Title")
        drawing.legend_below(figure, drawing.band_note(lines))
    return figure, ax, lines


def test_several_seeds_of_a_method_make_one_line_with_a_band():
    data = table(["ssat", "ssl_ft", "scratch"], [0, 1, 2])
    _, ax, lines = drawn(data)
    assert [one.label for one in lines] == ["scratch", "SSL+FT", "SSAT"]
    assert [one.num_seeds for one in lines] == [3, 3, 3]
    assert len(ax.lines) == len(ax.collections) == 3
    ssat = data[data["method"] == "ssat"].groupby(["block", "checkpoint"])["value"].mean().unstack()
    expected = np.array([t_interval(row) for row in ssat.to_numpy()])
    np.testing.assert_allclose(ax.lines[2].get_ydata(), expected[:, 0], atol=1e-12)
    corners = ax.collections[2].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(expected[:, 1].min())
    assert corners[:, 1].max() == pytest.approx(expected[:, 2].max())


def test_band_is_named_in_the_legend():
    figure, _, lines = drawn(table(["ssat"], [0, 1, 2]))
    assert drawing.band_note(lines) == "line: mean over 3 seeds; band: 95 % t interval"
    assert figure.legends[0].get_title().get_text() == drawing.band_note(lines)


def test_one_checkpoint_per_method_makes_lines_without_bands_named_by_method():
    _, ax, lines = drawn(table(["ssat", "scratch"], [0]))
    assert [one.label for one in lines] == ["scratch", "SSAT"]
    assert not ax.collections
    assert drawing.band_note(lines) == ""


def test_every_method_has_its_own_colour_marker_and_dashes_in_every_figure():
    both = [drawn(table(methods, [0, 1]))[1].lines for methods in (["ssat"], ["scratch", "ssl_ft", "ssat"])]
    assert both[0][0].get_color() == both[1][2].get_color() == drawing.LOOKS["ssat"].colour
    for name in ("colour", "marker", "linestyle"):
        assert len({getattr(look, name) for look in drawing.LOOKS.values()}) == len(drawing.LOOKS)
    assert list(drawing.LOOKS) == list(drawing.METHOD_LABELS)


def test_twelve_foreign_checkpoints_make_twelve_different_lines_and_legend_entries():
    figure, ax, lines = drawn(table([""], list(range(12)), blocks=24))
    assert len(lines) == len(ax.lines) == 12
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 12
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [f"vit_nano-digits-foreign-seed{i}" for i in range(12)]


def test_legend_of_twelve_entries_stays_within_the_figure_and_below_the_panel():
    figure, ax, _ = drawn(table([""], list(range(12))))
    figure.canvas.draw()
    legend, panel = figure.legends[0].get_window_extent(), ax.get_window_extent()
    assert legend.y1 < panel.y0
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    assert legend.y0 >= 0
    assert panel.height > 0.5 * 2.6 * figure.dpi


def test_untrained_networks_are_the_last_line_whatever_stands_before_them():
    lines = drawing.series(table(["untrained", "", "ssat"], [0]))
    assert [one.label for one in lines] == ["SSAT", "vit_nano-digits-foreign-seed0", "untrained"]


def test_markers_of_long_lines_are_few_and_do_not_hide_each_other():
    _, ax, _ = drawn(table(["scratch", "ssat"], [0], blocks=49))
    assert [line.get_markevery() for line in ax.get_lines()] == [(0, 4), (1, 4)]
    _, ax, _ = drawn(table(["scratch", "ssat"], [0], blocks=12))
    assert [line.get_markevery() for line in ax.get_lines()] == [(0, 1), (0, 1)]


def test_models_are_never_averaged_over():
    data = pd.concat([table(["ssat"], [0, 1], "vit_nano"), table(["ssat"], [0, 1], "vit_tiny")])
    lines = drawn(data)[2]
    assert [one.label for one in lines] == ["SSAT, vit_nano, digits, epoch 10", "SSAT, vit_tiny, digits, epoch 10"]
    assert len({one.look for one in lines}) == 2


def test_checkpoints_of_one_seed_are_never_averaged_over():
    data = pd.concat([table(["ssat"], [0]), table(["ssat"], [0]).assign(checkpoint="other.pt")])
    lines = drawn(data)[2]
    assert [one.label for one in lines] == ["vit_nano-digits-ssat-seed0", "other.pt (SSAT)"]
    assert [one.num_seeds for one in lines] == [1, 1]


def test_table_without_identity_draws_by_checkpoint():
    data = table(["ssat"], [0, 1])[["checkpoint", "block", "value"]]
    assert len(drawn(data)[2]) == 2


def test_undefined_values_leave_a_gap_and_drop_no_seed():
    data = table(["ssat"], [0, 1, 2])
    data.loc[(data["block"] == 2) & (data["seed"] == 1), "value"] = np.nan
    assert np.isnan(drawn(data)[1].lines[0].get_ydata()).tolist() == [False, False, True, False, False]


def test_table_is_left_as_it_was():
    data = table([""], [0, 1])
    before = data.copy()
    drawn(data)
    pd.testing.assert_frame_equal(data, before)


def test_table_without_rows_or_checkpoints_is_refused():
    with pytest.raises(ValueError, match=r"needs rows with a column 'checkpoint', got 0 rows with checkpoint, model"):
        drawing.series(table(["ssat"], [0]).iloc[:0])
    with pytest.raises(ValueError, match=r"got 10 rows with block\. Pass the table that the probe wrote"):
        drawing.series(table(["ssat"], [0])[["block"]])


def test_axes_have_labels_with_units():
    ax = drawn(table(["ssat"], [0]))[1]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")) == ("block", "value [nat]", "Title")


def test_style_ends_with_its_context_and_pyplot_is_not_needed():
    before = dict(mpl.rcParams)
    figure, _, _ = drawn(table(["ssat"], [0]))
    assert dict(mpl.rcParams) == before
    assert not hasattr(figure.canvas.manager, "show")


def test_axis_is_cut_where_no_value_can_be():
    with drawing.style():
        _, (ax,) = drawing.panels()
        ax.plot([0, 1], [0.5, 1.7])
        drawing.keep_within(ax, 0, 1)
    low, high = ax.get_ylim()
    assert 0.3 < low < 0.5
    assert 1 < high < 1.1


def test_shaded_spans_have_one_legend_entry():
    with drawing.style():
        _, (ax,) = drawing.panels()
        drawing.shade(ax, [(0, 1), (2, 3)], "attention step")
    assert len(ax.patches) == 2
    assert ax.get_legend_handles_labels()[1] == ["attention step"]


def test_figure_without_entries_has_no_legend():
    with drawing.style():
        figure, _ = drawing.panels()
        drawing.legend_below(figure)
    assert not figure.legends


def test_saved_figure_is_a_png_at_200_dpi_and_a_pdf_with_text(tmp_path: Path):
    figure = drawn(table(["ssat"], [0, 1]))[0]
    paths = drawing.save(figure, tmp_path / "new" / "attention.v2")
    assert [path.name for path in paths] == ["attention.v2.png", "attention.v2.pdf"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["attention.v2.pdf", "attention.v2.png"]
    width = int.from_bytes(paths[0].read_bytes()[16:20], "big")
    assert width == pytest.approx(200 * drawing.PAGE_WIDTH, abs=1)
    content = paths[1].read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/CIDFontType2" in content  # type 42: text stays text
    assert b"CreationDate" not in content


def test_figure_made_with_pyplot_is_closed(tmp_path: Path):
    import matplotlib.pyplot as plt

    with mpl.rc_context({"backend": "agg"}):
        figure = plt.figure()
        drawing.save(figure, tmp_path / "figure")
        assert figure.number not in plt.get_fignums()


def test_saved_figure_is_the_same_bytes_in_another_process(tmp_path: Path):
    program = (
        "import sys; from pathlib import Path; import pandas as pd; from ssat_probe import drawing\n"
        "rows = [dict(checkpoint=f'c{s}', method='ssat', seed=s, block=b, value=b * s) for s in (0, 1) for b in (2, 3)]"
        "\n"
        "with drawing.style():\n"
        "    figure, (ax,) = drawing.panels()\n"
        "    drawing.lines_with_band(ax, pd.DataFrame(rows), 'block', 'value'); drawing.legend_below(figure, 'π ± 1')\n"
        "drawing.save(figure, Path(sys.argv[1]))\n"
    )
    for name, seed in (("one", "1"), ("two", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=True, env=environment)
    for ending in ("png", "pdf"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"two.{ending}").read_bytes()


def test_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file must be a folder that can be written"):
        drawing.save(drawn(table(["ssat"], [0]))[0], tmp_path / "file" / "figure")


@pytest.mark.parametrize("width", [drawing.COLUMN_WIDTH, drawing.PAGE_WIDTH])
def test_a_long_note_stays_within_the_figure(width: float) -> None:
    with drawing.style():
        figure, (ax,) = drawing.panels(width=width)
        ax.plot([0, 1], label="line")
        drawing.legend_below(
            figure, "mean over seeds with its 95 % t interval; a level line does not depend on the axis"
        )
        figure.draw_without_rendering()
        box = figure.legends[0].get_title().get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_dots_are_the_checkpoints_and_the_bar_their_t_interval() -> None:
    values = {"scratch": (1.0, 2.0, 4.0), "ssat": (3.0,)}
    rows = [
        {"checkpoint": f"{m}{i}", "method": m, "model": "v", "data": "d", "seed": i, "epoch": 1, "score": v}
        for m, vs in values.items()
        for i, v in enumerate(vs)
    ]
    with drawing.style():
        _, (ax,) = drawing.panels()
        drawn = drawing.dots_by_series(ax, DataFrame(rows), "score")
    assert [one.label for one in drawn] == ["scratch", "SSAT"]
    assert ax.lines[0].get_ydata().tolist() == [1.0, 2.0, 4.0]
    (bar,) = ax.containers
    (segment,) = bar.lines[2][0].get_segments()
    mean, half = np.mean([1, 2, 4]), stats.t.ppf(0.975, 2) * stats.sem([1, 2, 4])
    np.testing.assert_allclose(segment[:, 1], [mean - half, mean + half])
