"""Carbon: electricity and CO2 equivalents of a training, by codecarbon, or by a stated power and a stated mix."""

import math
import os
from dataclasses import dataclass
from typing import Any

WATTS_PER_THREAD = 4.0
"Of a processor whose power is not stated, per hardware thread: codecarbon's own default for one it does not know."

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Supply:
    """Where the electricity comes from; nothing is said of CO2 where nothing is stated."""

    country: str = ""
    "Country by its three letters (FRA), whose mean emissions codecarbon knows; energy is then codecarbon's too."

    intensity: float | None = None
    "Grams of CO2 equivalents per kWh in place of a country's, so that codecarbon is not needed."

    watts: float | None = None
    "Power of all processors under full load, for the estimate without codecarbon; none means 4 W per hardware thread."

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If one cannot be used, or has no effect.
        """
        for name in ("intensity", "watts"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be above 0, got {value!r}; leave it out if it is not known.")
        if self.country and self.intensity is not None:
            raise ValueError(f"intensity must be left out with country {self.country}, which has its own, got both.")
        if self.watts is not None and self.intensity is None:
            raise ValueError(f"watts must come with intensity, since codecarbon has its own, got {self.watts:g} alone.")

    @property
    def is_stated(self) -> bool:
        """Whether anything is known of the electricity."""
        return bool(self.country) or self.intensity is not None


class Carbon:
    """Energy and emissions of a process's work, lap by lap."""

    def __init__(self, supply: Supply, *, is_first_on_node: bool = True, reads_processors: bool = False) -> None:
        """Start, where anything is stated.

        Args:
            supply: What is stated.
            is_first_on_node: Whether this process answers for what can be read of the whole node.
            reads_processors: Whether the energy that is measured, if any, is also that of the processors.
        """
        self._supply, self._is_first, self._reads_processors = supply, is_first_on_node, reads_processors
        self._tracker: Any = _tracker(supply.country) if supply.country and is_first_on_node else None
        self._number = 0
        self.record: dict[str, str] = {}
        "How the numbers were found."
        if self._tracker is not None:
            self._check()
        elif supply.intensity is not None:
            power = f"{self._watts_per_thread:g} W per busy hardware thread"
            counters = "counters of the processors (RAPL)" if reads_processors else f"estimate: {power}"
            self.record = {"carbon_mode": counters, "carbon_source": f"{supply.intensity:g} g/kWh, as stated"}

    def lap(self, processor_s: float, energy_j: float) -> dict[str, float]:
        """What was taken since the last call, or since the start.

        Without codecarbon: measured energy, and where that leaves out the processors, their power per hardware thread
        times the processor seconds of this process.

        Args:
            processor_s: Processor seconds of this process.
            energy_j: Energy that was measured on this node; NaN for none.

        Returns:
            ``carbon_energy_j`` and ``co2e_g``, to be summed over the processes; nothing where nothing is stated.
        """
        if not self._supply.is_stated:
            return {}
        if self._supply.country:
            if self._tracker is None:
                return {"carbon_energy_j": 0.0, "co2e_g": 0.0}
            found = self._tracker.stop_task(f"lap {self._number}")
            self._begin()
            return {
                "carbon_energy_j": found.energy_consumed * JOULES_PER_KWH,
                "co2e_g": found.emissions * 1000,
            }
        joules = energy_j if self._is_first and not math.isnan(energy_j) else 0.0
        joules += 0.0 if self._reads_processors else self._watts_per_thread * processor_s
        return {"carbon_energy_j": joules, "co2e_g": joules / JOULES_PER_KWH * (self._supply.intensity or 0.0)}

    def end(self) -> None:
        """Let codecarbon's threads end."""
        if self._tracker is not None:
            self._tracker.stop()

    @property
    def _watts_per_thread(self) -> float:
        return WATTS_PER_THREAD if self._supply.watts is None else self._supply.watts / (os.cpu_count() or 1)

    def _begin(self) -> None:
        self._number += 1
        self._tracker.start_task(f"lap {self._number}")

    def _check(self) -> None:
        """Make a first lap, which says what codecarbon knows.

        Raises:
            ValueError: If it does not know the country, of which it says nothing but takes the mean of the world.
        """
        self._begin()
        found = self._tracker.stop_task(f"lap {self._number}")
        if not getattr(found, "country_name", None):
            raise ValueError(
                f"country must be one that codecarbon knows by three letters, such as FRA, got "
                f"{self._supply.country!r}; or state --intensity in g/kWh."
            )
        hardware = ", ".join(map(str, getattr(self._tracker, "_conf", {}).get("hardware", ["unknown"])))
        self.record = {
            "carbon_mode": f"codecarbon {found.codecarbon_version}, whole machine: {hardware}",
            "carbon_source": f"mean of {found.country_name}, from codecarbon",
        }
        self._begin()


def _tracker(country: str) -> Any:
    """Tracker of codecarbon's that asks nobody and writes nothing; without codecarbon it is a ValueError."""
    try:
        from codecarbon import OfflineEmissionsTracker
    except ImportError as error:
        raise ValueError(
            f"country needs the package codecarbon, got an environment without {error.name or 'it'}; pip install "
            "'ssat-probe[carbon]', or state --intensity in g/kWh."
        ) from error
    return OfflineEmissionsTracker(
        country_iso_code=country, tracking_mode="machine", output_methods=[], allow_multiple_runs=True,
        log_level="critical",
    )  # fmt: skip
