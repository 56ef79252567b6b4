"""Sweeps: each training once, where it stands, what is drawn, and a whole one from its file."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pandas import DataFrame

from ssat_probe import analysis, comparison, drawing, report, sweep
from ssat_probe.comparison import Claim, Measure
from ssat_probe.measures.statistics import t_interval
from ssat_probe.sweep import planned

METHODS = ("scratch", "ssl_ft", "ssat")


def cells(vary: dict[str, Any], methods: tuple[str, ...] = METHODS, **shared: Any) -> list[sweep.Planned]:
    return planned({"data": "digits", **shared}, ["vit_nano"], [0, 1], methods, vary, "file.yaml")


def test_a_method_on_which_an_axis_has_no_effect_is_trained_once() -> None:
    made = cells({"lambda_weight": [0.02, 0.1, 0.5], "subset": [100, 200]})
    count = {method: sum(cell.recipe.method == method for cell in made) for method in METHODS}
    assert count == {"scratch": 2 * 2, "ssl_ft": 2 * 2, "ssat": 2 * 6}
    assert len({cell.name for cell in made}) == len(made)
    for cell in made:
        assert cell.point["subset"] == cell.recipe.subset
        expected = cell.recipe.lambda_weight if cell.recipe.method == "ssat" else None
        assert cell.point.get("lambda_weight") == expected
    assert made[0].name == "subset=100/vit_nano-digits-scratch-seed0"
    assert made[2].name == "lambda_weight=0.02,subset=100/vit_nano-digits-ssat-seed0"


@pytest.mark.parametrize("base", [0.1, 0.3, 0.5])
def test_what_all_share_does_not_say_how_often_a_method_is_trained(base: float) -> None:
    vary = {"weight": {"a": {"lambda_weight": 0.1}, "b": {"lambda_weight": 0.5}, "c": {"mask_ratio": 0.6}}}
    made = cells(vary, lambda_weight=base)
    assert [cell.folder for cell in made if cell.recipe.method == "scratch"] == ["", ""]
    assert {cell.folder for cell in made if cell.recipe.method == "ssat"} == {"weight=a", "weight=b", "weight=c"}
    weights = {cell.folder: cell.recipe.lambda_weight for cell in made if cell.recipe.method == "ssat"}
    assert weights == {"weight=a": 0.1, "weight=b": 0.5, "weight=c": base}


def test_without_axes_every_training_has_the_name_of_its_run() -> None:
    assert [cell.name for cell in cells({})] == [cell.recipe.name for cell in cells({})]
    assert len(cells({})) == 6


def test_alternatives_set_fields_together_and_only_where_they_act() -> None:
    length = {"matched": {"budget": "matched"}, "half": {"budget": "equal_epochs"}, "long!": {"pretrain_epochs": 800}}
    made = cells({"length": length}, epochs=10)
    stages = {cell.folder: cell.recipe.stage_epochs for cell in made if cell.recipe.method == "ssl_ft"}
    assert stages == {
        "length=matched": {"pretrain": 10, "finetune": 10},
        "length=half": {"pretrain": 5, "finetune": 5},
        "length=long": {"pretrain": 800, "finetune": 10},
    }
    assert [cell.name for cell in made if cell.recipe.method != "ssl_ft"] == [
        f"vit_nano-digits-{method}-seed{seed}" for seed in (0, 1) for method in ("scratch", "ssat")
    ]


def test_tuples_and_names_make_folders() -> None:
    made = cells({"patch_size": [[1, 1], [2, 4]]}, ("scratch",))
    assert [cell.folder for cell in made] == ["patch_size=1x1"] * 2 + ["patch_size=2x4"] * 2
    assert made[-1].recipe.patch_size == (2, 4)


def test_to_try_a_sweep_out_its_trainings_are_shrunk() -> None:
    shared, fixed = {"epochs": 9}, {"epochs": 1, "subset": 20, "budget": "matched"}
    vary = {"subset": [50, 60], "length": {"half": {"budget": "equal_epochs"}, "same": {"budget": "matched"}}}
    made = planned(shared, ["vit_nano"], [0], ["ssl_ft"], vary, "f", fixed)
    assert [(cell.point["subset"], cell.point["length"]) for cell in made] == [
        (50, "half"), (50, "same"), (60, "half"), (60, "same")
    ]  # fmt: skip
    assert {(cell.recipe.subset, cell.recipe.epochs, cell.recipe.budget) for cell in made} == {(20, 1, "matched")}


@pytest.mark.parametrize(
    ("vary", "sentence"),
    [
        ({"lambda_wieght": [0.1]}, r"No 'lambda_wieght' in the keys of a recipe \(file.yaml\): .* 'lambda_weight'\?"),
        (
            {"lambda_weight": 0.1},
            r"The axis 'lambda_weight' of file.yaml must be a list of values, or alternatives .*0.1;",
        ),
        (
            {"length": {"a": 3}},
            r"The axis 'length' of file.yaml must be a list .* got {'a': 3}; write lambda_weight: \[",
        ),
        (
            {"length": {"a": {3: 4}}},
            r"The axis 'length' of file.yaml must be a list .* got {'a': {3: 4}}; write lambda_w",
        ),
        ({"lambda_weight": [0.1, 1.5]}, r"lambda_weight must be between 0 and 1, got 1.5"),
        (
            {"subset": [9, None, 9]},
            r"axis 'subset' of file.yaml must have each value once, got \[9, None, 9\]; leave one",
        ),
        ({"n": {"a!": {"epochs": 2}, "a?": {"epochs": 3}}}, r"differ in their letters, got two whose folder is 'n=a'"),
    ],
)
def test_mistakes_are_named(vary: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        cells(vary)


# Comparing


@pytest.fixture
def costs() -> DataFrame:
    """SSAT at three λ and scratch at none, three seeds; seconds by formula."""
    rows = [
        {"method": "ssat", "seed": seed, "lambda_weight": weight, "seconds": 10 * weight + seed**2 / 100}
        for weight in (0.5, 0.02, 0.1)
        for seed in range(3)
    ]
    rows += [{"method": "scratch", "seed": seed, "lambda_weight": np.nan, "seconds": 3.0 + seed} for seed in range(3)]
    frame = DataFrame(rows).assign(model="vit", images=100)
    return frame.assign(checkpoint=[f"{row.method}{row.lambda_weight}{row.seed}" for row in frame.itertuples()])


def compared_with(costs: DataFrame, *claims: Claim) -> tuple[DataFrame, DataFrame]:
    measures = {"time": Measure("time", "cost", "seconds", unit="s")}
    return comparison.compare(measures, claims, {}, costs, ("lambda_weight",))


def test_each_point_has_its_own_interval_over_seeds(costs: DataFrame) -> None:
    compared, _ = compared_with(costs)
    assert len(compared) == 4
    row = compared[(compared["method"] == "ssat") & (compared["lambda_weight"] == 0.1)].iloc[0]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx(t_interval([1.0, 1.01, 1.04]))
    readable = comparison.readable(compared)
    assert readable["lambda_weight"].tolist() == ["0.5", "0.02", "0.1"]
    assert readable["scratch"].nunique() == 1
    assert readable["SSAT"].nunique() == 3


def test_a_claim_pairs_seeds_at_its_points(costs: DataFrame) -> None:
    between = Claim("c", "time", 1, ("ssat", "ssat"), at=({"lambda_weight": 0.5}, {"lambda_weight": 0.1}))
    against = Claim("d", "time", 1, ("ssat", "scratch"), at=({"lambda_weight": 0.1}, {"lambda_weight": 0.1}))
    _, verdicts = compared_with(costs, between, against)
    assert verdicts["effect"].tolist() == pytest.approx([4.0, np.mean([1 - 3, 1.01 - 4, 1.04 - 5])])
    assert verdicts["num_seeds"].tolist() == [3, 3]
    assert verdicts["difference"].tolist() == [
        "SSAT lambda_weight=0.5 - SSAT lambda_weight=0.1",
        "SSAT lambda_weight=0.1 - scratch lambda_weight=0.1",
    ]


def test_figure_has_a_line_per_method_in_the_order_of_the_axis(costs: DataFrame) -> None:
    compared, _ = compared_with(costs)
    figure = sweep.draw(compared)
    (ax,) = figure.axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.02", "0.1", "0.5"]
    assert ax.get_xlabel() == "lambda weight"
    assert ax.get_ylabel() == "time [s]"
    means = ax.containers[0].lines[0].get_ydata()
    assert means == pytest.approx([0.2 + 0.05 / 3, 1 + 0.05 / 3, 5 + 0.05 / 3])
    level = next(line for line in ax.lines if line.get_label() == "scratch")
    assert level.get_ydata() == [4.0, 4.0]


def test_other_axes_make_panels(costs: DataFrame) -> None:
    both = pd.concat(
        [
            costs.assign(size=size, seconds=costs["seconds"] * size, checkpoint=costs["checkpoint"] + str(size))
            for size in (1, 2)
        ]
    )
    measures = {name: Measure(name, "cost", name) for name in ("seconds", "images")}
    compared, _ = comparison.compare(measures, [], {}, both, ("lambda_weight", "size"))
    figure = sweep.draw(compared)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["size 1", "size 2"] * 2
    lines = [ax.containers[0].lines[0].get_ydata()[2] for ax in figure.axes[:2]]
    assert lines[1] == pytest.approx(2 * lines[0])


# Whole

TINY = """
title: Tiny sweep
recipe: {model: vit_pico, data: digits, subset: 40, epochs: 1, batch_size: 20, augmentation: crop}
methods: [scratch, ssat]
seeds: [0, 1]
vary:
  lambda_weight: [0.1, 0.5]
