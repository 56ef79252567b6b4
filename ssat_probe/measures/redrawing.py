"""The table of a spectrum for other thresholds and another smoothing, from the coefficients that it holds."""

from collections.abc import Sequence
from typing import Any

from pandas import DataFrame, concat

from ssat_probe.measures.spectrum import (
    BANDWIDTH,
    distance_kept,
    entry_of,
    exact_rows,
    measure_of,
    methods_in,
    negative_part,
    node_shares,
    rows_by,
    runs_of,
    share_errors,
)

THRESHOLDED = ("mass_below", "near_zero_mass")


def redrawn(table: DataFrame, taus: Sequence[float], bandwidth: float) -> DataFrame:
    """The table for other thresholds and another smoothing, from the coefficients that it holds.

    Args:
        table: Rows of one checkpoint, by one method or several.
        taus: Thresholds as shares of the largest eigenvalue.
        bandwidth: Of the figure's densities.

    Returns:
        The same rows but those of ``THRESHOLDED``, and of their errors, and ``bandwidth``.
    """
    parts = {method: _with_shares(rows_by(table, method), taus) for method in methods_in(table)}
    for method, rows in parts.items():
        if "exact" in parts and method != "exact":
            parts[method] = _joined(rows, share_errors(rows, parts["exact"], taus))
    for method, rows in parts.items():
        parts[method] = rows.assign(quantity=f"{method}:" + rows["quantity"])
    others = table[~table["quantity"].str.contains(":") & (table["quantity"] != "bandwidth")]
    whole = concat([*parts.values(), others], ignore_index=True) if parts else _with_shares(others, taus)
    return _joined(whole, [{"quantity": "bandwidth", "value": bandwidth}])


def bandwidth_of(table: DataFrame) -> float:
    """Smoothing that a table asks for.

    Args:
        table: Of the Hessian probe.

    Returns:
        For `smoothed`; the default where the table is older.
    """
    asked = table.loc[table["quantity"] == "bandwidth", "value"]
    return float(asked.iloc[0]) if len(asked) else BANDWIDTH


def _with_shares(table: DataFrame, taus: Sequence[float]) -> DataFrame:
    """Rows of one method with the shares beyond these thresholds, at the place where shares stood."""
    table = table[~table["quantity"].isin([f"{name}_error" for name in THRESHOLDED])]
    stood = table["quantity"].isin(THRESHOLDED)
    if not stood.any():  # a method that gives none
        return table
    runs, (values, weights) = runs_of(table), measure_of(table)
    if runs:
        kept = distance_kept(runs, float(entry_of(table, "noise_floor")["value"]))
        found = negative_part(runs, kept, taus)
    elif (table["quantity"] == "eigenvalue").any():
        found = exact_rows(values, taus)
    else:
        found = node_shares(values, weights, taus)
    place, left = int(stood.to_numpy().argmax()), table[~stood]
    fresh = [row for row in found if row["quantity"] in THRESHOLDED]
    return concat([_joined(left[:place], fresh), left[place:]], ignore_index=True)


def _joined(table: DataFrame, rows: list[dict[str, Any]]) -> DataFrame:
    """The table with some rows more, whose empty columns are filled as in it."""
    blank = {"probe": -1, "index": 0, "unit": ""}
    added = DataFrame([blank | row for row in rows], columns=table.columns)
    return concat([table, added.astype(table.dtypes)], ignore_index=True) if rows else table
