"""End of an epoch: a look at the validation images, the log's row, and what the epoch has cost."""

import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn

from ssat_probe.images import Facts, Images, normalise
from ssat_probe.loading import batches
from ssat_probe.meter import peak_memory_bytes
from ssat_probe.recipe import Recipe
from ssat_probe.run import Run, State
from ssat_probe.workers import sentence_of

LOOKS = ("gradient_cosine", "classification_grad_norm", "task_grad_norm")
"What a look at the gradients of both terms gives; the log has its mean over the steps looked at in an epoch."

SHARED = {"seconds", "data_wait_s", "steps", "grad_norm", "skipped_steps", "looks", *LOOKS, "energy_j"}
"What each process goes through whole, and energy, of which each reads the counters of the whole machine."


def evaluate(
    encoder: nn.Module,
    images: Images,
    facts: Facts,
    device: torch.device | str,
    ids: Sequence[int] | np.ndarray | None = None,
    workers: int = 0,
) -> tuple[int, float]:
    """Correct predictions and summed cross-entropy over images; the encoder is left as it was found.

    Args:
        encoder: Gives logits.
        images: What to look at.
        facts: How to normalise.
        device: Where the encoder is.
        ids: Positions to look at; all by default.
        workers: Processes that decode images, where images are files.

    Returns:
        Number of images whose largest logit is their class, and the sum of the losses in nats.
    """
    was_training = encoder.training
    encoder.eval()
    positions = np.arange(len(images)) if ids is None else np.asarray(ids)
    correct, loss = 0, 0.0
    parts = [positions[i : i + 256] for i in range(0, len(positions), 256)]
    with torch.no_grad():
        for pixels, labels, _ in batches(images, parts, workers):
            logits = encoder(normalise(pixels.to(device), facts))
            logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            labels = labels.to(device)
            correct += int((logits.argmax(dim=1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    encoder.train(was_training)
    return correct, loss


def finish_epoch(run: Run, state: State, stage: str, last: dict[str, float], average: ModelEmaV3 | None) -> None:
    """Evaluate, write the log's row, and start the next epoch's sums.

    Args:
        run: Whose network.
        state: How far it is; is moved on.
        stage: That is going on.
        last: What the last step of the epoch was made with, by its name in the log.
        average: Moving average of the weights, if there is one.
    """
    started = time.monotonic()
    mine = np.arange(run.accelerator.process_index, len(run.val), run.accelerator.num_processes)
    name: str = run.recipe.select_on
    encoders = {name: run.encoder} | ({f"ema_{name}": average.module["encoder"]} if average is not None else {})
    counts = [float("nan")] * 2 * len(encoders)
    done = state.epoch + 1
    if stage != "pretrain" and (done % run.recipe.eval_every == 0 or done == run.recipe.stage_epochs[stage]):
        device = run.accelerator.device
        looks = [evaluate(one, run.val, run.facts, device, mine, run.workers) for one in encoders.values()]
        counts = [float(number) for look in looks for number in look]
    nan, sums = float("nan"), state.sums
    processor_s = sums.get("processor_s", nan) / run.accelerator.num_processes
    mine_emitted = run.carbon.lap(processor_s, sums.get("energy_j", nan))
    values = _summed(run, [*counts, *mine_emitted.values()])
    emitted = dict(zip(mine_emitted, values[len(counts) :], strict=True))
    num, seconds = sums["images"], sums["seconds"]
    row = {
        "stage": stage,
        "epoch": state.epoch + 1,
        "loss": sums["loss"] / num,
        "cross_entropy": sums.get("cross_entropy", nan) / num,
        "reconstruction": sums.get("reconstruction", nan) / num,
        **({"auxiliary": sums["auxiliary"] / num} if "auxiliary" in sums else {}),
        **last,
        "grad_norm": sums["grad_norm"] / sums["steps"] if sums["steps"] else nan,
        **({"skipped_steps": sums["skipped_steps"]} if "skipped_steps" in sums else {}),
        **{name: sums[name] / sums["looks"] for name in LOOKS if "looks" in sums},
        "train_accuracy": sums.get("correct", nan) / num,
        **{
            f"{name}_{what}": values[2 * place + number] / len(run.val)
            for place, name in enumerate(encoders)
            for number, what in enumerate(("accuracy", "cross_entropy"))
        },
        "seconds": seconds,
        "images_per_s": num / seconds,
        "data_wait_s": sums["data_wait_s"],
    }
    state.rows.append(row)
    spent: dict[str, float] = {"images": num, "train_s": seconds, "data_wait_s": sums["data_wait_s"]}
    spent |= {"evaluation_s": time.monotonic() - started, "processor_s": sums.get("processor_s", nan)}
    energy = sums.get("energy_j", nan)
    spent |= {} if np.isnan(energy) else {"energy_j": energy}
    spent |= emitted
    _charge(run, state, stage, spent)
    state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
    if run.accelerator.trackers:
        try:
            run.accelerator.log({k: v for k, v in row.items() if k != "stage"}, step=len(state.rows))
        except Exception as error:  # of any kind: a server that went away is no reason to end a training
            warnings.warn(
                f"The tracker did not take epoch {row['epoch']} of stage {stage} and says: {sentence_of(error)}; "
                "log.csv has it.",
                stacklevel=2,
            )


def over_processes(run: Run, sums: dict[str, float]) -> dict[str, float]:
    """What a step has come to in all processes together, the same in each, so that any of them can be gone on from.

    Args:
        run: With its processes.
        sums: Of a step in this process.

    Returns:
        Sums over the processes of what belongs to images; means of what all of them go through, such as seconds.
    """
    processes = run.accelerator.num_processes
    if processes == 1:
        return sums
    names = sorted(sums)
    totals = dict(zip(names, _summed(run, [sums[name] for name in names]), strict=True))
    return {name: value / processes if name in SHARED else value for name, value in totals.items()}


def _summed(run: Run, values: Sequence[float]) -> list[float]:
    """Each number's sum over all processes."""
    dtype = torch.float32 if run.accelerator.device.type == "mps" else torch.float64
    return run.accelerator.reduce(torch.tensor(values, dtype=dtype).to(run.accelerator.device), "sum").tolist()


def has_lost_patience(recipe: Recipe, state: State, stage: str) -> bool:
    """Whether a stage has gone on for too long without a better accuracy.

    Args:
        recipe: Says how long that is.
        state: Its log.
        stage: That is going on.

    Returns:
        True if the best of all looks lies ``patience`` looks or more in the past; the first of equals is the best.
    """
    if recipe.patience is None or stage == "pretrain":
        return False
    found = [row[f"{recipe.select_on}_accuracy"] for row in state.rows if row["stage"] == stage]
    looks = [accuracy for accuracy in found if not np.isnan(accuracy)]
    return bool(looks) and len(looks) - 1 - looks.index(max(looks)) >= recipe.patience


def _charge(run: Run, state: State, stage: str, spent: dict[str, float]) -> None:
    """Add an epoch to what the stage has cost."""
    cost = state.cost.setdefault(stage, {})
    for name, value in spent.items():
        cost[name] = cost.get(name, 0.0) + value
    cost["multiply_adds"] = cost["images"] * run.multiply_adds_per_image[stage]
    cost |= run.carbon.record
    cost["attention"] = cost.get("attention", {}) | state.used | run.attention.used  # before an interruption, and since
    state.used = {}
    cost["peak_memory_bytes"] = max(cost.get("peak_memory_bytes", 0), peak_memory_bytes(run.accelerator.device))
