"""Analysis: train some cells, probe them, compare them, from one declarative file."""

import dataclasses
import datetime
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pandas import DataFrame

from ssat_probe import comparison, consistency, document, drawing, probe, sweep, tradeoff, training
from ssat_probe.budget import Budget
from ssat_probe.carbon import Supply
from ssat_probe.cell import Cell, Measurement
from ssat_probe.cluster import as_jobs
from ssat_probe.data import refuse_idle_options
from ssat_probe.recipe import Recipe
from ssat_probe.registry import PACKAGE, known
from ssat_probe.results import costs, gathered, stages_of
from ssat_probe.run import snapshot_epochs
from ssat_probe.sample import Sample
from ssat_probe.sweep import Planned, planned
from ssat_probe.table import check_writable, write_atomically
from ssat_probe.workers import Progress, shares, side_by_side

OF_MEASUREMENT = ("probe", "models", "snapshots")
"What a probe's entry may say beside the options of probe and sample."


SMOKE = {"epochs": 1, "subset": 20, "batch_size": 10, "pretrain_epochs": 1, "budget": "matched"}
"What a recipe is shrunk to, to see that everything runs; the last two only where the file sets them."


@dataclass(frozen=True)
class Analysis:
    """What an analysis file says."""

    name: str
    title: str
    source: str
    "The file's text."
    cells: tuple[Planned, ...]
    measurements: tuple[Measurement, ...]
    measures: dict[str, comparison.Measure]
    claims: tuple[comparison.Claim, ...]
    jobs: int
    "Cells trained side by side, each in a process of its own; 0 means as many as the cores allow."
    threads: int
    "Threads of each cell; 0 means that the jobs share the cores."
    axes: tuple[str, ...] = ()
    "Of its sweep, if it is one."
    tradeoffs: tuple[tuple[str, str], ...] = ()
    "Pairs of measures to be drawn over each other, the upright one first."
    command: str = ""
    "That makes it again."

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """Recipe of each cell."""
        return tuple(cell.recipe for cell in self.cells)


def default_path() -> Path:
    """Path of the default analysis, inside the installed package or in the checkout.

    Returns:
        A file that exists.
    """
    inside = PACKAGE / "analyses" / "mechanisms.yaml"
    return inside if inside.is_file() else PACKAGE.parent / "analyses" / "mechanisms.yaml"


def read(path: Path, is_smoke: bool = False, changes: Mapping[str, Any] | None = None) -> Analysis:
    """Analysis from its file.

    Args:
        path: YAML.
        is_smoke: Shrink it to one epoch on few images and two seeds, to see that everything runs.
        changes: Fields of the recipe that all trainings share, in place of the file's; they go into its name.

    Returns:
        The checked analysis; an unknown key or a value out of range is a ValueError.

    Raises:
        ValueError: If an axis changes no training.
    """
    source, content = document.read(path)
    changes = changes or {}
    shared, seeds = {**content["recipe"], **changes}, content["seeds"]
    if "model" in changes:
        content.pop("models", None)
    if is_smoke:
        shared = {name: SMOKE[name] for name in ("epochs", "subset", "batch_size") if name not in shared} | shared
        seeds = seeds[:2]
    models = content.get("models") or [shared.get("model", Recipe.model)]
    vary = content.get("vary", {})
    cells = planned(shared, models, seeds, content["methods"], vary, str(path), SMOKE if is_smoke else None)
    alternatives = {axis: sweep.alternatives(axis, values, str(path)) for axis, values in vary.items()}
    lists = {"method": "methods", "seed": "seeds"} | ({"model": "models"} if content.get("models") else {})
    consistency.check_recipe([*content["recipe"], *changes], changes, lists, alternatives, cells, str(path))
    recipes = [cell.recipe for cell in cells]
    measurements = [_measurement(name, values or {}, recipes, is_smoke) for name, values in content["probes"].items()]
    axes = tuple(axis for axis in vary if any(axis in cell.point for cell in cells))
    for axis in [] if is_smoke else [axis for axis in vary if axis not in axes]:  # smoke may make alternatives alike
        raise ValueError(
            f"The axis {axis!r} of {path} must make trainings differ, got one that changes none; leave it out, or give "
            "it other values."
        )
    measures = {
        name: comparison.measure_from(name, values or {}) for name, values in content.get("measures", {}).items()
    }
    claims = tuple(comparison.claim_from(values, measures) for values in content.get("claims", []))
    consistency.check_names(alternatives, measures, measurements, str(path))
    for measure in measures.values():
        consistency.check_measure(measure, measurements)
    for claim in claims:
        consistency.check_claim(claim, measures, measurements, cells, axes)
    return Analysis(
        name="-".join(
            [path.stem, *(f"{key}={sweep.word(value)}" for key, value in changes.items()), *["smoke"] * is_smoke]
        ),
        title=str(content.get("title", path.stem)) + (" (smoke: the numbers mean nothing)" if is_smoke else ""),
        source=source,
        cells=tuple(cells),
        measurements=tuple(measurements),
        measures=measures,
        claims=claims,
        jobs=content.get("jobs", 0),
        threads=content.get("threads", 0),
        axes=axes,
        tradeoffs=tuple(tradeoff.pair_from(one, measures) for one in content.get("tradeoffs", [])),
        command=_command(path, is_smoke, changes),
    )