probes:
  accuracy: {num_images: 30}
  variance: {num_images: 10, untrained_twin: true}
measures:
  test accuracy: {probe: accuracy, column: accuracy}
  variance: {probe: variance, column: variance}
  training time: {probe: cost, column: seconds, unit: s}
tradeoffs:
  - [test accuracy, training time]
claims:
  - {claim: more classification classifies better, measure: test accuracy, sign: 1, methods: [ssat, ssat],
     at: [{lambda_weight: 0.5}, {lambda_weight: 0.1}]}
threads: 1
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


def test_a_sweep_runs_from_its_file_and_what_is_there_is_reused(tiny: Path, tmp_path: Path) -> None:
    chosen = analysis.read(tiny)
    out, runs = tmp_path / "out", tmp_path / "runs"
    _, verdicts = analysis.run(chosen, out, runs, device="cpu", jobs=1)
    assert len(list(runs.rglob("s*.pt"))) == 2 + 4
    table = pd.read_csv(out / "accuracy.csv")
    assert table["checkpoint"].tolist() == [cell.name for cell in chosen.cells]
    compared = pd.read_csv(out / "comparison.csv")
    for weight in (0.1, 0.5):
        row = compared.query(f"method == 'ssat' and measure == 'test accuracy' and lambda_weight == {weight}").iloc[0]
        mine = table[(table["method"] == "ssat") & (table["lambda_weight"] == weight)]["accuracy"]
        assert row["mean"] == pytest.approx(mine.mean())
        assert row["num_seeds"] == 2
    twins = pd.read_csv(out / "variance.csv").query("method == 'untrained'")
    assert twins["checkpoint"].nunique() == 2
    assert twins["lambda_weight"].isna().all()
    assert verdicts["num_seeds"].tolist() == [2]
    assert (out / "sweep.pdf").is_file()
    page = report.write_report(out).read_text(encoding="utf-8")
    assert "<h2>Sweep</h2>" in page
    assert "<h2>Trade-off</h2>" in page
    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*.*")}
    analysis.run(chosen, out, runs, device="cpu", jobs=1)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.*")} == written


