"""What an analysis file says in one place against what it says in others."""

import re
from typing import Any

import pytest

from ssat_probe import consistency, probe, sweep
from ssat_probe.cell import Measurement
from ssat_probe.comparison import Claim, Measure
from ssat_probe.sample import Sample

LISTS = {"method": "methods", "seed": "seeds"}


def check_recipe(
    shared: dict[str, Any], vary: dict[str, Any], methods: tuple[str, ...], typed: tuple[str, ...] = ()
) -> None:
    cells = sweep.planned(shared, ["vit_nano"], [0], methods, vary, "f.yaml")
    axes = {axis: sweep.alternatives(axis, values, "f.yaml") for axis, values in vary.items()}
    consistency.check_recipe(shared, typed, LISTS, axes, cells, "f.yaml")


LENGTHS = {"images": {100: {"subset": 100, "epochs": 3}, "all": {"epochs": 9}}}


@pytest.mark.parametrize(
    ("shared", "vary", "methods", "typed", "why"),
    [
        ({"seed": 9}, {}, ("ssat",), (), "The field seed .* it is what seeds lists; leave it out"),
        ({"method": "ssat"}, {}, ("ssat",), (), "The field method .* it is what methods lists; leave it out"),
        ({"epochs": 5}, LENGTHS, ("ssat",), (), "The field epochs .* every alternative of the axis 'images' sets it"),
        ({"mask_ratio": 0.5}, {"mask_ratio": [0.1, 0.6]}, ("ssat",), (), "alternative of the axis 'mask_ratio' sets"),
        ({"mask_ratio": 0.5}, {}, ("scratch",), (), "The field mask_ratio .* method scratch masks nothing; leave"),
        ({"lambda_weight": 0.1}, {}, ("scratch", "ssl_ft"), ("lambda_weight",), "method scratch has one loss at a"),
    ],
)
def test_a_field_that_changes_no_training_is_refused(
    shared: dict[str, Any], vary: dict[str, Any], methods: tuple[str, ...], typed: tuple[str, ...], why: str
) -> None:
    with pytest.raises(ValueError, match=re.compile(why, re.DOTALL)):
        check_recipe(shared, vary, methods, typed)


def test_two_axes_that_set_one_field_are_refused() -> None:
    axes = {"epochs": {3: {"epochs": 3}, 9: {"epochs": 9}}, "length": {"long": {"epochs": 99, "subset": 50}}}
    with pytest.raises(
        ValueError, match=r"must set different fields, got 'epochs' and 'length' which both set epochs;"
    ):
        consistency.check_names(axes, {}, [], "f.yaml")


def test_a_field_that_changes_some_training_is_kept() -> None:
    check_recipe({"subset": 50, "mask_ratio": 0.5}, LENGTHS, ("scratch", "ssat"), ("subset", "mask_ratio"))
    check_recipe({"lambda_weight": 0.1}, {}, ("scratch",))  # a whole recipe may stand in a file


def test_untrained_twins_may_be_claimed_something_about_where_they_are_looked_at() -> None:
    cells = sweep.planned({}, ["vit_nano"], [0, 1], ["ssat"], {}, "f.yaml")
    looks = [
        Measurement("with_twin", probe.make("variance", untrained_twin=True), Sample()),
        Measurement("without", probe.make("variance", untrained_twin=False), Sample()),
    ]
    measures = {one.name: Measure(one.name, one.name, "variance") for one in looks}
    for name in measures:
        consistency.check_measure(measures[name], looks)
    consistency.check_claim(Claim("c", "with_twin", 1, ("ssat", "untrained")), measures, looks, cells, ())
    with pytest.raises(
        ValueError, match="No 'untrained' in the methods of this analysis, about which claim 'c' is made"
    ):
        consistency.check_claim(Claim("c", "without", 1, ("ssat", "untrained")), measures, looks, cells, ())


def test_what_a_training_costs_may_be_measured() -> None:
    consistency.check_measure(Measure("m", "cost", "peak_memory_bytes"), [])
    with pytest.raises(
        ValueError, match=r"No 'second' in the columns of cost that measure 'm' may be of: .*'seconds'\?"
    ):
        consistency.check_measure(Measure("m", "cost", "second"), [])


def check_names(axis: str = "my axis", probe_name: str = "accuracy", measure: str = "m", sets: str = "epochs") -> None:
    looks = [Measurement(probe_name, probe.make("accuracy"), Sample())]
    consistency.check_names({axis: {"a": {sets: 2}}}, [measure], looks, "f.yaml")


@pytest.mark.parametrize(
    "name", ["cost", "Log", "recipe", "init", "analysis", "comparison", "a/b", "../x", "", "x_rows"]
)
def test_a_probe_is_not_named_as_another_file(name: str) -> None:
    check_names(probe_name="accuracy_of-2")
    with pytest.raises(ValueError, match=f"not as a file of its own .*, got '{re.escape(name)}'; rename it"):
        check_names(probe_name=name)


@pytest.mark.parametrize(
    ("axis", "table"),
    [
        ("mean", "the comparison"), ("measure", "the comparison"), ("method", "accuracy"), ("value", "the comparison"),
        ("seconds", "cost"), ("images", "cost"), ("peak_memory_bytes", "cost"), ("auc", "accuracy"),
    ],
)  # fmt: skip
def test_an_axis_is_not_named_as_another_column(axis: str, table: str) -> None:
    check_names(axis=f"my {axis}")
    with pytest.raises(
        ValueError, match=f"must not be named as a column of a table, got '{axis}', which {table} has; "
    ):
        check_names(axis=axis)


def test_measures_stand_beside_what_they_are_compared_by_and_methods_and_seeds_have_lists() -> None:
    for name in ("method", "seed", "my axis"):
        with pytest.raises(
            ValueError, match=f"must not be named as what they are compared by, got '{name}'; rename it"
        ):
            check_names(measure=name)
    with pytest.raises(
        ValueError, match=r"The axis 'my axis' of f\.yaml must not set seed, got an alternative that does"
    ):
        check_names(sets="seed")