def plan(analysis: Analysis, data_dir: Path | None = None, download: bool = False) -> list[tuple[Recipe, Budget]]:
    """Cells and what each costs, without training.

    Args:
        analysis: What to plan.
        data_dir: Where the data set lies, if it is not embedded.
        download: Fetch the data set if it is not there.

    Returns:
        Resolved recipes with their budgets; an option that has no effect on any is a ValueError.
    """
    refuse_idle_options(sorted({recipe.data for recipe in analysis.recipes}), data_dir, download)
    plans: dict[Recipe, tuple[Recipe, Budget]] = {}
    for recipe in analysis.recipes:
        alike = dataclasses.replace(recipe, seed=0)  # seeds cost the same
        if alike not in plans:
            plans[alike] = training.plan(alike, data_dir, download)
    found = [(recipe, *plans[dataclasses.replace(recipe, seed=0)]) for recipe in analysis.recipes]
    return [(dataclasses.replace(resolved, seed=recipe.seed), budget) for recipe, resolved, budget in found]


def estimate(analysis: Analysis, budgets: Sequence[Budget], checkpoints: Path, jobs: int = 0) -> str:
    """How much there is to train, and how long that takes at the speed of what is trained already.

    Args:
        analysis: What is planned.
        budgets: Of its cells, in their order.
        checkpoints: Folder of the cells.
        jobs: Cells side by side; 0 means what the analysis says.

    Returns:
        A sentence; without a finished cell it says that nothing is known about seconds.
    """
    left, spent, seconds, num_done = 0, 0, 0.0, 0
    for cell, budget in zip(analysis.cells, budgets, strict=True):
        folder = checkpoints / cell.name
        if (folder / f"{cell.recipe.method}.pt").exists():
            num_done += 1
            stages = stages_of(folder) if (folder / "cost.json").exists() else []
            parts: list[Any] = [stage.get(of) for stage in stages for of in ("train_s", "evaluation_s")]
            if parts and None not in parts:
                seconds += sum(parts)
                spent += budget.training_multiply_adds
        else:
            left += budget.training_multiply_adds
    work = sum(budget.training_multiply_adds for budget in budgets)
    total = f"{len(budgets)} trainings, {work:.3g} multiply-adds forward and backward; {num_done} are done"
    if num_done == len(budgets):
        return f"{total}."
    if not spent:
        return f"{total}, and how long the others take is not known before one is."
    jobs, _ = shares(jobs or analysis.jobs, analysis.threads, len(budgets) - num_done)
    minutes = left * seconds / spent / jobs / 60
    return f"{total}, the others take about {minutes:.1f} min at their speed, {jobs} side by side; probes come on top."


