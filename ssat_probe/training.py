"""Train a recipe: one loop for every method, resumable at any step."""

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs
from timm.utils import ModelEmaV3
from torch import nn

from ssat_probe import objectives, registry
from ssat_probe.budget import Budget, budget_of, steps_per_epoch
from ssat_probe.carbon import Carbon, Supply
from ssat_probe.checkpoint import Checkpoint, load_checkpoint
from ssat_probe.data import open_dataset
from ssat_probe.epoch import evaluate as evaluate
from ssat_probe.epoch import finish_epoch, has_lost_patience, over_processes
from ssat_probe.execution import Execution, give_back_memory, keeping_memory, prepare
from ssat_probe.images import Dataset, Facts, Images, split
from ssat_probe.initial import begin_from
from ssat_probe.kernel import Attention
from ssat_probe.loading import LoadedBatch, batches, epoch_order
from ssat_probe.meter import Meter, forget_peak_memory
from ssat_probe.network import build_encoder, resolve
from ssat_probe.optimisation import build_optimiser
from ssat_probe.pictures import check_pictures, write_pictures
from ssat_probe.recipe import Recipe
from ssat_probe.run import (
    STATE_FILE,
    Run,
    State,
    keep_best,
    load_state,
    refuse_late_snapshots,
    refuse_other,
    refuse_other_data,
    refuse_without_snapshots,
    save_state,
    snapshot_epochs,
    start_again,
    write_checkpoint,
    write_snapshot,
)
from ssat_probe.schedule import classification_weight, learning_rate
from ssat_probe.sharing import share_network
from ssat_probe.table import write_atomically
from ssat_probe.update import refuse_too_small, update
from ssat_probe.workers import sentence_of

Progress = Callable[[int, int, str], None]
"Told after each step: steps done, steps in all, and what is going on."


