"""Cell of an analysis: one training and the probes of its checkpoint, or of snapshots along it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssat_probe import probe, reuse, training
from ssat_probe.carbon import Supply
from ssat_probe.probe import Probe
from ssat_probe.recipe import Recipe
from ssat_probe.run import snapshot_epochs, snapshot_path
from ssat_probe.sample import Sample
from ssat_probe.table import read_table, write_table
from ssat_probe.workers import Progress

PROBE_STEPS = 100
"A look of a probe at a checkpoint counts as this many training steps in the progress bar."


@dataclass(frozen=True)
class Measurement:
    """A probe with its options and its images."""

    name: str
    "Of its table, its figure and the measures that read it."
    probe: Probe
    sample: Sample
    models: tuple[str, ...] = ()
    "Models of the cells that it looks at; empty means all."
    snapshots: tuple[int, ...] = ()
    "Epochs of the last stage after which it looks; empty means at the end alone."

    def applies_to(self, recipe: Recipe) -> bool:
        """Whether a cell is looked at.

        Args:
            recipe: Of the cell.

        Returns:
            True if all models are, or this one is named.
        """
        return not self.models or recipe.model in self.models

    def check(self, recipe: Recipe) -> None:
        """Refuse snapshots that a training does not keep.

        Args:
            recipe: Of a cell that is looked at.

        Raises:
            ValueError: If there is one.
        """
        _, num_epochs = _last_stage(recipe)
        kept = snapshot_epochs(num_epochs)
        if self.snapshots and recipe.patience is not None:
            raise ValueError(
                f"The snapshots of {self.name} need trainings of known length, got patience {recipe.patience}; leave "
                "either out."
            )
        if others := [epoch for epoch in self.snapshots if epoch not in kept]:
            raise ValueError(
                f"The snapshots of {self.name} must be after epochs that a training of {num_epochs} keeps, got "
                f"{', '.join(map(str, others))}; choose from {', '.join(map(str, kept))}."
            )

    def looks(self, recipe: Recipe, folder: Path) -> list[tuple[Path, Path]]:
        """Where a cell is looked at.

        Args:
            recipe: Of the cell.
            folder: Of its training.

        Returns:
            Checkpoints, and of each the table, which has a folder of its own for each snapshot.
        """
        if not self.snapshots:
            return [(folder / f"{recipe.method}.pt", folder / f"{self.name}.csv")]
        paths = [snapshot_path(folder, _last_stage(recipe)[0], epoch) for epoch in self.snapshots]
        return [(path, path.with_suffix("") / f"{self.name}.csv") for path in paths]


@dataclass(frozen=True)
class Cell:
    """One training and its probes."""

    recipe: Recipe
    checkpoints: Path
    measurements: tuple[Measurement, ...]
    "Those that apply."
    data_dir: Path | None
    device: str | None
    supply: Supply = field(default_factory=Supply)
    "Of the training; what is trained already stays as it is."

    @property
    def is_done(self) -> bool:
        """Whether the training is there, and every look at it; not where this cannot be told: doing it says why."""
        folder = self.checkpoints / self.recipe.name
        looks = [(one, *where) for one in self.measurements for where in one.looks(self.recipe, folder)]
        try:
            return (folder / f"{self.recipe.method}.pt").exists() and all(
                path.exists()
                and _is_readable(table_path)
                and reuse.is_up_to_date(one.probe, [path], one.sample, table_path.parent, one.name)
                for one, path, table_path in looks
            )
        except Exception:
            return False

    def __call__(self, told: Progress) -> bool:
        """Train and probe, or find that it is done.

        Args:
            told: Steps done, steps in all, text.

        Returns:
            Whether anything was trained or measured.
        """
        folder = self.checkpoints / self.recipe.name
        looks = [(one, *where) for one in self.measurements for where in one.looks(self.recipe, folder)]
        steps, is_new = 0, not (folder / f"{self.recipe.method}.pt").exists()

        def training_told(done: int, total: int, text: str) -> None:
            nonlocal steps
            steps = total
            told(done, total + PROBE_STEPS * len(looks), f"{self.recipe.name}: {text}")

        training.train(
            self.recipe,
            self.checkpoints,
            data_dir=self.data_dir,
            device=self.device,
            snapshots=any(one.snapshots for one in self.measurements),
            supply=self.supply,
            progress=training_told,
        )
        total = steps + PROBE_STEPS * len(looks)
        for done, (one, path, table_path) in enumerate(looks):
            told(steps + PROBE_STEPS * done, total, f"{self.recipe.name}: {one.name} of {path.stem}")
            where: Any = [path], one.sample, table_path.parent, one.name
            if not _is_readable(table_path):
                table_path.unlink(missing_ok=True)  # else its record says that it is there
            if not reuse.is_up_to_date(one.probe, *where):
                is_new = True
                table, record = reuse.redrawn(one.probe, *where) or probe.measure_all(one.probe, [path], one.sample)
                write_table(table, table_path, record)
        told(total, total, f"{self.recipe.name}: done")
        return is_new


def _is_readable(path: Path) -> bool:
    """Whether a table is there and not damaged."""
    try:
        return {"checkpoint", "method"} <= set(read_table(path))
    except (OSError, ValueError):  # the latter of pandas too
        return False


def _last_stage(recipe: Recipe) -> tuple[str, int]:
    """Its name and its epochs."""
    return list(recipe.stage_epochs.items())[-1]
