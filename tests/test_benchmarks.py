"""Benchmarks as commands, on parts that take no time: what fails takes nothing else away."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest

FOLDER = Path(__file__).parents[1] / "analyses" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("curvature")
    monkeypatch.setattr(module, "OUT", tmp_path)
    monkeypatch.setattr(module, "PARTS", ("one", "two", "three"))
    yield module
    for name in [name for name in sys.modules if name.startswith("curvature")]:
        del sys.modules[name]


def parts(monkeypatch: pytest.MonkeyPatch, benchmark: ModuleType, failing: tuple[str, ...] = ()) -> list[str]:
    """Parts that give one number each; told which were measured."""
    measured: list[str] = []

    def module_of(part: str) -> Any:
        def measure() -> Iterator[dict[str, Any]]:
            measured.append(part)
            yield {"model": "m", "value": 2.0}
            if part in failing:
                raise RuntimeError(part)

        ratios = lambda rows: [(part, "ratio", "m", rows["value"].tolist(), "≥ 1")]  # noqa: E731
        return SimpleNamespace(measure=measure, ratios=ratios, draw=lambda ax, rows: ax.plot(rows["value"]))

    monkeypatch.setattr(benchmark, "module_of", module_of)
    return measured


def test_a_part_that_fails_leaves_the_others_and_what_stood_there(benchmark, monkeypatch, tmp_path, capsys):
    parts(monkeypatch, benchmark)
    benchmark.main(["two"])
    measured = parts(monkeypatch, benchmark, failing=("two",))
    with pytest.raises(SystemExit, match="Failed, and left as they stood: two"):
        benchmark.main([])
    assert measured == ["one", "two", "three"]
    table = pd.read_csv(tmp_path / "curvature.csv")
    assert sorted(table["part"]) == ["one", "three", "two"]
    lines = (tmp_path / "curvature.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| one", "| two", "| three"]
    assert (tmp_path / "curvature.png").stat().st_size > 0


def test_what_stands_there_is_kept_if_asked(benchmark, monkeypatch):
    parts(monkeypatch, benchmark)
    benchmark.main(["one"])
    assert parts(monkeypatch, benchmark) == []
    measured = parts(monkeypatch, benchmark)
    benchmark.main(["--keep"])
    assert measured == ["two", "three"]
    with pytest.raises(SystemExit, match=r"Parts must be among one, two, three \(and --keep\), got four"):
        benchmark.main(["four"])


def test_a_peer_that_fails_is_left_out_and_named(benchmark, capsys):
    models = importlib.import_module("curvature_models")
    ways = {"ours": lambda: 1, "theirs": lambda: 1 / 0}
    found = list(models.alternating(ways, 2))
    assert [(name, repeat) for name, repeat, _ in found] == [("ours", 0), ("ours", 1)]
    assert "theirs fails and is left out: ZeroDivisionError" in capsys.readouterr().out


def test_a_peer_that_is_missing_is_named_once(benchmark, capsys):
    models = importlib.import_module("curvature_models")
    assert models.peer("no_such_peer") is None
    assert models.peer("no_such_peer") is None
    assert capsys.readouterr().out.count("no_such_peer is not installed") == 1


def test_ratios_of_a_training_step_are_written_with_their_aims_as_parts_come_in(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("training")
    monkeypatch.setattr(module, "OUT", tmp_path)
    seconds = {"plain fp32": [6.0, 9.0, 8.0], "ours bf16": [2.0, 3.0, 4.0], "scratch bf16": [2.0, 2.0, 2.0]}
    ratios = {
        f"{one} / {other}": module.ratio(seconds, one, other)
        for one, other in (("plain fp32", "ours bf16"), ("ours bf16", "scratch bf16"), ("ours bf16", "plain fp32"))
    }
    share = {"median": 0.1, "low": 0, "high": 1, "target": "at most 0", "met": False}
    parts = {"step32": {"ratios": ratios}, "data": {"share": share}}
    for name, found in parts.items():
        monkeypatch.setitem(module.PARTS, name, lambda found=found: dict(found))
    module.main(["step32"])
    module.main(["data"])
    del sys.modules["training"]
    assert (tmp_path / "training.md").read_text(encoding="utf-8").splitlines()[2:] == [
        "| step32 | plain fp32 / ours bf16 | 3 [2.5, 3] | at least 3.0: met |",
        "| step32 | ours bf16 / scratch bf16 | 1.5 [1.25, 1.75] | at most 1.4: missed |",
        "| step32 | ours bf16 / plain fp32 | 0.333 [0.333, 0.417] |  |",
        "| data | images and their changes / the whole step | 0.1 [0, 1] | at most 0: missed |",
    ]
    table = pd.read_csv(tmp_path / "training.csv")
    assert table["median"].tolist() == pytest.approx([3, 1.5, 1 / 3, 0.1])
    assert {path.suffix for path in tmp_path.glob("training.*")} == {".csv", ".md", ".png", ".pdf"}
