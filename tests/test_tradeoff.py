"""Trade-offs: what stands over what, which points are joined and named, mistakes in a file."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from pandas import DataFrame

from ssat_probe import comparison, tradeoff
from ssat_probe.comparison import Measure

WEIGHTS = (0.5, 0.02, 0.1)


@pytest.fixture
def compared() -> DataFrame:
    """Accuracy and time of three seeds of ssat at three weights, and of scratch, which has no weight."""
    rows = [
        {"method": "ssat", "seed": seed, "lambda_weight": weight, "seconds": 100 * weight + seed, "images": 1 - weight}
        for weight in WEIGHTS
        for seed in range(3)
    ]
    rows += [
        {"method": "scratch", "seed": seed, "lambda_weight": np.nan, "seconds": 3.0, "images": 0.3} for seed in range(3)
    ]
    costs = DataFrame(rows).assign(model="vit")
    costs["checkpoint"] = [f"{row.method}{row.lambda_weight}{row.seed}" for row in costs.itertuples()]
    measures = {"time": Measure("time", "cost", "seconds", unit="s"), "accuracy": Measure("accuracy", "cost", "images")}
    return comparison.compare(measures, [], {}, costs, ("lambda_weight",))[0]


def dots(ax: Axes) -> list[PathCollection]:
    """Of each method, the one with fewer points first."""
    found = [one for one in ax.collections if isinstance(one, PathCollection)]
    return sorted(found, key=lambda one: len(one.get_offsets()))


def test_means_stand_over_each_other_in_the_order_of_the_axis(compared: DataFrame) -> None:
    (ax,) = tradeoff.draw(compared, [("accuracy", "time")]).axes
    scratch, ssat = dots(ax)
    assert np.asarray(ssat.get_offsets()) == pytest.approx(np.array([[3, 0.98], [11, 0.9], [51, 0.5]]))
    assert (np.diff(ssat.get_sizes()) > 0).all()
    assert np.asarray(scratch.get_offsets()) == pytest.approx(np.array([[3.0, 0.3]]))
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("time [s]", "accuracy", "linear")
    assert "along lambda weight: 0.02, 0.1, 0.5" in ax.figure.legends[0].get_title().get_text().replace("\n", " ")


def test_bars_are_the_intervals_of_both_measures(compared: DataFrame) -> None:
    (ax,) = tradeoff.draw(compared, [("accuracy", "time")]).axes
    level, upright = max((box.lines[2] for box in ax.containers), key=lambda bars: len(bars[0].get_segments()))
    row = compared[(compared["measure"] == "time") & (compared["lambda_weight"] == 0.1)].iloc[0]
    assert level.get_segments()[1][:, 0] == pytest.approx([row["low"], row["high"]])
    assert upright.get_segments()[1][:, 1] == pytest.approx([0.9, 0.9])


def test_a_wide_range_of_cost_is_logarithmic_and_every_pair_has_a_panel(compared: DataFrame) -> None:
    wide = compared.copy()
    wide.loc[(wide["measure"] == "time") & (wide["lambda_weight"] == 0.5), ["mean", "low", "high"]] *= 10
    shown = [ax for ax in tradeoff.draw(wide, [("accuracy", "time"), ("time", "accuracy"), ("time", "time")]).axes]
    assert [ax.get_xscale() for ax in shown] == ["log", "linear", "log", "linear"]
    assert [ax.axison for ax in shown] == [True, True, True, False]


def test_a_measure_that_a_method_lacks_leaves_it_out(compared: DataFrame) -> None:
    lacking = compared.copy()
    lacking.loc[(lacking["measure"] == "time") & (lacking["method"] == "scratch"), "mean"] = np.nan
    (ax,) = tradeoff.draw(lacking, [("accuracy", "time")]).axes
    assert [one.get_label() for one in dots(ax)] == ["SSAT"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ("time", "must be two measures, the upright one first, got 'time'; write"),
        (["time"], r"must be two measures, the upright one first, got \['time'\]; write"),
        (
            ["time", "acuracy"],
            "No 'acuracy' in the measures, where a trade-off is asked for: time, accuracy.*mean 'acc",
        ),
    ],
)
def test_mistakes_in_a_file_are_named(values: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tradeoff.pair_from(values, ("time", "accuracy"))
