"""Analysis: train some cells, probe them, compare them, from one declarative file."""

import dataclasses
import datetime
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from pandas import DataFrame

from ssat_probe import comparison, probe, training
from ssat_probe.budget import Budget
from ssat_probe.probe import Probe
from ssat_probe.recipe import Recipe
from ssat_probe.registry import PACKAGE, known
from ssat_probe.sample import Sample
from ssat_probe.table import read_table, write_atomically, write_table

KEYS = ("title", "recipe", "models", "methods", "seeds", "probes", "measures", "claims", "jobs", "threads")
PROBE_STEPS = 100
"A probe counts as this many training steps in the progress bar."

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Measurement:
    """A probe with its options and its images."""

    name: str
    "Of its table, its figure and the measures that read it."
    probe: Probe
    sample: Sample
    models: tuple[str, ...] = ()
    "Models of the cells that it looks at; empty means all."

    def applies_to(self, recipe: Recipe) -> bool:
        """Whether a cell is looked at.

        Args:
            recipe: Of the cell.

        Returns:
            True if all models are, or this one is named.
        """
        return not self.models or recipe.model in self.models


@dataclass(frozen=True)
class Analysis:
    """What an analysis file says."""

    name: str
    title: str
    source: str
    "The file's text."
    recipes: tuple[Recipe, ...]
    measurements: tuple[Measurement, ...]
    measures: dict[str, comparison.Measure]
    claims: tuple[comparison.Claim, ...]
    jobs: int
    "Cells trained side by side, each in a process of its own; 0 means as many as the cores allow."
    threads: int
    "Threads of each cell; 0 means that the jobs share the cores."


def default_path() -> Path:
    """Path of the default analysis, inside the installed package or in the checkout.

    Returns:
        A file that exists.
    """
    inside = PACKAGE / "analyses" / "mechanisms.yaml"
    return inside if inside.is_file() else PACKAGE.parent / "analyses" / "mechanisms.yaml"


def read(path: Path, is_smoke: bool = False) -> Analysis:
    """Analysis from its file.

    Args:
        path: YAML.
        is_smoke: Shrink it to one epoch on few images and two seeds, to see that everything runs.

    Returns:
        The checked analysis; an unknown key or a value out of range is a ValueError.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not YAML of the right shape.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be an analysis file (YAML), got no such file; see analyses/.")
    source = path.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML, got {str(error).splitlines()[0]}; mend that line.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(content).__name__}; see analyses/.")
    for key in content:
        known(str(key), KEYS, f"the keys of an analysis ({path})")
    if missing := [key for key in ("recipe", "methods", "seeds", "probes") if not content.get(key)]:
        raise ValueError(f"{path} must say {', '.join(missing)}, got nothing there; see analyses/mechanisms.yaml.")
    shared, seeds = dict(content["recipe"]), list(content["seeds"])
    if is_smoke:
        shared |= {"epochs": 1, "subset": 20, "batch_size": 10}
        seeds = seeds[:2]
    models = list(content.get("models") or [shared.get("model", Recipe.model)])
    measures = {name: comparison.measure_from(name, values) for name, values in content.get("measures", {}).items()}
    return Analysis(
        name=f"{path.stem}-smoke" if is_smoke else path.stem,
        title=str(content.get("title", path.stem)) + (" (smoke: the numbers mean nothing)" if is_smoke else ""),
        source=source,
        recipes=tuple(
            Recipe.from_dict({**shared, "model": model, "method": method, "seed": seed}, str(path))
            for model in models
            for seed in seeds
            for method in content["methods"]
        ),
        measurements=tuple(
            _measurement(name, values or {}, models, is_smoke) for name, values in content["probes"].items()
        ),
        measures=measures,
        claims=tuple(comparison.claim_from(values, measures) for values in content.get("claims", [])),
        jobs=int(content.get("jobs", 0)),
        threads=int(content.get("threads", 0)),
    )


def plan(analysis: Analysis, data_dir: Path | None = None, download: bool = False) -> list[tuple[Recipe, Budget]]:
    """Cells and what each costs, without training.

    Args:
        analysis: What to plan.
        data_dir: Where the data set lies, if it is not embedded.
        download: Fetch the data set if it is not there.

    Returns:
        Resolved recipes with their budgets.
    """
    return [training.plan(recipe, data_dir, download) for recipe in analysis.recipes]


def run(
    analysis: Analysis,
    out: Path,
    checkpoints: Path,
    *,
    data_dir: Path | None = None,
    device: str | None = None,
    jobs: int = 0,
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
        progress: Told of steps over all cells.

    Returns:
        The comparison of the methods and the verdicts on the claims.
    """
    started = time.monotonic()
    path = out / "analysis.json"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    write_atomically(path, json.dumps(_record(analysis, None), indent=2) + "\n")
    measurements = [_on_device(measurement, data_dir, device) for measurement in analysis.measurements]
    cells = [
        _Cell(recipe, checkpoints, [one for one in measurements if one.applies_to(recipe)], data_dir, device)
        for recipe in analysis.recipes
    ]
    is_new = _run_cells(analysis, cells, jobs, progress)
    folders = {checkpoints / recipe.name: recipe for recipe in analysis.recipes}
    tables = {
        one.name: _gathered(one, [folder for folder in folders if one.applies_to(folders[folder])], out)
        for one in measurements
    }
    compared, verdicts = comparison.compare(analysis.measures, analysis.claims, tables, _costs(folders))
    comparison.write(compared, verdicts, out)
    record = _record(analysis, time.monotonic() - started)
    kept = json.loads(before) if before and not is_new else {}
    if kept.get("seconds") is not None and kept["source"] == analysis.source:
        record = kept  # nothing was trained or measured: date and seconds stay those of the run that did
    write_atomically(path, json.dumps(record, indent=2) + "\n")
    return comparison.readable(compared), verdicts