@keeping_memory()
def train(
    recipe: Recipe,
    out: Path | str = "checkpoints",
    *,
    data_dir: Path | None = None,
    download: bool = False,
    resume: bool = True,
    device: str | None = None,
    tracker: str | None = None,
    workers: int | None = None,
    save_every_s: float = 10.0,
    snapshots: bool = False,
    snapshot_steps: bool = False,
    gradients_every: int = 0,
    pictures_every: int = 0,
    execution: Execution = Execution(),
    supply: Supply = Supply(),
    progress: Progress = lambda done, total, text: None,
) -> Checkpoint:
    """Train a recipe in ``out/<name of the run>``; what is complete is reused, what was interrupted goes on.

    Writes ``<method>.pt`` (the checkpoint), ``pretrain.pt`` (end of the first stage of ssl_ft), ``log.csv`` (a row per
    epoch) and ``cost.json``. While it runs, ``training_state.pt`` holds what resuming needs.

    Args:
        recipe: What to train.
        out: Folder of the runs.
        data_dir: Where the data set lies, if it is not embedded.
        download: Fetch the data set if it is not there.
        resume: Go on with an interrupted run of the same recipe; otherwise take away what it left, whatever its recipe,
            and start again. A finished one is reused.
        device: ``cpu`` to stay on the CPU; by default the fastest device there is.
        tracker: A tracker of accelerate to log to as well: ``tensorboard``, ``wandb``, ...
        workers: Processes that decode images, where these are files and not kept in memory; 2 by default.
        save_every_s: Seconds between two saves of the training state.
        snapshots: Keep checkpoints along the run as well, ``snapshots/<stage>-<epoch>.pt``, closest at its beginning.
        snapshot_steps: The same by steps instead of epochs, ``steps/<stage>-<step>.pt``.
        gradients_every: Compare the gradients of classification and task in every so many steps of ssat, and log their
            cosine and norms; 0 means never. The training stays the same.
        pictures_every: Draw what the decoder makes of some images in every so many epochs; 0 means never.
        execution: How it is carried out, which is no matter for what it computes but for rounding.
        supply: Where the electricity comes from, if ``cost.json`` is to say what it emits.
        progress: Called after each step.

    Returns:
        The checkpoint; a folder that holds a run of another recipe or on other images is a ValueError.

    Raises:
        FloatingPointError: If the loss is not finite; the message names the step and the images, and the last saved
            state stays as it was.
    """
    _check_looks(recipe, gradients_every)
    check_pictures(recipe, pictures_every)
    dataset = open_dataset(recipe.data, data_dir, download, recipe.img_size)
    recipe = resolve(recipe, dataset.facts)
    folder = Path(out) / recipe.name
    path = folder / f"{recipe.method}.pt"
    if path.exists():
        checkpoint = load_checkpoint(path)
        refuse_other(checkpoint.recipe, recipe, path)
        refuse_other_data(checkpoint.facts, dataset.facts, path)
        if snapshots:
            refuse_without_snapshots(recipe, folder)
        if snapshot_steps:
            refuse_without_snapshots(recipe, folder, by_step=True)
        return checkpoint
    if recipe.select_on == "test":
        warnings.warn(
            "select_on test keeps the epoch that is best on the test images, so their accuracy is too good to report "
            "but beside numbers found in the same way, such as the paper's.",
            stacklevel=3,  # of whoever calls: between is what keeps memory
        )
    saved: dict[str, Any] | None
    is_new = not (resume and (folder / STATE_FILE).exists())
    images = images_of(recipe, dataset)
    run = _start(recipe, dataset.facts, images, folder, device, tracker, _num_workers(workers, images[0]), execution,
                 supply, is_new=is_new)  # fmt: skip
    if is_new:
        start_again(run)
        state, saved = State(), None
    else:
        refuse_late_snapshots(recipe, folder, by_epoch=snapshots, by_step=snapshot_steps)
        state, saved = load_state(run)
    if run.accelerator.is_main_process:
        write_atomically(folder / "recipe.json", json.dumps(recipe.as_dict(), indent=2) + "\n")
    stages = list(recipe.stage_epochs.items())
    per_epoch = steps_per_epoch(len(run.train), recipe.batch_size)
    total_steps = per_epoch * sum(recipe.stage_epochs.values())
    last_save = time.monotonic()
    is_scheduled = recipe.lambda_schedule != "constant"
    run.meter.lap()  # what came before is no step's

    while state.stage < len(stages):
        stage, num_epochs = stages[state.stage]
        before = sum(epochs for _, epochs in stages[: state.stage])
        objective, optimiser = _stage(run, stage, saved)
        average = _average(run, saved) if state.stage == len(stages) - 1 else None
        saved = None
        give_back_memory()  # what an earlier stage took and freed is no part of this one's peak
        forget_peak_memory(run.accelerator.device)
        if snapshots and state.epoch == state.step == 0:
            write_snapshot(run, stage, 0)
        if snapshot_steps and state.epoch == state.step == 0:
            write_snapshot(run, stage, 0, step=0)
        step_grid = snapshot_epochs(num_epochs * per_epoch) if snapshot_steps else []
        while state.epoch < num_epochs:
            started = time.monotonic()
            for loaded in _epoch_batches(run, before + state.epoch, state):
                waited = time.monotonic() - started
                position = state.epoch + state.step / per_epoch
                global_step = before * per_epoch + state.epoch * per_epoch + state.step
                rate = learning_rate(recipe, position, num_epochs)
                weight = classification_weight(recipe, position, num_epochs) if is_scheduled else None
                is_looked_at = gradients_every > 0 and global_step % gradients_every == 0
                sums = update(run, objective, optimiser, loaded, global_step, rate,
                              weight=weight, is_looked_at=is_looked_at)  # fmt: skip
                seconds = time.monotonic() - started
                taken = {"seconds": seconds, "data_wait_s": waited, **run.meter.lap()}
                totals = over_processes(run, {**sums, **taken})
                # Of all processes: one that has lost its way stops them all. With a scaler, its steps are skipped.
                if not np.isfinite([totals["loss"], totals["grad_norm"]]).all():
                    raise FloatingPointError(_diverged(run, stage, state, loaded, sums))
                if average is not None:
                    average.update(run.network, state.epoch * per_epoch + state.step + 1)
                for name, value in totals.items():
                    state.sums[name] = state.sums.get(name, 0.0) + value
                state.step += 1
                done = state.epoch * per_epoch + state.step
                if done in step_grid:
                    write_snapshot(run, stage, done / per_epoch, step=done)
                progress(global_step + 1, total_steps, f"{stage} {state.epoch + 1}/{num_epochs}")
                if time.monotonic() - last_save > save_every_s:
                    save_state(run, state, optimiser, average)
                    last_save = time.monotonic()
                started = time.monotonic()
            # Not `rate`: a run that resumes after the last step of an epoch has no step left in it.
            position = state.epoch + (per_epoch - 1) / per_epoch
            last = {"learning_rate": learning_rate(recipe, position, num_epochs)}
            last |= {"lambda_weight": classification_weight(recipe, position, num_epochs)} if is_scheduled else {}
            finish_epoch(run, state, stage, last, average)
            if recipe.selects and state.stage == len(stages) - 1:
                keep_best(run, state, stage)
            if snapshots and state.epoch in snapshot_epochs(num_epochs):
                write_snapshot(run, stage, state.epoch)
            if pictures_every and (state.epoch % pictures_every == 0 or state.epoch == num_epochs):
                write_pictures(run, stage, state.epoch)
            run.meter.lap()  # what is between the steps of two epochs is no step's
            if has_lost_patience(recipe, state, stage):
                break
        if len(stages) > 1 and state.stage == 0:
            write_checkpoint(run, state, stage, folder / f"{stage}.pt")
        state.stage, state.epoch = state.stage + 1, 0
        if average is not None:
            write_checkpoint(run, state, stage, path.with_stem(f"{path.stem}-ema"), average.module)
    checkpoint = write_checkpoint(run, state, stages[-1][0], path)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    run.carbon.end()
    return checkpoint


