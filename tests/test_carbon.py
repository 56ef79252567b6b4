"""Carbon: the estimate against its closed form, codecarbon's part against a stand-in with its interface."""

import importlib.util
import json
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ssat_probe.carbon import Carbon, Supply
from ssat_probe.recipe import Recipe
from ssat_probe.training import train

THREADS = os.cpu_count() or 1


@pytest.mark.parametrize(
    ("watts", "energy_j", "reads_processors", "is_first", "expected"),
    [
        (None, float("nan"), False, True, 4 * 30.0),
        (90.0, float("nan"), False, True, 90 / THREADS * 30),
        (90.0, float("nan"), False, False, 90 / THREADS * 30),  # of its own processor seconds
        (90.0, 700.0, True, True, 700.0),  # measured
        (90.0, 700.0, True, False, 0.0),  # by another process of the node
        (90.0, 700.0, False, True, 700 + 90 / THREADS * 30),  # the card's alone
    ],
)
def test_the_estimate_is_power_times_processor_seconds_where_nothing_is_read(
    watts: float | None, energy_j: float, *, reads_processors: bool, is_first: bool, expected: float
) -> None:
    supply = Supply(intensity=56.0, watts=watts)
    carbon = Carbon(supply, is_first_on_node=is_first, reads_processors=reads_processors)
    found = carbon.lap(30.0, energy_j)
    assert found == pytest.approx({"carbon_energy_j": expected, "co2e_g": expected / 3.6e6 * 56})
    assert carbon.record["carbon_source"] == "56 g/kWh, as stated"
    assert ("RAPL" in carbon.record["carbon_mode"]) == reads_processors


def test_where_nothing_is_stated_nothing_is_said() -> None:
    carbon = Carbon(Supply())
    assert carbon.lap(30.0, 5.0) == {}
    assert carbon.record == {}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"intensity": 0.0}, "intensity must be above 0, got 0.0; leave it out if it is not known"),
        ({"intensity": 50.0, "watts": -1.0}, "watts must be above 0, got -1.0; leave it out"),
        ({"country": "FRA", "intensity": 50.0}, "intensity must be left out with country FRA, which has its own"),
        ({"watts": 65.0}, "watts must come with intensity, since codecarbon has its own, got 65 alone"),
    ],
)
def test_what_cannot_be_used_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Supply(**options)


@dataclass
class EmissionsData:
    """Those fields of codecarbon 3.3's that are read."""

    energy_consumed: float
    emissions: float
    country_name: str | None
    codecarbon_version: str = "3.3.2"


class OfflineEmissionsTracker:
    """codecarbon's interface: tasks one at a time; 2 kWh and 112 g for each but the first, of no country but France."""

    made: list["OfflineEmissionsTracker"] = []  # noqa: RUF012

    def __init__(self, *, country_iso_code: str, tracking_mode: str, output_methods: list[str],
                 allow_multiple_runs: bool, log_level: str) -> None:  # fmt: skip
        assert (tracking_mode, output_methods, allow_multiple_runs) == ("machine", [], True)
        self.country = {"FRA": "France"}.get(country_iso_code)
        self.task: str | None = None
        self.tasks: list[str] = []
        self.is_stopped = False
        self._conf = {"hardware": ["RAM()", "CPU(Cpu Load)"]}
        self.made.append(self)

    def start_task(self, task_name: str) -> None:
        assert self.task is None
        assert task_name not in self.tasks
        self.task = task_name
        self.tasks.append(task_name)

    def stop_task(self, task_name: str) -> EmissionsData:
        assert self.task == task_name
        self.task = None
        first = len(self.tasks) == 1
        return EmissionsData(0.0 if first else 2.0, 0.0 if first else 0.112, self.country)

    def stop(self) -> None:
        self.is_stopped = True


@pytest.fixture
def codecarbon(monkeypatch: pytest.MonkeyPatch) -> type[OfflineEmissionsTracker]:
    module = types.ModuleType("codecarbon")
    module.OfflineEmissionsTracker = OfflineEmissionsTracker  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    monkeypatch.setattr(OfflineEmissionsTracker, "made", [])
    return OfflineEmissionsTracker


def test_a_run_is_charged_what_codecarbon_found_in_each_epoch(
    tmp_path: Path, codecarbon: type[OfflineEmissionsTracker]
) -> None:
    recipe = Recipe(method="ssl_ft", model="vit_pico", subset=20, batch_size=10, epochs=2, pretrain_epochs=3)
    run = train(recipe, tmp_path, device="cpu", supply=Supply(country="FRA"))
    cost = json.loads((run.path.parent / "cost.json").read_text())
    assert {stage: one["carbon_energy_j"] for stage, one in cost.items()} == {"pretrain": 3 * 7.2e6, "finetune": 1.44e7}
    assert {stage: one["co2e_g"] for stage, one in cost.items()} == pytest.approx({"pretrain": 336, "finetune": 224})
    for one in cost.values():
        assert one["carbon_mode"] == "codecarbon 3.3.2, whole machine: RAM(), CPU(Cpu Load)"
        assert one["carbon_source"] == "mean of France, from codecarbon"
    (tracker,) = codecarbon.made
    assert tracker.is_stopped
    assert train(recipe, tmp_path / "plain", device="cpu").hash == run.hash


def test_one_process_of_a_node_asks_codecarbon(codecarbon: type[OfflineEmissionsTracker]) -> None:
    other = Carbon(Supply(country="FRA"), is_first_on_node=False)
    assert other.lap(3.0, 5.0) == {"carbon_energy_j": 0.0, "co2e_g": 0.0}
    assert codecarbon.made == []


def test_a_country_that_codecarbon_does_not_know_is_refused(codecarbon: type[OfflineEmissionsTracker]) -> None:
    with pytest.raises(ValueError, match=r"country must be one that codecarbon knows by three letters, .* got 'XYZ'"):
        Carbon(Supply(country="XYZ"))


@pytest.mark.parametrize(("there", "missing"), [(False, "codecarbon"), (True, "a_part_of_it")])
def test_without_codecarbon_the_sentence_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool, missing: str
) -> None:
    if there:
        (tmp_path / "codecarbon.py").write_text(f"import {missing}")
        monkeypatch.delitem(sys.modules, "codecarbon", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setitem(sys.modules, "codecarbon", None)
    sentence = rf"country needs the package codecarbon, got an environment without {missing}; .*ssat-probe\[carbon\]'"
    with pytest.raises(ValueError, match=sentence):
        Carbon(Supply(country="FRA"))


@pytest.mark.skipif(importlib.util.find_spec("codecarbon") is None, reason="codecarbon is not installed")
@pytest.mark.filterwarnings("ignore")
def test_codecarbon_itself_has_that_interface() -> None:
    carbon = Carbon(Supply(country="FRA"))
    found = carbon.lap(1.0, float("nan"))
    carbon.end()
    assert found["carbon_energy_j"] > 0
    assert found["co2e_g"] == pytest.approx(found["carbon_energy_j"] / 3.6e6 * 56.0, rel=0.2)  # France, 2023
    assert carbon.record["carbon_mode"].startswith("codecarbon ")
    with pytest.raises(ValueError, match="country must be one that codecarbon knows"):
        Carbon(Supply(country="XYZ"))
