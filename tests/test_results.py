"""Results of an analysis: costs and tables of its cells."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ssat_probe.recipe import Recipe
from ssat_probe.results import COSTS, costs
from ssat_probe.sweep import Planned


def test_costs_are_summed_over_the_stages_and_memory_is_the_largest(tmp_path: Path) -> None:
    stage = {of: 2.0 for of in COSTS.values()} | {"peak_memory_bytes": 5}
    cells = {}
    for seed in (0, 1):
        cell = Planned(Recipe(method="ssl_ft", seed=seed), {"depth": 3.0} if seed else {})
        cells[tmp_path / cell.name] = cell
        (tmp_path / cell.name).mkdir(parents=True)
        (tmp_path / cell.name / "cost.json").write_text(
            json.dumps({"pretrain": stage, "finetune": stage | {"peak_memory_bytes": 9}})
        )
    table = costs(cells, ("depth",))
    assert [table[name].tolist() for name in COSTS] == [[4.0, 4.0]] * len(COSTS)
    assert table["peak_memory_bytes"].tolist() == [9, 9]
    assert np.array_equal(table["depth"], [np.nan, 3.0], equal_nan=True)


def test_what_a_training_did_not_say_is_missing_and_not_nothing(tmp_path: Path) -> None:
    cell = Planned(Recipe(), {})
    (tmp_path / "cost.json").write_text(json.dumps({"train": {"train_s": 1.0, "energy_j": None}}))
    table = costs({tmp_path: cell})
    assert table["seconds"].item() == 1
    assert pd.isna(table["energy_j"].item())
    assert pd.isna(table["images"].item())
    assert pd.isna(table["co2e_g"].item())


def test_a_training_whose_cost_is_gone_leaves_a_blank_row_and_a_note(tmp_path: Path) -> None:
    stage = dict.fromkeys(COSTS.values(), 2.0) | {"peak_memory_bytes": 5}
    cells = {tmp_path / str(seed): Planned(Recipe(seed=seed), {}) for seed in (0, 1)}
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "cost.json").write_text(json.dumps({"train": stage}))
    with pytest.warns(UserWarning, match=r"0.cost\.json is not there, so that the cost of this training is not known"):
        table = costs(cells)
    assert table["seed"].tolist() == [0, 1]
    numbers = table[[*COSTS, "peak_memory_bytes"]]
    assert numbers.loc[0].isna().all()
    assert numbers.loc[1].tolist() == [*stage.values()]


@pytest.mark.parametrize("text", ['{"train":', "[1]", '{"train": 3}', '{"train": {"train_s": "long"}}', "\xff"])
def test_a_damaged_cost_is_named_with_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "cost.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"cost\.json must say in numbers what each stage .*; delete it, and this cost is"
    ):
        costs({tmp_path: Planned(Recipe(), {})})
