"""Meter: what a piece of work took from the machine, as far as the machine says it."""

import contextlib
import re
import resource
import sys
import time
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
"Where Linux shows the energy counters of processors (RAPL); reading them may need rights that a container lacks."

PROCESS = Path("/proc/self")
"Where Linux shows what this process holds, and lets its peak be forgotten."


class Meter:
    """Processor seconds of this process, and energy of the machine where it can be read, since the last reading.

    The energy is that of all processor packages, by RAPL, and of the graphics card in use, by its own counter (NVML);
    memory, disks and losses of the power supply are not in it, and whatever else the machine does is.
    """

    def __init__(self, device: torch.device | str = "cpu", powercap: Path = POWERCAP) -> None:
        """Start.

        Args:
            device: Where the work is done.
            powercap: Folder of the counters.
        """
        self._packages = sorted(path for path in powercap.glob("intel-rapl:*") if path.name.count(":") == 1)
        self._card = _Card(torch.device(device))
        self._processor_s, self._counters, self._card_j = time.process_time(), self._read(), self._card.joules()

    def lap(self) -> dict[str, float]:
        """What was taken since the last call, or since the start.

        Returns:
            ``processor_s`` over all threads, and ``energy_j``; NaN where no counter can be read.
        """
        processor_s, counters, card_j = time.process_time(), self._read(), self._card.joules()
        joules = [_since(old, new, top) for (old, _), (new, top) in zip(self._counters, counters, strict=True)]
        joules += [] if card_j is None or self._card_j is None else [card_j - self._card_j]
        taken = {"processor_s": processor_s - self._processor_s, "energy_j": sum(joules) if joules else float("nan")}
        self._processor_s, self._counters, self._card_j = processor_s, counters, card_j
        return taken

    @property
    def reads_processors(self) -> bool:
        """Whether the energy is also that of the processors."""
        return bool(self._packages)

    def _read(self) -> list[tuple[int, int]]:
        """Counter of each package and where it starts again, in microjoules; none unless all can be read."""
        try:
            return [
                (int((path / "energy_uj").read_text()), int((path / "max_energy_range_uj").read_text()))
                for path in self._packages
            ]
        except (OSError, ValueError):
            self._packages = []
            self._counters = []
            return []


def forget_peak_memory(device: torch.device | str, process: Path = PROCESS) -> None:
    """Let the peak begin anew from what is held now, where the system allows it: Linux and graphics cards do.

    Args:
        device: Where the work is done.
        process: Folder of this process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # elsewhere there is no such file, and a container may forbid it
        (process / "clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device | str, process: Path = PROCESS) -> int:
    """Most memory that was held: tensors on a graphics card, else the whole process as the system counts it.

    Args:
        device: Where the work is done.
        process: Folder of this process.

    Returns:
        Bytes, since the peak was forgotten last; since this process began where it cannot be.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", (process / "status").read_text()):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Card:
    """Energy counter of a graphics card, where nvidia-ml-py is installed."""

    def __init__(self, device: torch.device) -> None:
        self._handle = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption
        except Exception:  # a card that does not say is no failure of the work
            self._handle = None

    def joules(self) -> float | None:
        """Since the driver was loaded; none where it is not known."""
        return None if self._handle is None else self._read(self._handle) / 1000


def _since(old: int, new: int, top: int) -> float:
    """Joules between two readings of a counter that starts again after ``top`` microjoules."""
    return (new - old if new >= old else new + top - old) / 1e6
