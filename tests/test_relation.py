"""The runner of relations: files, records, drawing again, and what the command says."""

import json
import re
from pathlib import Path

import pytest

from ssat_probe import cli, registry, relation, report
from ssat_probe.sample import Sample
from ssat_probe.table import read_table
from ssat_probe.terms import Terms

Paths = dict[str, Path]
SAMPLE = Sample(num_images=7, batch_size=7, device="cpu")


@pytest.mark.parametrize("name", registry.names("relations"))
def test_a_relation_writes_declared_columns_and_draws_again_from_csv(
    name: str, checkpoints: Paths, tmp_path: Path
) -> None:
    one = relation.make(name, points=3)
    table = relation.run(one, list(checkpoints.values()), SAMPLE, tmp_path)
    assert list(table) == [column.name for column in one.columns]
    assert all(column.meaning for column in one.columns)
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".json", ".png", ".pdf"}
    figure = relation.draw(name, read_table(tmp_path / f"{name}.csv"))
    figure.canvas.draw()
    assert all(ax.get_xlabel() and ax.get_ylabel() and ax.has_data() for ax in figure.axes)
    record = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert [entry["checkpoint"] for entry in record["checkpoints"]] == [
        f"vit_nano-digits-{method}-seed0" for method in checkpoints
    ]
    assert name.capitalize() in report.write_report(tmp_path).read_text(encoding="utf-8")
    assert len(one.summary(table)) == 3
    with pytest.raises(ValueError, match=f"A table of {name} must have a column 'quantity', got none"):
        relation.draw(name, table.drop(columns="quantity"))


def test_an_unknown_relation_or_option_is_named() -> None:
    with pytest.raises(ValueError, match=r"No 'pth' in relations: .* Did you mean 'path'"):
        relation.make("pth")
    with pytest.raises(ValueError, match=r"No 'point' in the options of path: .* Did you mean 'points'"):
        relation.make("path", point=3)


@pytest.mark.parametrize(
    ("name", "options", "num"),
    [
        ("plane", {"points": 5}, 5 * 5 + 2 * 3),
        ("path", {"points": 5}, 3 * 5),
        ("path", {"points": 5, "bend_steps": 2}, 3 * (2 * 5 + 3 * 2)),
    ],
)
def test_cost_is_known_and_what_is_over_the_budget_refused_before_any_work(
    checkpoints: Paths, name: str, options: dict[str, int], num: int
) -> None:
    paths = list(checkpoints.values())
    said: list[str] = []
    relation.measure_all(relation.make(name, **options), paths, SAMPLE, said.append)
    assert [bool(re.fullmatch(rf"{name}: {num} points of \S+ s: about \d+ s", line)) for line in said] == [True]
    tight = relation.make(name, budget_s=1e-9, **options)
    with pytest.raises(ValueError, match=rf"fit into budget_s, 1e-09 s, got {num} points that would take \d+ s; take"):
        relation.measure_all(tight, paths, SAMPLE, said.append)
    assert len(said) == 1


def test_a_missing_checkpoint_is_found_before_anything_is_said(checkpoints: Paths, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(FileNotFoundError, match="nothere"):
        relation.measure_all(
            relation.make("path"), [*checkpoints.values(), tmp_path / "nothere.pt"], SAMPLE, said.append
        )
    assert said == []


@pytest.mark.parametrize("name", registry.names("relations"))
def test_the_number_of_points_is_that_of_the_looks_at_the_images(
    checkpoints: Paths, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    found = Terms.__call__
    monkeypatch.setattr(Terms, "__call__", lambda self: (counted.append(1), found(self))[1])
    monkeypatch.setattr(relation, "_seconds_per_point", lambda relation, subject: 0.0)
    one = relation.make(name, points=3)
    relation.measure_all(one, list(checkpoints.values()), SAMPLE)
    assert len(counted) == one.num_points(3)


def test_the_same_run_twice_has_two_labels(checkpoints: Paths, tmp_path: Path) -> None:
    copies = [tmp_path / name for name in ("one.pt", "two.pt")]
    for copy in copies:
        copy.write_bytes(checkpoints["ssat"].read_bytes())
    table, _ = relation.measure_all(relation.make("path", points=3), [checkpoints["ssat"], *copies], SAMPLE)
    label = "vit_nano-digits-ssat-seed0"
    assert set(table["start"]) | set(table["end"]) == {label, f"{label} (one)", f"{label} (two)"}


def test_the_command_writes_and_draw_draws_again(
    checkpoints: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(path) for path in checkpoints.values()]
    words = ["path", "--ckpt", *paths, "--points", "3", "--num-images", "7", "--device", "cpu", "--out", str(tmp_path)]
    for line in (words, ["draw", str(tmp_path / "path.csv")]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(line)
        assert stopped.value.code in (0, None)
    assert "barrier cross entropy" in capsys.readouterr().out