def test_nothing_on_an_axis_is_a_point_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "null.yaml"
    path.write_text(
        """
recipe: {model: vit_pico, data: digits, epochs: 1, batch_size: 20, augmentation: none}
methods: [ssat]
seeds: [0, 1]
vary: {subset: [20, 40, null]}
probes: {accuracy: {num_images: 30}}
measures:
  images: {probe: cost, column: images}
  epochs: {probe: accuracy, column: epoch}
claims:
  - {claim: 40 sees more than 20, measure: images, sign: 1, methods: [ssat, ssat], at: [{subset: 40}, {subset: 20}]}
  - {claim: all sees more, measure: images, sign: 1, methods: [ssat, ssat], at: [{subset: null}, {subset: 40}]}
threads: 1
""",
        encoding="utf-8",
    )
    chosen = analysis.read(path)
    assert {(cell.folder, cell.recipe.subset) for cell in chosen.cells} == {
        ("subset=20", 20), ("subset=40", 40), ("subset=none", None)
    }  # fmt: skip
    readable, verdicts = analysis.run(chosen, tmp_path / "out", tmp_path / "runs", device="cpu", jobs=1)
    of_all = 58 * 20  # whole batches
    assert verdicts["effect"].tolist() == [20, of_all - 40]
    assert readable["subset"].tolist() == ["20", "40", "none"] * 2
    compared = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert compared.query("measure == 'images'")["mean"].tolist() == [20, 40, of_all]
    assert compared["num_seeds"].tolist() == [2] * 6


