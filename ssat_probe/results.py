"""Results: tables and costs of all cells of an analysis, each as one."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame

from ssat_probe import probe
from ssat_probe.cell import Measurement
from ssat_probe.sweep import Planned
from ssat_probe.table import read_table

COSTS = {
    "seconds": "train_s",
    "images": "images",
    "multiply_adds": "multiply_adds",
    "processor_s": "processor_s",
    "energy_j": "energy_j",
    "data_wait_s": "data_wait_s",
    "evaluation_s": "evaluation_s",
    "carbon_energy_j": "carbon_energy_j",
    "co2e_g": "co2e_g",
}
"Columns of cost.csv that are summed over the stages of a training, and what cost.json calls them."


def gathered(measurement: Measurement, folders: dict[Path, Planned], out: Path, axes: Sequence[str] = ()) -> DataFrame:
    """Tables of all cells as one, written with its record and its figure.

    Args:
        measurement: A probe of the analysis.
        folders: Of the cells, and what was planned there.
        out: Folder of the analysis.
        axes: Of its sweep, if it is one.

    Returns:
        The table.
    """
    paths = {
        path: cell
        for folder, cell in folders.items()
        if measurement.applies_to(cell.recipe)
        for _, path in measurement.looks(cell.recipe, folder)
    }
    records = [json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) for path in paths]
    record = records[0] | {
        "checkpoints": [entry for one in records for entry in one["checkpoints"]],
        "seconds": round(sum(one["seconds"] for one in records), 3),
    }
    table = _without_doubles([_placed(read_table(path), cell, axes) for path, cell in paths.items()])
    probe.write_results(measurement.probe, table, record, out, measurement.name)
    return table


def _placed(table: DataFrame, cell: Planned, axes: Sequence[str]) -> DataFrame:
    """A cell's table with where it stands on the axes of a sweep, which the name of the checkpoint then says too."""
    # An untrained twin stands nowhere: no axis but the architecture's changes it, and its name says that one.
    is_trained = table["method"] != probe.UNTRAINED
    if cell.folder:
        table["checkpoint"] = table["checkpoint"].where(~is_trained, cell.folder + "/" + table["checkpoint"])
    place = len(probe.IDENTITY) - 1
    for axis in reversed(axes):
        column = pd.Series([cell.point.get(axis, float("nan"))] * len(table), index=table.index)
        table.insert(place, axis, column.where(is_trained))
    return table


def _without_doubles(tables: list[DataFrame]) -> DataFrame:
    """Tables of all cells; an untrained twin, which cells of one seed share, stands in it once."""
    seen: set[tuple[Any, ...]] = set()
    parts = []
    for table in tables:
        keys = pd.Series(zip(table["checkpoint"], table["epoch"], strict=True), index=table.index)
        parts.append(table[~keys.isin(seen)])
        seen |= set(keys)
    return pd.concat(parts, ignore_index=True)


def stages_of(folder: Path) -> list[dict[str, Any]]:
    """What each stage of a training cost.

    Args:
        folder: Of the training.

    Returns:
        A record per stage, in order; none, with a warning, where the training's ``cost.json`` is gone.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / "cost.json"
    if not path.exists():
        warnings.warn(
            f"{path} is not there, so that the cost of this training is not known and left blank.", stacklevel=2
        )
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    stages: list[Any] = list(content.values()) if isinstance(content, dict) else [None]
    if not all(isinstance(stage, dict) and _are_numbers([stage.get(of) for of in COSTS.values()]) for stage in stages):
        raise ValueError(
            f"{path} must say in numbers what each stage of a training cost, got a damaged file; delete it, and this "
            "cost is left blank."
        )
    return stages


def _are_numbers(values: list[Any]) -> bool:
    """Or none, where a training did not say."""
    return all(value is None or type(value) in (int, float) for value in values)


def costs(folders: dict[Path, Planned], axes: Sequence[str] = ()) -> DataFrame:
    """What each cell cost, over its stages; empty where a training did not say, or no longer does.

    Args:
        folders: Of the cells, and what was planned there.
        axes: Of the sweep, if it is one.

    Returns:
        One row per cell.
    """
    rows = []
    for folder, cell in folders.items():
        recipe = cell.recipe
        stages = DataFrame(stages_of(folder))
        summed = {name: stages.get(of, pd.Series([float("nan")])).sum(skipna=False) for name, of in COSTS.items()}
        rows.append(
            {
                "checkpoint": cell.name,
                "model": recipe.model,
                "method": recipe.method,
                "data": recipe.data,
                "seed": recipe.seed,
                **{axis: cell.point.get(axis, float("nan")) for axis in axes},
                **summed,
                "peak_memory_bytes": stages.get("peak_memory_bytes", pd.Series([float("nan")])).max(),
            }
        )
    return DataFrame(rows)
