"""Cells of an analysis: a training, and the probes of its end and of snapshots along it."""

import json
from pathlib import Path

import pandas as pd
import pytest

from ssat_probe import probe
from ssat_probe.carbon import Supply
from ssat_probe.cell import PROBE_STEPS, Cell, Measurement
from ssat_probe.recipe import Recipe
from ssat_probe.sample import Sample

RECIPE = Recipe(method="ssl_ft", subset=20, batch_size=10, epochs=2, augmentation="none", base_lr=1e-2)
LOOK = Sample(num_images=30, device="cpu")
END = Measurement("end", probe.make("accuracy"), LOOK)
ALONG = Measurement("along", probe.make("accuracy"), LOOK, snapshots=(0, 2))


def test_snapshots_are_looked_at_each_with_a_table_of_its_own_and_what_is_there_is_reused(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    cell = Cell(RECIPE, tmp_path, (END, ALONG), None, "cpu")
    assert cell(lambda *news: told.append(news))
    training_steps = 2 * 2 * 2
    assert told[-1][:2] == (training_steps + 3 * PROBE_STEPS,) * 2
    folder = tmp_path / RECIPE.name
    paths = [folder / "end.csv", *(folder / f"snapshots/finetune-0000{epoch}/along.csv" for epoch in (0, 2))]
    end, first, last = (pd.read_csv(path) for path in paths)
    assert [table["epoch"].tolist() for table in (end, first, last)] == [[2], [0], [2]]
    assert {table["checkpoint"].iloc[0] for table in (end, first, last)} == {RECIPE.name}
    pd.testing.assert_frame_equal(end, last)
    assert first["cross_entropy"].iloc[0] != last["cross_entropy"].iloc[0]
    written = [path.stat().st_mtime_ns for path in paths]
    assert not cell(lambda *news: None)
    assert [path.stat().st_mtime_ns for path in paths] == written
    paths[1].with_suffix(".json").unlink()  # as an interruption leaves it
    assert cell(lambda *news: None)
    now = [path.stat().st_mtime_ns for path in paths]
    assert [before == after for before, after in zip(written, now, strict=True)] == [True, False, True]


def test_a_damaged_cell_is_not_done_and_says_itself_what_is_wrong(tmp_path: Path) -> None:
    cell = Cell(RECIPE, tmp_path, (END,), None, "cpu")
    cell(lambda *news: None)
    assert cell.is_done
    checkpoint = tmp_path / RECIPE.name / "ssl_ft.pt"
    checkpoint.write_bytes(b"PK\x03\x04 and no more")
    assert not cell.is_done
    with pytest.raises(ValueError, match=r"ssl_ft\.pt must be "):
        cell(lambda *news: None)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"check"])
def test_a_damaged_table_is_measured_again(tmp_path: Path, content: bytes) -> None:
    cell = Cell(RECIPE, tmp_path, (END,), None, "cpu")
    cell(lambda *news: None)
    table = tmp_path / RECIPE.name / "end.csv"
    whole = table.read_bytes()
    table.write_bytes(content)
    assert not cell.is_done
    assert cell(lambda *news: None)
    assert table.read_bytes() == whole
    assert cell.is_done


def test_the_supply_reaches_the_training(tmp_path: Path) -> None:
    Cell(RECIPE, tmp_path, (), None, "cpu", Supply(intensity=56.0))(lambda *news: None)
    cost = json.loads((tmp_path / RECIPE.name / "cost.json").read_text())
    assert [one["carbon_source"] for one in cost.values()] == ["56 g/kWh, as stated"] * 2


def test_a_training_that_kept_no_snapshots_is_not_looked_at_along_the_way(tmp_path: Path) -> None:
    Cell(RECIPE, tmp_path, (END,), None, "cpu")(lambda *news: None)
    with pytest.raises(ValueError, match=r"snapshots/pretrain-00000\.pt must be there for --snapshots, got a finished"):
        Cell(RECIPE, tmp_path, (ALONG,), None, "cpu")(lambda *news: None)


def test_epochs_that_no_training_keeps_are_refused_with_those_it_does() -> None:
    ALONG.check(RECIPE)
    sentence = "The snapshots of x must be after epochs that a training of 9 keeps, got 5, 10; choose from 0, 1, 2, 3, "
    with pytest.raises(ValueError, match=sentence + r"4, 6, 8, 9\."):
        Measurement("x", END.probe, LOOK, snapshots=(0, 5, 9, 10)).check(Recipe(method="ssl_ft", epochs=9))


def test_a_measurement_may_be_of_some_models() -> None:
    assert END.applies_to(RECIPE)
    assert Measurement("x", END.probe, LOOK, models=("vit_nano",)).applies_to(RECIPE)
    assert not Measurement("x", END.probe, LOOK, models=("vit_pico",)).applies_to(RECIPE)