def test_smoke_form_keeps_the_points_and_a_changed_recipe_has_a_name_of_its_own(tiny: Path) -> None:
    chosen = analysis.read(tiny, is_smoke=True, changes={"model": "vit_nano", "base_lr": 0.01})
    assert chosen.name == "tiny-model=vit_nano-base_lr=0.01-smoke"
    assert {recipe.model for recipe in chosen.recipes} == {"vit_nano"}
    assert {(cell.point.get("lambda_weight"), cell.recipe.epochs, cell.recipe.base_lr) for cell in chosen.cells} == {
        (None, 1, 0.01),
        (0.1, 1, 0.01),
        (0.5, 1, 0.01),
    }


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xb2\xff")
    with pytest.raises(ValueError, match=r"bytes.yaml must be YAML in UTF-8, got other bytes; give"):
        analysis.read(tmp_path / "bytes.yaml")


@pytest.mark.parametrize("axis", ["lambda_weight", "pre-training", "v1.0+x"])
def test_seeds_at_one_point_of_an_axis_of_any_name_make_one_line(axis: str) -> None:
    rows = [
        {"checkpoint": f"{axis}={value}/run-seed{seed}", "method": "ssl_ft", "seed": seed, "model": "v"}
        for value in (1, 2)
        for seed in range(3)
    ]
    assert [one.num_seeds for one in drawing.series(DataFrame(rows))] == [3, 3]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("at: [{lambda_weight: 0.5}, {lambda_weight: 0.1}]", "role: secondary"),
         r"must be about one training of ssat per seed, got 4 of 2 seeds; say where on lambda_weight with at:"),
        (("{lambda_weight: 0.5},", "{lambda_weight: 0.6},"), r"No '0.6' in the values of lambda_weight, where claim"),
        (("{lambda_weight: 0.5},", "{lambda_weight: '0.5'},"), r"""No "'0.5'" in the values of lambda_weight, """),
        (("{lambda_weight: 0.5},", "{lambda: 0.5},"), r"No 'lambda' in the axes of the sweep, where claim 'more cl"),
        (("at: [{lambda_weight: 0.5}, {lambda_weight: 0.1}]", "at: [3]"), r"must be one point or two, got \[3\];"),
        (("lambda_weight: [0.1, 0.5]", "seed: [0, 1]"), r"not be named as a column of a table, got 'seed', which acc"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_named(tiny: Path, change: tuple[str, str], sentence: str) -> None:
    tiny.write_text(TINY.replace(*change), encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        analysis.read(tiny)
