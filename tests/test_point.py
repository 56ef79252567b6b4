"""Points of a sweep: names of values, rows that stand at a point, points as text."""

import numpy as np
import pytest
from pandas import DataFrame

from ssat_probe.point import at, named, points_over, shown, titled


@pytest.mark.parametrize(("value", "name"), [(None, "none"), ([4, 2], "4x2"), (0.1, 0.1), ("b", "b"), (False, False)])
def test_every_value_has_a_name_in_tables(value: object, name: object) -> None:
    assert named(value) == name


def test_rows_at_a_point_are_those_of_its_value_and_those_that_the_axis_does_not_change() -> None:
    rows = DataFrame({"subset": [20, 40, "none", np.nan], "row": range(4)})
    assert at(rows, {"subset": 20})["row"].tolist() == [0, 3]
    assert at(rows, {"subset": named(None)})["row"].tolist() == [2, 3]
    assert at(rows, {})["row"].tolist() == [0, 1, 2, 3]


def test_points_are_the_values_that_there_are_in_the_order_of_the_table() -> None:
    rows = DataFrame({"subset": [40, "none", np.nan, 40], "depth": [1.0, 2.0, 2.0, 1.0]})
    assert points_over(rows, ["subset"]) == [{"subset": 40}, {"subset": "none"}]
    assert points_over(rows, ["subset", "depth"]) == [{"subset": 40, "depth": 1.0}, {"subset": "none", "depth": 2.0}]
    assert points_over(rows, []) == [{}]


def test_points_as_text() -> None:
    assert [shown(value) for value in (40.0, 0.1, "none", 3)] == ["40", "0.1", "none", "3"]
    assert titled({"lambda_weight": 0.10, "subset": "none"}) == "lambda weight 0.1, subset none"