def plan(recipe: Recipe, data_dir: Path | None = None, download: bool = False) -> tuple[Recipe, Budget]:
    """What a training would do, without training.

    Args:
        recipe: What to train.
        data_dir: Where the data set lies, if it is not embedded.
        download: Fetch the data set if it is not there.

    Returns:
        The resolved recipe and its cost.
    """
    dataset = open_dataset(recipe.data, data_dir, download, recipe.img_size)
    recipe = resolve(recipe, dataset.facts)
    if isinstance(recipe.subset, int):  # then a plan needs no images on disk
        return recipe, budget_of(recipe, dataset.facts, recipe.subset)
    return recipe, budget_of(recipe, dataset.facts, len(images_of(recipe, dataset)[0]))


def images_of(recipe: Recipe, dataset: Dataset) -> tuple[Images, Images]:
    """Images to train on, and those whose accuracy is looked at after each epoch.

    Args:
        recipe: Says whether test images are looked at.
        dataset: Has both.

    Returns:
        Training and validation images; or all training images and the test images.
    """
    subset = recipe.subset, recipe.subset_seed
    if recipe.select_on == "val":
        return split(dataset, "train", *subset), split(dataset, "val")
    return split(dataset, "train", *subset, val_fraction=0), split(dataset, "test")


def _start(
    recipe: Recipe,
    facts: Facts,
    images: tuple[Images, Images],
    folder: Path,
    device: str | None,
    tracker: str | None,
    workers: int,
    execution: Execution,
    supply: Supply,
    *,
    is_new: bool,
) -> Run:
    """Engine and network of a run, which one that goes on fills with its own weights."""
    AcceleratorState._reset_state()  # its settings outlive an Accelerator, and runs of one process may differ
    GradientState._reset_state()
    accelerator = _engine(recipe, device, tracker, folder)
    encoder = build_encoder(recipe, facts, with_pretrained=is_new).to(accelerator.device)
    if recipe.init_from and is_new:
        begin_from(encoder, recipe.init_from, folder / "init.json" if accelerator.is_main_process else None)
    decoder = objectives.behind_encoder(recipe, facts, encoder)
    decoder = decoder.to(accelerator.device) if decoder is not None else None
    budget = budget_of(recipe, facts, len(images[0]))
    cost = {stage.name: stage.training_multiply_adds_per_image for stage in budget.stages}
    meter = Meter(accelerator.device)
    carbon = Carbon(supply, is_first_on_node=accelerator.is_local_main_process, reads_processors=meter.reads_processors)
    is_wish = execution.attention != "auto" and not execution.compile  # which would be of compiled blocks
    attention = Attention(execution.kernel(accelerator.num_processes), must_act=is_wish)
    run = Run(recipe, facts, *images, folder, accelerator, encoder, decoder, workers, cost, execution, attention, meter,
              carbon)  # fmt: skip
    prepare(run.network, execution, accelerator.device)
    refuse_too_small(run)
    if accelerator.num_processes > 1:
        share_network(run.network)
    return run


