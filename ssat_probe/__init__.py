"""Train Vision Transformers on limited data, probe them, compare them.

Public names are imported on first use, so that ``import ssat_probe`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssat_probe.checkpoint import load_checkpoint as load_checkpoint
    from ssat_probe.probe import draw as draw
    from ssat_probe.probe import measure as measure
    from ssat_probe.recipe import Recipe as Recipe
    from ssat_probe.report import write_report as write_report
    from ssat_probe.sample import Sample as Sample
    from ssat_probe.training import train as train

_HOMES = {
    "Recipe": "recipe",
    "Sample": "sample",
    "draw": "probe",
    "load_checkpoint": "checkpoint",
    "measure": "probe",
    "train": "training",
    "write_report": "report",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Public name, from the module that holds it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ssat_probe' has no attribute {name!r}")
    return getattr(import_module(f"ssat_probe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