def run(
    analysis: Analysis,
    out: Path,
    checkpoints: Path,
    *,
    data_dir: Path | None = None,
    device: str | None = None,
    jobs: int = 0,
    cluster: str = "",
    cluster_options: Mapping[str, Any] | None = None,
    supply: Supply = Supply(),
    progress: Progress = lambda done, total, text: None,
) -> tuple[DataFrame, DataFrame]:
    """Train the cells, probe each, and write tables, figures and the comparison; what is complete is reused.

    Args:
        analysis: What to run.
        out: Folder for tables and figures.
        checkpoints: Folder of the cells.
        data_dir: Where the data set lies, if it is not embedded.
        device: ``cpu`` to stay on the CPU; by default the fastest device there is.
        jobs: Cells side by side; 0 means what the analysis says.
        cluster: Where cells run: empty for processes of this command, else what ``cluster.as_jobs`` knows.
        cluster_options: Of submitit's executor.
        supply: Where the electricity comes from, if ``cost.csv`` is to say what the trainings emit.
        progress: Told of steps over all cells.

    Returns:
        The comparison of the methods and the verdicts on the claims.
    """
    check_jobs(jobs, cluster, cluster_options or {})
    if not all((checkpoints / one.name / f"{one.recipe.method}.pt").exists() for one in analysis.cells):
        check_writable(checkpoints, "--checkpoints")
    started = time.monotonic()
    path = out / "analysis.json"
    before = _finished(path)
    check_writable(out)
    if not before:
        _write_record(path, _record(analysis, None))
    measurements = [_on_device(measurement, data_dir, device) for measurement in analysis.measurements]
    cells = [
        Cell(
            one.recipe,
            checkpoints / one.folder,
            tuple(measurement for measurement in measurements if measurement.applies_to(one.recipe)),
            data_dir,
            device,
            supply,
        )
        for one in analysis.cells
    ]
    if cluster:
        waiting = {one.name: cell for one, cell in zip(analysis.cells, cells, strict=True) if not cell.is_done}
        is_new = as_jobs(
            list(waiting.values()),
            list(waiting),
            checkpoints / "jobs",
            cluster,
            jobs=jobs or (analysis.jobs if cluster == "local" else 0),  # it is about the cores of one machine
            threads=analysis.threads,
            options=cluster_options or {},
            progress=progress,
        )
    else:
        names = [one.name for one in analysis.cells]
        is_new = side_by_side(cells, names, jobs or analysis.jobs, analysis.threads, progress)
    if is_new or not _is_of(before, analysis):  # from here on the folder holds something else than it did
        before = {}
        _write_record(path, _record(analysis, None))
    folders = {checkpoints / one.name: one for one in analysis.cells}
    tables = {one.name: gathered(one, folders, out, analysis.axes) for one in measurements}
    spent = costs(folders, analysis.axes)
    compared, verdicts = comparison.compare(analysis.measures, analysis.claims, tables, spent, analysis.axes)
    comparison.write(compared, verdicts, out)
    write_atomically(out / "cost.csv", spent.to_csv(index=False))
    if analysis.axes and len(compared):
        drawing.save(sweep.draw(compared), out / "sweep")
    if analysis.tradeoffs and len(compared):
        drawing.save(tradeoff.draw(compared, analysis.tradeoffs), out / "tradeoff")
    # Where nothing was trained or measured, date and seconds stay those of the run that did.
    kept = {key: before[key] for key in ("date", "seconds", "cores") if before}
    _write_record(path, _record(analysis, time.monotonic() - started) | kept)
    return comparison.readable(compared), verdicts