@dataclass(frozen=True)
class _Cell:
    """One training and its probes."""

    recipe: Recipe
    checkpoints: Path
    measurements: list[Measurement]
    data_dir: Path | None
    device: str | None

    def __call__(self, told: Progress) -> bool:
        """Train and probe, or find that it is done.

        Args:
            told: Steps done, steps in all, text.

        Returns:
            Whether anything was trained or measured.
        """
        path = self.checkpoints / self.recipe.name / f"{self.recipe.method}.pt"
        steps, is_new = 0, not path.exists()

        def training_told(done: int, total: int, text: str) -> None:
            nonlocal steps
            steps = total
            told(done, total + PROBE_STEPS * len(self.measurements), f"{self.recipe.name}: {text}")

        training.train(
            self.recipe, self.checkpoints, data_dir=self.data_dir, device=self.device, progress=training_told
        )
        total = steps + PROBE_STEPS * len(self.measurements)
        for done, one in enumerate(self.measurements):
            told(steps + PROBE_STEPS * done, total, f"{self.recipe.name}: {one.name}")
            if not probe.is_up_to_date(one.probe, [path], one.sample, path.parent, one.name):
                is_new = True
                table, record = probe.measure_all(one.probe, [path], one.sample)
                write_table(table, path.parent / f"{one.name}.csv", record)
        told(total, total, f"{self.recipe.name}: done")
        return is_new


