"""A training run: what stays the same, what changes, and both on disk."""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn

from ssat_probe.carbon import Carbon, Supply
from ssat_probe.checkpoint import Checkpoint, load_checkpoint, load_tensors, save_checkpoint, save_tensors, state_of
from ssat_probe.execution import Execution
from ssat_probe.images import Facts, Images
from ssat_probe.kernel import Attention
from ssat_probe.meter import Meter
from ssat_probe.network import Encoder
from ssat_probe.recipe import Recipe
from ssat_probe.table import write_atomically

STATE_FILE = "training_state.pt"
BEST_FILE = "best.pt"


@dataclass
class State:
    """Everything that changes while a run goes on; with the weights and the optimiser, all that resuming needs.

    Order, augmentation and masks of a step depend on the seed and the step alone, so there is no generator to keep.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    "Steps done in this epoch."
    sums: dict[str, float] = field(default_factory=dict)
    "Sums of this epoch so far."
    rows: list[dict[str, Any]] = field(default_factory=list)
    "Finished epochs, one row each."
    cost: dict[str, dict[str, Any]] = field(default_factory=dict)
    "What each stage has cost so far."
    attention: dict[str, str] = field(default_factory=dict)
    "Kernel of attention by device, dtype and shapes: a run that goes on must round as it did before."
    used: dict[str, str] = field(default_factory=dict)
    "Those used since the last epoch ended, for what the stage's cost says."
    best: float = -1.0
    "Best accuracy on the validation images so far, where the weights that had it are to be kept."
    best_epoch: int = 0
    "Epochs of the last stage after which it was."


@dataclass(frozen=True)
class Run:
    """What stays the same while a run goes on."""

    recipe: Recipe
    facts: Facts
    train: Images
    val: Images
    folder: Path
    accelerator: Accelerator
    encoder: Encoder
    decoder: nn.Module | None
    "What the task puts behind the encoder; only one that predicts pixels goes into checkpoints."
    workers: int
    multiply_adds_per_image: dict[str, int] = field(default_factory=dict)
    "Of a training step, forward and backward, by stage."
    execution: Execution = field(default_factory=Execution)
    attention: Attention = field(default_factory=Attention)
    "Which kernels are used."
    meter: Meter = field(default_factory=Meter)
    "What the work takes."
    carbon: Carbon = field(default_factory=lambda: Carbon(Supply()))
    "What the electricity does."

    @cached_property
    def fingerprint(self) -> str:
        """Of the training images; taken once, since it may read many of them."""
        return self.train.fingerprint()

    @property
    def network(self) -> nn.ModuleDict:
        """Encoder and, where there is one, decoder, as one module."""
        parts = {"encoder": self.encoder, "decoder": self.decoder}
        return nn.ModuleDict({name: part for name, part in parts.items() if part is not None})


def save_state(run: Run, state: State, optimiser: Any, average: ModelEmaV3 | None = None) -> None:
    """Write all that resuming needs, atomically, from the main process.

    Args:
        run: Whose weights.
        state: How far it is.
        optimiser: Of the current stage.
        average: Moving average of the weights, if there is one.
    """
    if not run.accelerator.is_main_process:
        return
    scaler = run.accelerator.scaler
    state.attention, state.used = dict(run.attention.chosen), state.used | run.attention.used
    content = {
        "recipe": run.recipe.as_dict(),
        "images": run.fingerprint,
        "state": dataclasses.asdict(state),
        "model": state_of(run.encoder, run.decoder),
        "optimiser": optimiser.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "average": average.module.state_dict() if average is not None else None,
    }
    save_tensors(content, run.folder / STATE_FILE)
    write_log(run, state)


def load_state(run: Run) -> tuple[State, dict[str, Any] | None]:
    """State of an interrupted run, its weights loaded into the network; a fresh one where there is none.

    Args:
        run: Whose folder is looked into.

    Returns:
        The state, and those of optimiser, scaler and moving average if there are any.

    Raises:
        ValueError: If the state is of another recipe or of other images.
    """
    path = run.folder / STATE_FILE
    if not path.exists():
        return State(), None
    content = load_tensors(path, "the state of an interrupted training")
    refuse_other(Recipe.from_dict(content["recipe"], str(path)), run.recipe, path)
    if content["images"] != run.fingerprint:
        raise ValueError(
            f"{path} must have been made from the images of data {run.recipe.data!r} as they are now, got others; "
            "restore the images, or start the run again with --no-resume."
        )
    parts = {"": run.encoder, "decoder.": run.decoder}
    for prefix, module in parts.items():
        if module is not None:
            names = module.state_dict().keys()
            module.load_state_dict({name: content["model"][prefix + name] for name in names})
    state = State(**content["state"])
    if run.attention.asked == "auto":
        run.attention.chosen.update(state.attention)
    return state, {name: content.get(name) for name in ("optimiser", "scaler", "average")}


def start_again(run: Run) -> None:
    """Take away what an interrupted run has left, so that nothing of it stands beside the new one.

    Args:
        run: Whose folder is cleared.
    """
    if not run.accelerator.is_main_process or not run.folder.is_dir():
        return
    files = [STATE_FILE, BEST_FILE, "pretrain.pt", f"{run.recipe.method}-ema.pt", "log.csv", "cost.json"]
    files += [] if run.recipe.init_from else ["init.json"]  # else it has just been written
    for name in files:
        (run.folder / name).unlink(missing_ok=True)
    for name in ("snapshots", "steps", "pictures"):
        shutil.rmtree(run.folder / name, ignore_errors=True)


def write_checkpoint(
    run: Run, state: State, stage: str, path: Path, average: nn.ModuleDict | None = None
) -> Checkpoint:
    """Write the weights as a checkpoint, with the log and the cost beside it; after the last stage the state goes.

    Args:
        run: Whose weights.
        state: Its log and cost.
        stage: That has ended.
        path: Where the checkpoint goes.
        average: What to write instead of the weights, as a stage of its own behind ``stage``: their moving average.

    Returns:
        The checkpoint, in every process.

    Raises:
        FloatingPointError: If there are weights that are not finite.
    """
    network: dict[str, nn.Module] = dict((run.network if average is None else average).named_children())
    weights = state_of(network["encoder"], network.get("decoder") if run.recipe.reconstructs else None)
    epoch = sum(row["stage"] == stage for row in state.rows)  # fewer than planned where patience ended it
    if state.best_epoch and path.stem == run.recipe.method:
        weights, epoch = load_checkpoint(run.folder / BEST_FILE).state, state.best_epoch
        run.accelerator.wait_for_everyone()  # the file goes below
    if not all(bool(value.isfinite().all()) for value in weights.values() if value.is_floating_point()):
        raise FloatingPointError(
            f"The weights must be finite at the end of stage {stage}, got nan or infinity, so {path} was not written; "
            "lower base_lr, set clip_grad, or use precision fp32, in another folder (--out)."
        )
    stage = stage if average is None else f"{stage}-ema"
    checkpoint = Checkpoint(path, run.recipe, run.facts, stage, epoch, weights)
    if run.accelerator.is_main_process:
        write_log(run, state)
        save_checkpoint(checkpoint)
        if path.stem == run.recipe.method:
            (run.folder / STATE_FILE).unlink(missing_ok=True)
            (run.folder / BEST_FILE).unlink(missing_ok=True)
    return checkpoint


def keep_best(run: Run, state: State, stage: str) -> None:
    """Keep the weights as they are if no epoch before was as accurate on the validation images.

    Args:
        run: Whose weights.
        state: Its log, of whose last epoch the weights are; remembers the best.
        stage: That is going on.
    """
    accuracy = state.rows[-1][f"{run.recipe.select_on}_accuracy"]
    if accuracy > state.best:  # never where it was not looked at
        state.best, state.best_epoch = accuracy, state.epoch
        if run.accelerator.is_main_process:
            weights = state_of(run.encoder, run.decoder if run.recipe.reconstructs else None)
            save_checkpoint(Checkpoint(run.folder / BEST_FILE, run.recipe, run.facts, stage, state.epoch, weights))
    run.accelerator.wait_for_everyone()


def snapshot_epochs(num_epochs: int) -> list[int]:
    """Epochs after which a snapshot is kept: powers of √2, so that the beginning, where most happens, has most.

    Args:
        num_epochs: Of the stage.

    Returns:
        0, 1, 2, 3, 4, 6, 8, 11, 16, ..., and the last one.
    """
    powers = (round(2 ** (k / 2)) for k in range(64))
    return sorted({0, num_epochs, *(epoch for epoch in powers if epoch <= num_epochs)})


def write_snapshot(run: Run, stage: str, epoch: int | float, step: int | None = None) -> None:
    """Write the weights as they are as a checkpoint of its own, from the main process.

    Args:
        run: Whose weights.
        stage: That is going on.
        epoch: Epochs of it that are finished; a fraction where it is one of the snapshots by step.
        step: Steps of it that are finished, of one of those.
    """
    if run.accelerator.is_main_process:
        weights = state_of(run.encoder, run.decoder if run.recipe.reconstructs else None)
        path = snapshot_path(run.folder, stage, int(epoch)) if step is None else step_path(run.folder, stage, step)
        save_checkpoint(Checkpoint(path, run.recipe, run.facts, stage, epoch, weights))


def snapshot_path(folder: Path, stage: str, epoch: int) -> Path:
    """Where a snapshot lies; the names of a stage sort by epoch.

    Args:
        folder: Of the run.
        stage: Of the training.
        epoch: Finished epochs of that stage.

    Returns:
        The path.
    """
    return folder / "snapshots" / f"{stage}-{epoch:05d}.pt"


def step_path(folder: Path, stage: str, step: int) -> Path:
    """Where a snapshot by step lies; the names of a stage sort by step.

    Args:
        folder: Of the run.
        stage: Of the training.
        step: Finished steps of that stage.

    Returns:
        The path.
    """
    return folder / "steps" / f"{stage}-{step:08d}.pt"


def refuse_late_snapshots(recipe: Recipe, folder: Path, *, by_epoch: bool, by_step: bool) -> None:
    """Say so where an interrupted run goes on with snapshots that it did not keep from its beginning.

    Args:
        recipe: Of the run.
        folder: Of the run.
        by_epoch: Whether those by epoch are asked for.
        by_step: Whether those by step are.

    Raises:
        ValueError: If the first one is missing.
    """
    stage = next(iter(recipe.stage_epochs))
    asked = {"--snapshots": by_epoch, "--snapshot-steps": by_step}
    firsts = {"--snapshots": snapshot_path(folder, stage, 0), "--snapshot-steps": step_path(folder, stage, 0)}
    for option, path in firsts.items():
        if asked[option] and not path.is_file():
            raise ValueError(
                f"{path} must be there for {option}, got an interrupted run that was begun without it; leave it out, "
                "or start the run again with --no-resume."
            )


def refuse_other_data(there: Facts, asked: Facts, path: Path) -> None:
    """Refuse to take a finished run for one on other images.

    Args:
        there: Facts of the data that the run was trained on.
        asked: Of the data that is there now; a folder's mean and deviation are those of its own images.
        path: Of the checkpoint.

    Raises:
        ValueError: If they differ.
    """
    for name in ("classes", "channels", "mean", "std"):
        old, new = getattr(there, name), getattr(asked, name)
        if old != new and not (name in ("mean", "std") and np.allclose(old, new, rtol=1e-4)):
            raise ValueError(
                f"{path} must be of the images that are there now, got one of images with {name} {_brief(old)} instead "
                f"of {_brief(new)}; choose another folder with --out, or remove the run that is there."
            )


def _brief(values: Any) -> str:
    """The first few of many."""
    if not isinstance(values, tuple):
        return str(values)
    shown = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values[:4]]
    return ", ".join(shown) + (", ..." if len(values) > 4 else "")


def refuse_without_snapshots(recipe: Recipe, folder: Path, *, by_step: bool = False) -> None:
    """Say so where a finished run was asked for snapshots that it did not keep.

    Args:
        recipe: Of the run.
        folder: Of the run.
        by_step: Whether those by step are asked for, of which the first one is looked for.

    Raises:
        ValueError: If one is missing.
    """
    for stage, num_epochs in recipe.stage_epochs.items():
        if by_step and not (path := step_path(folder, stage, 0)).is_file():
            raise ValueError(
                f"{path} must be there for --snapshot-steps, got a finished run that did not keep it; choose another "
                "folder with --out (reproduce: --checkpoints), or remove the run that is there."
            )
        if by_step:
            continue
        for epoch in snapshot_epochs(num_epochs)[: None if recipe.patience is None else 1]:  # it may have ended early
            path = snapshot_path(folder, stage, epoch)
            if not path.is_file():
                raise ValueError(
                    f"{path} must be there for --snapshots, got a finished run that did not keep it; "
                    "choose another folder with --out (reproduce: --checkpoints), or remove the run that is there."
                )


def write_log(run: Run, state: State) -> None:
    """Write ``log.csv``, a row per finished epoch, and ``cost.json``, what each stage cost.

    Args:
        run: Whose folder.
        state: Its log and cost.
    """
    write_atomically(run.folder / "log.csv", pd.DataFrame(state.rows).to_csv(index=False))
    write_atomically(run.folder / "cost.json", json.dumps(state.cost, indent=2) + "\n")


def refuse_other(there: Recipe, asked: Recipe, path: Path) -> None:
    """Refuse to touch the run of another recipe.

    Args:
        there: Recipe of what is on disk.
        asked: Recipe that is to be run.
        path: Of what is on disk.

    Raises:
        ValueError: If they differ; the sentence names the first field that does.
    """
    for name, value in asked.as_dict().items():
        if there.as_dict()[name] != value:
            raise ValueError(
                f"{path} must be of the recipe that is asked for, got one with {name} {there.as_dict()[name]!r} "
                f"instead of {value!r}; choose another folder with --out (reproduce: --checkpoints), or remove the run "
                "that is there."
            )