def check_jobs(jobs: int, cluster: str, cluster_options: Mapping[str, Any]) -> None:
    """Refuse what no run can be told of how its cells are to be done.

    Args:
        jobs: Cells side by side.
        cluster: Where cells run.
        cluster_options: Of submitit's executor.

    Raises:
        ValueError: If there are fewer jobs than none, or options for a cluster and none is asked for.
    """
    if jobs < 0:
        raise ValueError(
            "--jobs of the command line must be a whole number, 0 for what the cores allow, "
            f"got {jobs}; choose another."
        )
    if cluster_options and not cluster:
        raise ValueError("--cluster-options must come with --cluster, got them alone; add --cluster slurm.")


def _command(path: Path, is_smoke: bool, changes: Mapping[str, Any]) -> str:
    """Of the command line, that does what ``read`` was asked for."""
    words = [] if path == default_path() else [str(path)]
    words += ["--smoke"] * is_smoke + ["--set"] * bool(changes)
    words += [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changes.items()]
    return shlex.join(["ssat-probe", "reproduce", *words])


def _measurement(name: str, values: dict[str, Any], recipes: list[Recipe], is_smoke: bool) -> Measurement:
    """A probe of the file: its options, those of its sample, and what cells it looks at stand side by side."""
    sample_fields = {field.name for field in dataclasses.fields(Sample)}
    options = {key: value for key, value in values.items() if key not in (*sample_fields, *OF_MEASUREMENT)}
    sample = {key: value for key, value in values.items() if key in sample_fields}
    models, name_of_probe = values.get("models", []), values.get("probe", name)
    if not isinstance(models, list) or not all(isinstance(one, str) for one in (*models, name_of_probe)):
        raise ValueError(
            f"The models of {name} must be a list of names and its probe a name, got {models!r} and {name_of_probe!r}; "
            "write models: [vit_nano] and probe: hessian."
        )
    for model in models:
        known(model, {one.model: 0 for one in recipes}, f"the models of this analysis, of which {name} takes some")
    if not isinstance(snapshots := values.get("snapshots", []), list):
        raise ValueError(f"The snapshots of {name} must be a list of epochs, got {snapshots!r}; write [0, 1, 2].")
    if is_smoke:
        sample["num_images"] = 10
        options |= {name: least for name, least in (("steps", 4), ("points", 3)) if name in options}
        snapshots = snapshots and snapshot_epochs(1)
    chosen = probe.make(name_of_probe, **options)
    measurement = Measurement(name, chosen, Sample(**sample), tuple(models), tuple(snapshots))
    for recipe in filter(measurement.applies_to, recipes):
        measurement.check(recipe)
    return measurement


def _on_device(measurement: Measurement, data_dir: Path | None, device: str | None) -> Measurement:
    sample = dataclasses.replace(
        measurement.sample,
        data_dir=measurement.sample.data_dir or data_dir,
        device=measurement.sample.device or device or "",
    )
    return dataclasses.replace(measurement, sample=sample)


def _finished(path: Path) -> dict[str, Any]:
    """Record of a run that came to its end; empty if there is none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_whole = isinstance(record, dict) and record.keys() >= {"name", "date", "seconds", "cores", "source", "recipes"}
    return record if is_whole and record["seconds"] is not None else {}


def _is_of(record: Mapping[str, Any], analysis: Analysis) -> bool:
    """Whether a finished run was of what the file says now, whatever its comments."""
    if not record or record["name"] != analysis.name:
        return False
    try:
        return bool(document.parsed(record["source"]) == document.parsed(analysis.source))
    except yaml.YAMLError:  # an earlier version took it
        return False


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def _record(analysis: Analysis, seconds: float | None) -> dict[str, Any]:
    """What was run, for the report; without seconds it has not been finished."""
    return {
        "name": analysis.name,
        "title": analysis.title,
        "command": analysis.command,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": None if seconds is None else round(seconds, 1),
        "cores": os.cpu_count(),
        "source": analysis.source,
        "recipes": [recipe.as_dict() for recipe in analysis.recipes],
    }