def _run_cells(analysis: Analysis, cells: list[_Cell], jobs: int, progress: Progress) -> bool:
    """Run the cells, in this process or side by side; whether any of them did anything."""
    cores = os.cpu_count() or 1
    threads = analysis.threads or max(1, cores // max(1, jobs or analysis.jobs or 1))
    jobs = min(jobs or analysis.jobs or max(1, cores // threads), len(cells))
    together = _Together(len(cells), progress)
    if jobs == 1:
        with _threads(threads):
            return any([cell(together.teller(number)) for number, cell in enumerate(cells)])
    context = get_context("spawn")  # a forked torch may hang
    news = context.SimpleQueue()
    with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(news, threads, os.getpid())) as pool:
        waiting = [pool.submit(_work, cell, number) for number, cell in enumerate(cells)]
        try:
            return _follow(waiting, news, together)
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _follow(waiting: list[Future[bool]], news: "SimpleQueue[Any]", together: "_Together") -> bool:
    """Pass on what the workers tell, until all are done or one fails."""
    pending: set[Future[bool]] = set(waiting)
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        while not news.empty():
            together.told(*news.get())
    return any([future.result() for future in waiting])


_news: "SimpleQueue[Any]"
"Of a worker process: where it tells how far it is."


def _begin(news: "SimpleQueue[Any]", threads: int, parent: int) -> None:
    """Start a worker process, which ends when its parent does."""
    global _news
    _news = news
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _work(cell: _Cell, number: int) -> bool:
    """A cell in a worker process."""
    last = 0.0

    def told(done: int, total: int, text: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 0.2:
            last = time.monotonic()
            _news.put((number, done, total, text))

    return cell(told)


def _end_with(parent: int) -> None:
    """End this process soon after its parent has gone, so that a killed analysis leaves nobody writing."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


class _Together:
    """Progress of all cells as one."""

    def __init__(self, num_cells: int, progress: Progress) -> None:
        self.done, self.totals, self.progress = [0] * num_cells, [0] * num_cells, progress

    def teller(self, number: int) -> Progress:
        """What one cell tells its news to."""
        return lambda done, total, text: self.told(number, done, total, text)

    def told(self, number: int, done: int, total: int, text: str) -> None:
        """One cell's news."""
        self.done[number], self.totals[number] = done, total
        known_totals = [value for value in self.totals if value]
        expected = sum(known_totals) / len(known_totals) * len(self.totals)
        self.progress(sum(self.done), round(expected), text)


@contextmanager
def _threads(num: int) -> Iterator[None]:
    """Torch's number of threads, as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measurement(name: str, values: dict[str, Any], models: list[str], is_smoke: bool) -> Measurement:
    """A probe of the file: its options, those of its sample, and perhaps its probe and models stand side by side."""
    sample_fields = {field.name for field in dataclasses.fields(Sample)}
    options = {key: value for key, value in values.items() if key not in (*sample_fields, "probe", "models")}
    sample = {key: value for key, value in values.items() if key in sample_fields}
    for model in values.get("models", []):
        known(model, models, f"the models of this analysis, of which {name} takes some")
    if is_smoke:
        sample["num_images"] = 10
        options |= {name: least for name, least in (("steps", 4), ("points", 3)) if name in options}
    chosen = probe.make(values.get("probe", name), **options)
    return Measurement(name, chosen, Sample(**sample), tuple(values.get("models", ())))


def _on_device(measurement: Measurement, data_dir: Path | None, device: str | None) -> Measurement:
    sample = dataclasses.replace(
        measurement.sample,
        data_dir=measurement.sample.data_dir or data_dir,
        device=measurement.sample.device or device or "",
    )
    return dataclasses.replace(measurement, sample=sample)


def _gathered(measurement: Measurement, folders: list[Path], out: Path) -> DataFrame:
    """Tables of all cells as one, written with its record and its figure."""
    paths = [folder / f"{measurement.name}.csv" for folder in folders]
    records = [json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) for path in paths]
    record = records[0] | {
        "checkpoints": [entry for one in records for entry in one["checkpoints"]],
        "seconds": round(sum(one["seconds"] for one in records), 3),
    }
    table = _without_doubles([read_table(path) for path in paths])
    probe.write_results(measurement.probe, table, record, out, measurement.name)
    return table


def _without_doubles(tables: list[DataFrame]) -> DataFrame:
    """Tables of all cells; an untrained twin, which cells of one seed share, stands in it once."""
    seen: set[str] = set()
    parts = []
    for table in tables:
        parts.append(table[~table["checkpoint"].isin(seen)])
        seen |= set(table["checkpoint"])
    return pd.concat(parts, ignore_index=True)


def _costs(folders: dict[Path, Recipe]) -> DataFrame:
    """Seconds and images of each cell, over its stages."""
    rows = []
    for folder, recipe in folders.items():
        stages = json.loads((folder / "cost.json").read_text(encoding="utf-8")).values()
        rows.append(
            {
                "checkpoint": folder.name,
                "model": recipe.model,
                "method": recipe.method,
                "seed": recipe.seed,
                "seconds": sum(stage["train_s"] for stage in stages),
                "images": sum(stage["images"] for stage in stages),
            }
        )
    return DataFrame(rows)


def _record(analysis: Analysis, seconds: float | None) -> dict[str, Any]:
    """What was run, for the report; without seconds it has not been finished."""
    return {
        "name": analysis.name,
        "title": analysis.title,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": None if seconds is None else round(seconds, 1),
        "cores": os.cpu_count(),
        "source": analysis.source,
        "recipes": [recipe.as_dict() for recipe in analysis.recipes],
    }
