"""Comparison of methods: intervals and verdicts by value."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas import DataFrame
from scipy import stats

from ssat_probe import comparison
from ssat_probe.comparison import Claim, Measure

VALUES = {"scratch": (0.5, 0.6, 0.7), "ssl_ft": (0.70, 0.72, 0.77), "ssat": (0.80, 0.83, 0.86)}


@pytest.fixture
def table() -> DataFrame:
    """Two rows per checkpoint, of blocks 0 and 1; the mean over blocks is what VALUES says."""
    rows = [
        {"checkpoint": f"{method}{seed}", "method": method, "seed": seed, "block": block, "score": value + shift}
        for method, values in VALUES.items()
        for seed, value in enumerate(values)
        for block, shift in ((0, -0.1), (1, 0.1))
    ]
    return DataFrame(rows)


@pytest.fixture
def costs(table: DataFrame) -> DataFrame:
    cells = table[["checkpoint", "method", "seed"]].drop_duplicates()
    return cells.assign(model="vit", seconds=2.0, images=100)


def test_measure_is_the_mean_over_the_rows_that_the_condition_selects(table: DataFrame) -> None:
    assert Measure("m", "p", "score").of(table)["ssat1"] == pytest.approx(0.83)
    assert Measure("m", "p", "score", where="block == 1").of(table)["ssat1"] == pytest.approx(0.93)


def test_epochs_of_a_run_are_never_averaged_over(table: DataFrame) -> None:
    along = pd.concat([table.assign(epoch=epoch, score=table["score"] * epoch) for epoch in (1, 7, 3)])
    with pytest.raises(ValueError, match=r"measure 'm' must select one epoch of each run, got 1, 3, 7; add one, such"):
        Measure("m", "p", "score").of(along)
    assert Measure("m", "p", "score", where="epoch == epoch.max()").of(along)["ssat1"] == pytest.approx(7 * 0.83)
    assert Measure("m", "p", "score", where="epoch == 3 and block == 1").of(along)["ssat1"] == pytest.approx(3 * 0.93)


def test_compared_methods_have_students_interval_over_seeds(table: DataFrame, costs: DataFrame) -> None:
    compared, _ = comparison.compare({"score": Measure("score", "p", "score")}, [], {"p": table}, costs)
    row = compared[compared["method"] == "ssl_ft"].iloc[0]
    mean, sem = np.mean(VALUES["ssl_ft"]), stats.sem(VALUES["ssl_ft"])
    expected = stats.t.interval(0.95, 2, loc=mean, scale=sem)
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((mean, *expected))
    assert row["num_seeds"] == 3


def test_untrained_twins_of_any_probe_are_compared_too(table: DataFrame, costs: DataFrame) -> None:
    twins = table[table["method"] == "scratch"].assign(method="untrained", score=0.1)
    twins["checkpoint"] = "twin" + twins["seed"].astype(str)
    measures = {"score": Measure("score", "p", "score"), "more": Measure("more", "q", "score")}
    compared, _ = comparison.compare(measures, [], {"p": table, "q": pd.concat([table, twins])}, costs)
    of_twins = compared[compared["method"] == "untrained"].set_index("measure")
    assert of_twins["num_seeds"].to_dict() == {"score": 0, "more": 3}
    assert of_twins["mean"]["more"] == pytest.approx(0.1)


def test_other_settings_are_never_averaged_over(table: DataFrame, costs: DataFrame) -> None:
    table["setting"] = np.where(table["seed"] == 2, "16x16 px, 8x8 patches", "8x8 px, 4x4 patches")
    with pytest.raises(ValueError, match="for all seeds of scratch, got 8x8 px, 4x4 patches and 16x16 px"):
        comparison.compare({"score": Measure("score", "p", "score")}, [], {"p": table}, costs)


@pytest.mark.parametrize(("sign", "expected"), [(1, "supported"), (-1, "contradicted")])
def test_verdict_follows_from_the_paired_interval(table: DataFrame, costs: DataFrame, sign: int, expected: str) -> None:
    measures = {"score": Measure("score", "p", "score")}
    _, verdicts = comparison.compare(measures, [Claim("c", "score", sign)], {"p": table}, costs)
    row = verdicts.iloc[0]
    differences = np.subtract(VALUES["ssat"], VALUES["ssl_ft"])
    interval = stats.t.interval(0.95, 2, loc=differences.mean(), scale=stats.sem(differences))
    assert (row["effect"], row["low"], row["high"]) == pytest.approx((differences.mean(), *interval))
    assert row["verdict"] == expected
    assert row["difference"] == "SSAT - SSL+FT"


def test_interval_that_holds_zero_is_inconclusive(table: DataFrame, costs: DataFrame) -> None:
    table.loc[(table["method"] == "ssat") & (table["seed"] == 0), "score"] -= 0.5
    measures = {"score": Measure("score", "p", "score")}
    _, verdicts = comparison.compare(measures, [Claim("c", "score", 1)], {"p": table}, costs)
    assert verdicts.iloc[0]["verdict"] == "inconclusive"


def test_claims_pair_only_the_seeds_that_both_methods_have(table: DataFrame, costs: DataFrame) -> None:
    table = table[~((table["method"] == "ssat") & (table["seed"] == 2))]
    measures = {"score": Measure("score", "p", "score")}
    _, verdicts = comparison.compare(measures, [Claim("c", "score", 1)], {"p": table}, costs)
    assert verdicts.iloc[0]["num_seeds"] == 2


def test_a_claim_about_two_trainings_of_one_seed_is_refused(table: DataFrame, costs: DataFrame) -> None:
    twice = [
        pd.concat([one.assign(x=x, checkpoint=one["checkpoint"] + str(x)) for x in (1, 2)]) for one in (table, costs)
    ]
    measures = {"score": Measure("score", "p", "score")}
    with pytest.raises(
        ValueError, match=r"Claim 'c' must be about one training of ssat per seed, got 6 of 3 seeds; say"
    ):
        comparison.compare(measures, [Claim("c", "score", 1)], {"p": twice[0]}, twice[1], ("x",))


def test_measure_that_a_method_does_not_have_is_left_open(table: DataFrame, costs: DataFrame) -> None:
    table.loc[table["method"] == "scratch", "score"] = float("nan")
    compared, _ = comparison.compare({"score": Measure("score", "p", "score")}, [], {"p": table}, costs)
    row = compared[compared["method"] == "scratch"].iloc[0]
    assert np.isnan(row["mean"])
    assert row["num_seeds"] == 0
    assert comparison.readable(compared)["scratch"].tolist() == ["-"]


def test_large_numbers_are_written_out(costs: DataFrame, table: DataFrame) -> None:
    costs["images"] = 60_000
    compared, _ = comparison.compare({"images": Measure("images", "cost", "images")}, [], {"p": table}, costs)
    assert comparison.readable(compared)["SSAT"].tolist() == ["60,000"]


def test_written_tables_say_the_same_in_every_format(table: DataFrame, costs: DataFrame, tmp_path: Path) -> None:
    measures = {"score_a": Measure("score_a", "p", "score", unit="activation²"), "s": Measure("s", "cost", "seconds")}
    result = comparison.compare(measures, [Claim("a | b", "s", 1)], {"p": table}, costs)
    comparison.write(*result, tmp_path)
    read_back = comparison.readable(pd.read_csv(tmp_path / "comparison.csv"))
    assert comparison.markdown(read_back) == (tmp_path / "comparison.md").read_text()
    assert "| score_a [activation²] | 0.6 [0.3516, 0.8484] |" in (tmp_path / "comparison.md").read_text()
    assert r"score\_a [activation$^2$] & 0.6 [0.3516, 0.8484]" in (tmp_path / "comparison.tex").read_text()
    assert "| s | 2 | 2 | 2 |" in (tmp_path / "comparison.md").read_text()
    claims = (tmp_path / "claims.md").read_text()
    assert "a &#124; b" in claims
    assert comparison.RULE in claims


def test_errors_say_what_is_wrong(table: DataFrame) -> None:
    with pytest.raises(ValueError, match=r"No 'scor' in the columns of p: .* Did you mean 'score'\?"):
        Measure("m", "p", "scor").of(table)
    with pytest.raises(ValueError, match="got none for 'block > 7'"):
        Measure("m", "p", "score", where="block > 7").of(table)
    with pytest.raises(ValueError, match="measure 'm' must select rows of p, got 'blok > 7'"):
        Measure("m", "p", "score", where="blok > 7").of(table)
    with pytest.raises(ValueError, match=r"No 'colum' in the keys of measure 'm'"):
        comparison.measure_from("m", {"probe": "p", "colum": "score"})
    measures = {"score": Measure("score", "p", "score")}
    with pytest.raises(ValueError, match=r"No 'scores' in measures: score\."):
        comparison.claim_from({"claim": "c", "measure": "scores", "sign": 1}, measures)
    with pytest.raises(ValueError, match="The sign of claim 'c' must be 1 or -1, got 0"):
        comparison.claim_from({"claim": "c", "measure": "score", "sign": 0}, measures)
    with pytest.raises(ValueError, match=r"No 'roll' in the keys of a claim"):
        comparison.claim_from({"claim": "c", "measure": "score", "sign": 1, "roll": "x"}, measures)


def test_measure_over_two_models_at_once_is_refused(table: DataFrame, costs: DataFrame) -> None:
    other = table.assign(checkpoint=table["checkpoint"] + "-large", model="large", score=table["score"] + 1)
    both = pd.concat([table.assign(model="vit"), other])
    cells = pd.concat([costs, costs.assign(checkpoint=costs["checkpoint"] + "-large", model="large")])
    with pytest.raises(ValueError, match="'score' must give one number per method and seed, got one for each of"):
        comparison.compare({"score": Measure("score", "p", "score")}, [], {"p": both}, cells)
    one = Measure("score", "p", "score", where="model == 'large'")
    compared, _ = comparison.compare({"score": one}, [], {"p": both}, cells)
    assert compared.set_index("method")["mean"]["scratch"] == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"claim": None},
            "A claim must say in text what is claimed, got {'claim': None, .*; write claim: SSAT is better",
        ),
        ({"measure": 3}, r"No '3' in measures: score\."),
        ({"sign": True}, "The sign of claim 'c' must be 1 or -1, got True"),
        ({"role": "primry"}, "No 'primry' in the roles of a claim, .*: primary, secondary. Did you mean 'primary'"),
        (
            {"methods": ["ssat"]},
            r"The methods of claim 'c' must be two, .*, got \['ssat'\]; write methods: \[ssat, ssl",
        ),
        ({"methods": "ssat"}, "The methods of claim 'c' must be two, .*, got 'ssat'"),
        ({"at": "subset"}, "Where claim 'c' is made must be one point or two, got 'subset'; write at:"),
    ],
)
def test_a_claim_is_checked_before_anything_is_trained(change: dict[str, object], sentence: str) -> None:
    values = {"claim": "c", "measure": "score", "sign": 1} | change
    with pytest.raises(ValueError, match=sentence):
        comparison.claim_from(values, {"score": Measure("score", "p", "score")})


def test_a_claim_at_no_value_is_made_at_the_point_of_that_name() -> None:
    values = {"claim": "c", "measure": "score", "sign": 1, "at": [{"subset": None}, {"patch_size": [2, 4]}]}
    claim = comparison.claim_from(values, {"score": Measure("score", "p", "score")})
    assert claim.at == ({"subset": "none"}, {"patch_size": "2x4"})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"probe": "p"}, "The column of measure 'm' must be text, got None; write one such as {probe: accuracy, "),
        ({"column": "score"}, "The probe of measure 'm' must be text, got None"),
        ({"probe": "p", "column": "score", "where": 3}, "The where of measure 'm' must be text, got 3"),
        ({"probe": "p", "column": "score", "name": "n"}, "No 'name' in the keys of measure 'm'"),
        ({"probe": "p", "column": "score", 3: 4}, "No '3' in the keys of measure 'm'"),
    ],
)
def test_a_measure_says_its_probe_and_column_in_text(values: dict[object, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        comparison.measure_from("m", values)


def test_without_claims_a_sentence_stands_in_place_of_a_table(
    table: DataFrame, costs: DataFrame, tmp_path: Path
) -> None:
    comparison.write(*comparison.compare({"s": Measure("s", "p", "score")}, [], {"p": table}, costs), tmp_path)
    assert (tmp_path / "claims.md").read_text() == "This analysis makes no claims.\n"
