"""The meter against counters that a test turns, and memory that a test takes."""

import math
import os
import time
from pathlib import Path

import pytest
import torch

from ssat_probe.meter import PROCESS, Meter, forget_peak_memory, peak_memory_bytes


def counter(folder: Path, name: str, microjoules: int, top: int = 1_000_000) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{top}\n")


def test_energy_is_that_of_all_packages_since_the_last_lap(tmp_path: Path) -> None:
    counter(tmp_path, "intel-rapl:0", 100_000)
    counter(tmp_path, "intel-rapl:1", 900_000)
    counter(tmp_path, "intel-rapl:0:0", 5)  # the cores, a part of package 0
    meter = Meter("cpu", tmp_path)
    counter(tmp_path, "intel-rapl:0", 350_000)
    counter(tmp_path, "intel-rapl:1", 100_000)  # it began again at 1,000,000
    counter(tmp_path, "intel-rapl:0:0", 70_000)
    assert meter.lap()["energy_j"] == pytest.approx(0.25 + 0.2)
    assert meter.lap()["energy_j"] == 0
    counter(tmp_path, "intel-rapl:1", 130_000)
    assert meter.lap()["energy_j"] == pytest.approx(0.03)


def test_where_no_counter_can_be_read_there_is_no_energy(tmp_path: Path) -> None:
    assert math.isnan(Meter("cpu", tmp_path).lap()["energy_j"])
    counter(tmp_path, "intel-rapl:0", 3)
    meter = Meter("cpu", tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()  # as for a user without the right to read it
    assert math.isnan(meter.lap()["energy_j"])
    assert math.isnan(meter.lap()["energy_j"])


def test_processor_seconds_are_those_of_work_not_of_waiting(tmp_path: Path) -> None:
    meter = Meter("cpu", tmp_path)
    time.sleep(0.2)
    assert meter.lap()["processor_s"] < 0.1
    began = time.process_time()
    while time.process_time() - began < 0.2:
        pass
    assert 0.2 <= meter.lap()["processor_s"] < 0.4


def test_peak_memory_counts_what_was_held_and_let_go() -> None:
    before = peak_memory_bytes("cpu")
    held = torch.ones(before // 4 + 50_000_000)  # floats: as much again as the process ever had
    assert peak_memory_bytes("cpu") >= before + 100_000_000
    del held
    assert peak_memory_bytes("cpu") >= before + 100_000_000


@pytest.mark.skipif(not os.access(PROCESS / "clear_refs", os.W_OK), reason="the peak cannot be forgotten here")
def test_a_peak_that_is_forgotten_leaves_what_is_held() -> None:
    kept = torch.ones(25_000_000)
    freed = torch.ones(50_000_000)
    before = peak_memory_bytes("cpu")
    del freed
    forget_peak_memory("cpu")
    after = peak_memory_bytes("cpu")
    assert 4 * len(kept) < after <= before - 190_000_000
    held = torch.ones(25_000_000)
    del held
    assert peak_memory_bytes("cpu") >= after + 90_000_000


def test_where_the_system_says_nothing_the_peak_is_that_of_the_whole_process(tmp_path: Path) -> None:
    forget_peak_memory("cpu", tmp_path / "none")
    forget_peak_memory("cpu", tmp_path)
    assert peak_memory_bytes("cpu", tmp_path) >= 0.95 * peak_memory_bytes("cpu")
    (tmp_path / "status").write_text("VmPeak:\t    9 kB\nVmHWM:\t    3 kB\n")
    assert peak_memory_bytes("cpu", tmp_path) == 3 * 1024
