"""Point: where a training stands on the axes of a sweep, in tables and as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from pandas import DataFrame


def named(value: Any) -> Any:
    """A value of an axis as tables have it.

    Args:
        value: As a file has it.

    Returns:
        ``none`` for None, since what is missing in a table says that the axis does not act there; ``4x4`` for a pair.
    """
    if value is None:
        return "none"
    return "x".join(map(str, value)) if isinstance(value, list) else value


def points_over(compared: DataFrame, axes: Sequence[str]) -> list[dict[str, Any]]:
    """Points of a sweep.

    Args:
        compared: From ``compare``.
        axes: Some of its axes.

    Returns:
        Value on each of these axes, in the order of the table; one empty point where there is none.
    """
    if not axes:
        return [{}]
    whole = compared[list(axes)].dropna().drop_duplicates()
    return [dict(zip(axes, row, strict=True)) for row in whole.itertuples(index=False)] or [{}]


def at(rows: DataFrame, point: Mapping[str, Any]) -> DataFrame:
    """Rows of a point of a sweep, with those that do not depend on it.

    Args:
        rows: With a column per axis.
        point: Value on each axis that is asked for.

    Returns:
        Those whose values are the same or missing.
    """
    for axis, value in point.items():
        rows = rows[rows[axis].isna() | (rows[axis] == value)]
    return rows


def shown(value: Any) -> str:
    """A value of an axis as text.

    Args:
        value: A number, perhaps one that a table made a float, or a name.

    Returns:
        Without needless digits.
    """
    return f"{value:g}" if isinstance(value, float) else str(value)


def titled(point: Mapping[str, Any]) -> str:
    """A point of a sweep as the title of a panel.

    Args:
        point: Value on each axis.

    Returns:
        Names and values; empty without any.
    """
    return ", ".join(f"{axis.replace('_', ' ')} {shown(value)}" for axis, value in point.items())