def _engine(recipe: Recipe, device: str | None, tracker: str | None, folder: Path) -> Accelerator:
    """Accelerate on the device asked for, with the tracker asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".log_with=.* was passed but no supported trackers")  # refused below
        accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(recipe.precision, recipe.precision),
            cpu=device == "cpu" or not torch.accelerator.is_available(),  # else processes would not find each other
            log_with=tracker,
            project_dir=str(folder) if tracker else None,
            # The head has no gradient in pre-training, nor the decoder in fine-tuning.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    if recipe.precision == "fp16" and accelerator.scaler is None:
        # Accelerate leaves fp16 on a CPU at fp32 without a word, where torch has all that it needs.
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler(accelerator.device.type)
    if device and not str(accelerator.device).startswith(device):
        raise ValueError(f"device must be one that is here, got {device!r}; use cpu, or leave it out.")
    if tracker and not accelerator.log_with:
        raise ValueError(f"tracker must be one that is installed here, got {tracker!r}; install it with pip.")
    if tracker:
        try:
            accelerator.init_trackers(recipe.name, config={k: str(v) for k, v in recipe.as_dict().items()})
        except Exception as error:  # of any kind: nobody is logged in, no server is there, no folder may be written
            raise ValueError(
                f"tracker must be ready to log to, got {tracker} which says: {sentence_of(error)}; set it up, or leave "
                "it out (log.csv has the same)."
            ) from error
    return accelerator


def _check_looks(recipe: Recipe, every: int) -> None:
    """Refuse to compare the gradients of two terms where there is one."""
    if every < 0:
        raise ValueError(f"gradients_every must be at least 0, got {every}; 0 means never.")
    if every and (recipe.method != "ssat" or not recipe.has_task or max(recipe.lambda_ends) == 0):
        raise ValueError(
            f"gradients_every must be 0 where there is one loss, got {every} for method {recipe.method} with "
            f"lambda_weight {recipe.lambda_weight:g}; leave it out."
        )


def _num_workers(asked: int | None, images: Images) -> int:
    """Processes that decode images; refused where there is nothing to decode."""
    if asked is not None and (asked < 0 or images.in_memory):
        raise ValueError(
            f"workers must be left out where images are kept in memory, and never negative, got {asked}; leave it out."
        )
    return 2 if asked is None else asked


def _stage(run: Run, stage: str, saved: dict[str, Any] | None) -> tuple[nn.Module, Any]:
    """Objective and optimiser of a stage, ready for the engine."""
    name = objectives.name_of(run.recipe, stage)
    objective = registry.load("objectives", name).Objective(run.recipe, run.encoder, run.decoder)
    objective, optimiser = run.accelerator.prepare(objective, build_optimiser(objective, run.recipe))
    if saved is not None:
        optimiser.load_state_dict(saved["optimiser"])
        if run.accelerator.scaler is not None:
            run.accelerator.scaler.load_state_dict(saved["scaler"])
    objective.train()
    run.attention.unsettle()
    return objective, optimiser


def _average(run: Run, saved: dict[str, Any] | None) -> ModelEmaV3 | None:
    """Moving average of the weights, if the recipe asks for one; it starts as a plain average (warm-up of timm)."""
    if run.recipe.ema_decay is None:
        return None
    average = ModelEmaV3(run.network, run.recipe.ema_decay, use_warmup=True)
    if saved is not None:
        average.module.load_state_dict(saved["average"])
    return average


def _epoch_batches(run: Run, epoch: int, state: State) -> Any:
    """What is left of this process's share of the epoch's batches."""
    order = epoch_order(len(run.train), run.recipe.seed, epoch, run.recipe.repeats)
    size = min(run.recipe.batch_size, len(order))
    lists = [order[i * size : (i + 1) * size] for i in range(steps_per_epoch(len(order), size))]
    mine = slice(run.accelerator.process_index, None, run.accelerator.num_processes)
    return batches(run.train, [ids[mine] for ids in lists[state.step :]], run.workers)


def _diverged(run: Run, stage: str, state: State, loaded: LoadedBatch, sums: dict[str, float]) -> str:
    """The sentence that says where, and what is left."""
    step = f"stage {stage}, epoch {state.epoch + 1}, step {state.step + 1}"
    ids = loaded[2].tolist()
    shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    said = f"The loss must be finite, got nan or infinity in another process in {step}"
    for name, what in (("grad_norm", "length of the gradient"), ("loss", "loss")):
        if not np.isfinite(sums[name]):
            said = f"The {what} must be finite, got {sums[name]} in {step} (training images {shown})"
    kept = (
        f"the last saved state in {run.folder} is intact" if (run.folder / STATE_FILE).exists() else "nothing is kept"
    )
    return f"{said}; {kept}: lower base_lr, set clip_grad, or use precision fp32, in another folder (--out)."
