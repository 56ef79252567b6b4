"""Command line: words in, calls out."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Literal

import cyclopts
from cyclopts import App, Parameter

from ssat_probe import options, registry, terminal
from ssat_probe.carbon import Supply
from ssat_probe.execution import Execution
from ssat_probe.recipe import Recipe
from ssat_probe.sample import Sample
from ssat_probe.source import Source

Checkpoints = Annotated[list[Path], Parameter(name="--ckpt", consume_multiple=(1, None))]
Flat = Parameter(name="*")

LOST_PEER = re.compile("(closed|reset) by peer|Broken pipe|remote process exited")
"What gloo and NCCL say in a process when another one has gone."

WORDS: ContextVar[Sequence[str]] = ContextVar("words", default=())
"Of the command line that is being carried out, without those of a YAML file."

app = App(
    name="ssat-probe",
    help="Train Vision Transformers on limited data, probe them, and compare them.",
    help_format="plaintext",
    default_parameter=Parameter(consume_multiple=True, negative=()),
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # main says how to go on
)


@app.command
def train(
    *,
    recipe: Annotated[Recipe, Flat] = Recipe(),
    execution: Annotated[Execution, Flat] = Execution(),
    supply: Annotated[Supply, Flat] = Supply(),
    out: Path = Path("checkpoints"),
    data_dir: Path | None = None,
    download: bool = False,
    resume: Annotated[bool, Parameter(negative=("--no-resume",))] = True,
    device: str = "",
    tracker: str = "",
    snapshots: bool = False,
    snapshot_steps: bool = False,
    gradients_every: int = 0,
    pictures_every: int = 0,
    workers: int | None = None,
    plan: bool = False,
) -> None:
    """Train a model: from scratch, SSL+FT or SSAT.

    Args:
        recipe: What to train.
        execution: How the training is carried out.
        supply: Where the electricity comes from, so that cost.json says what it emits.
        out: Folder of the runs; each makes its own folder in it.
        data_dir: Where the data set lies on disk; the embedded ones need none.
        download: Fetch the data set if it is not there.
        resume: Go on with an interrupted run; --no-resume starts it again. A finished one is reused either way.
        device: cpu, or empty for the fastest there is.
        tracker: A tracker of accelerate to log to as well, such as tensorboard.
        snapshots: Keep checkpoints along the run, after 0, 1, 2, 3, 4, 6, 8, 11, 16, ... epochs of each stage.
        snapshot_steps: Keep checkpoints along the run, after 0, 1, 2, 3, 4, 6, 8, 11, 16, ... steps of each stage.
        gradients_every: Log the cosine between the gradients of classification and task every so many steps of ssat.
        pictures_every: Draw what the decoder makes of the same eight images in every so many epochs.
        workers: Processes that decode images, where they are files too large in all to be kept in memory; none means 2.
        plan: Print the budget and stop.
    """
    from ssat_probe import training
    from ssat_probe.data import refuse_idle_options
    from ssat_probe.effect import refuse_idle

    refuse_idle(recipe, WORDS.get())
    refuse_idle_options([recipe.data], data_dir, download)
    with terminal.hushed(int(os.environ.get("RANK", "0")) > 0):  # as torchrun and accelerate launch number processes
        resolved, budget = training.plan(recipe, data_dir, download)
        terminal.print_budget(resolved, budget)
        if plan:
            return
        was_there = (out / resolved.name / f"{resolved.method}.pt").exists()
        with terminal.progress() as progress, terminal.warnings_said():
            checkpoint = training.train(
                recipe, out, data_dir=data_dir, resume=resume, device=device or None, tracker=tracker or None,
                snapshots=snapshots, snapshot_steps=snapshot_steps, pictures_every=pictures_every,
                gradients_every=gradients_every, workers=workers, execution=execution, supply=supply,
                progress=progress,
            )  # fmt: skip
        terminal.say(f"Found {checkpoint.path}, trained before" if was_there else f"Wrote {checkpoint.path}")


@app.command
def reproduce(
    analysis: Path | None = None,
    *,
    supply: Annotated[Supply, Flat] = Supply(),
    out: Path | None = None,
    checkpoints: Path | None = None,
    data_dir: Path | None = None,
    download: bool = False,
    device: str = "",
    jobs: int = 0,
    cluster: Literal["", "local", "slurm"] = "",
    cluster_options: list[str] = [],  # noqa: B006 (cyclopts wants a list)
    set_: Annotated[list[str], Parameter(name="--set")] = [],  # noqa: B006 (cyclopts wants a list)
    plan: bool = False,
    smoke: bool = False,
) -> None:
    """Run an analysis: train its models, probe them, compare them; what is complete is reused.

    Args:
        analysis: A YAML file such as those in analyses/; by default the one of the three mechanisms.
        supply: Where the electricity comes from, so that cost.json and cost.csv say what the trainings emit.
        out: Folder for tables, figures and the report; by default figures/<analysis>.
        checkpoints: Folder for the trained models; by default checkpoints/<analysis>.
        data_dir: Where the data set lies on disk; the embedded ones need none.
        download: Fetch the data set if it is not there.
        device: cpu, or empty for the fastest there is.
        jobs: Models trained side by side, each in a process of its own; 0 means what the analysis says, and with
            --cluster slurm as many as Slurm allows.
        cluster: slurm sends every model to Slurm as a job, through submitit; local does the same with submitit's
            processes on this machine, to try it out; empty trains here without it.
        cluster_options: Of submitit's executor, such as timeout_min=600 slurm_partition=gpu gpus_per_node=1.
        set_: Fields of the recipe in place of the file's, such as data=cifar10 model=vit_tiny; results go to folders of
            their own.
        plan: Print models and budgets, and stop.
        smoke: One epoch on few images, to see that everything runs; the numbers mean nothing.
    """
    from ssat_probe import analysis as analyses
    from ssat_probe.report import write_report

    of_cluster = options.changes(cluster_options, "--cluster-options")
    analyses.check_jobs(jobs, cluster, of_cluster)
    chosen = analyses.read(analysis or analyses.default_path(), is_smoke=smoke, changes=options.changes(set_))
    cells = analyses.plan(chosen, data_dir, download)
    for cell, (recipe, budget) in zip(chosen.cells, cells, strict=True):
        terminal.print_budget(recipe, budget, cell.name)
    checkpoints = checkpoints or Path("checkpoints") / chosen.name
    terminal.say(analyses.estimate(chosen, [budget for _, budget in cells], checkpoints, jobs))
    if plan:
        return
    out = out or Path("figures") / chosen.name
    with terminal.progress() as progress, terminal.warnings_said():
        comparison, claims = analyses.run(
            chosen, out, checkpoints,
            data_dir=data_dir, device=device or None, jobs=jobs, cluster=cluster,
            cluster_options=of_cluster, supply=supply, progress=progress,
        )  # fmt: skip
    page = write_report(out)
    terminal.print_table(comparison)
    terminal.print_verdicts(claims)
    terminal.say(f"Wrote {page}")


@app.command
def draw(tables: Annotated[list[Path], Parameter(consume_multiple=(1, None))]) -> None:
    """Draw figures again from the tables that probes wrote; needs no model.

    Args:
        tables: Files such as figures/mechanisms/attention.csv.
    """
    from ssat_probe import drawing, probe, relation
    from ssat_probe.table import read_table

    for path in tables:
        table = read_table(path)
        draw_one = relation.draw if path.stem in registry.names("relations") else probe.draw
        drawing.save(draw_one(path.stem, table), path.with_suffix(""))
        terminal.say(f"Wrote {path.with_suffix('.png')} and .pdf")


@app.command
def report(folder: Path) -> None:
    """Make one self-contained HTML page from a folder of results.

    Args:
        folder: Such as figures/mechanisms.
    """
    from ssat_probe.report import write_report

    terminal.say(f"Wrote {write_report(folder)}")


@app.command
def data(name: str, *, data_dir: Path | None = None) -> None:
    """Describe a data set: layout on disk, source, classes, splits, licence; and check what is there.

    Args:
        name: Data set; ssat-probe list names them.
        data_dir: Folder to check.
    """
    from ssat_probe.data import description

    for line in description(name, data_dir):
        terminal.say(line)


@app.command
def describe(
    *,
    ckpt: Checkpoints,
    sample: Annotated[Sample, Flat] = Sample(),
    source: Annotated[Source, Flat] = Source(),
) -> None:
    """Say what a checkpoint is, and which probes apply to it.

    Args:
        ckpt: Checkpoints: ours, files of other tools, or timm:NAME.
        sample: Which images would be looked at; only one is.
        source: What foreign weights are.
    """
    from ssat_probe.description import describe as described

    for path in ckpt:
        for line in described(path, sample, source):
            terminal.say(line)


@app.command
def export(*, ckpt: Path, to: Literal["timm", "mae", "safetensors"], out: Path | None = None) -> None:
    """Write a checkpoint of ours so that other tools can read it.

    Args:
        ckpt: A checkpoint that ssat-probe train wrote.
        to: timm (encoder and head), mae (the official names, with the decoder), or safetensors (everything).
        out: The new file; by default beside the checkpoint.
    """
    from ssat_probe.export import export as exported

    terminal.say(f"Wrote {exported(ckpt, to, out)}")


@app.command(name="list")
def list_() -> None:
    """List models, data sets, objectives, decoders, probes, relations between checkpoints, and foreign formats."""
    for kind in ("models", "data", "objectives", "decoders", "probes", "relations", "formats"):
        terminal.say(f"{kind}:")
        for name in registry.names(kind):
            terminal.say(f"  {name:<16} {registry.summary(kind, name)}")
            variants = [variant for variant, file in registry.variants(kind).items() if file == name]
            if variants:
                terminal.say(f"  {'':<16} {', '.join(variants)}")


def _probe_command(name: str) -> Callable[..., None]:
    """Command of a probe: its options are the fields of the probe and of the sample."""
    probes = registry.load("probes", name)

    def command(
        *,
        ckpt: Checkpoints,
        probe: Annotated[probes.Probe, Flat] = probes.Probe(),  # type: ignore[name-defined]
        sample: Annotated[Sample, Flat] = Sample(),
        source: Annotated[Source, Flat] = Source(),
        out: Path | None = None,
    ) -> None:
        from ssat_probe import probe as runner
        from ssat_probe.record import folder_name

        out = out or Path("figures") / folder_name(ckpt)
        with terminal.hushed(not runner.join(probe, sample)):
            if line := runner.estimate(probe, ckpt, sample, source, out):
                terminal.say(line)
            with terminal.progress() as progress:
                table = runner.run(probe, ckpt, sample, out, progress, source)
            terminal.print_table(probe.summary(table))
            terminal.say(f"Wrote {out / name}.csv, .json, .png and .pdf")

    command.__doc__ = f"""{registry.summary("probes", name)}

    Args:
        ckpt: Checkpoints to measure, one or more: ours, files of other tools, or timm:NAME.
        probe: Options of the probe.
        sample: Which images.
        source: What foreign weights are.
        out: Folder for the table, its record and its figure; by default one in figures/ named after the checkpoints.
    """
    return command


for _name in registry.names("probes"):
    app.command(_probe_command(_name), name=_name)


def _relation_command(name: str) -> Callable[..., None]:
    """Command of a relation between checkpoints."""
    relations = registry.load("relations", name)

    def command(
        *,
        ckpt: Checkpoints,
        relation: Annotated[relations.Relation, Flat] = relations.Relation(),  # type: ignore[name-defined]
        sample: Annotated[Sample, Flat] = Sample(),
        out: Path | None = None,
    ) -> None:
        from ssat_probe import relation as runner
        from ssat_probe.record import folder_name

        out = out or Path("figures") / folder_name(ckpt)
        table = runner.run(relation, ckpt, sample, out, terminal.say)
        terminal.print_table(relation.summary(table))
        terminal.say(f"Wrote {out / name}.csv, .json, .png and .pdf")

    command.__doc__ = f"""{registry.summary("relations", name)}

    Args:
        ckpt: Checkpoints of one architecture, in order.
        relation: Options of the relation.
        sample: Which images.
        out: Folder for the table, its record and its figure; by default one in figures/ named after the checkpoints.
    """
    return command


for _name in registry.names("relations"):
    app.command(_relation_command(_name), name=_name)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit status 2.

    Args:
        argv: Words; by default those of the process.

    Raises:
        ModuleNotFoundError: If a module of this package is missing, which is no mistake of the user.
        RuntimeError: If torch fails otherwise than by the end of another process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        app.config = options.config(words)
        WORDS.set(tuple(words))
        app(words, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        terminal.fail(str(error))
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("ssat_probe"):
            raise
        terminal.fail(str(error))
    except (ValueError, FileNotFoundError, FloatingPointError, PermissionError, ChildProcessError) as error:
        terminal.fail(str(error))
    except RuntimeError as error:
        if not LOST_PEER.search(str(error)):
            raise
        terminal.fail(
            "All processes must go on together, got one that has ended; what it said or what ended it is the reason. "
            "The same command goes on from the last saved state."
        )
    except BrokenPipeError:  # the reader, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        terminal.fail("Interrupted; the same command goes on from what was saved last.", status=130)
