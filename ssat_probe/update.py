"""One step of the optimiser: augment, mask, backward, step."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssat_probe.augmentation import augment, augment_and_keep
from ssat_probe.execution import recomputing, reproducible
from ssat_probe.images import normalise
from ssat_probe.loading import LoadedBatch
from ssat_probe.losses import Losses
from ssat_probe.measures.agreement import gradient_agreement
from ssat_probe.optimisation import set_rate
from ssat_probe.recipe import Recipe
from ssat_probe.run import Run
from ssat_probe.sharing import Share, shared, summed


def update(
    run: Run,
    objective: nn.Module,
    optimiser: Any,
    loaded: LoadedBatch,
    global_step: int,
    rate: float,
    *,
    weight: float | None = None,
    is_looked_at: bool = False,
) -> dict[str, float]:
    """Make one step of the optimiser.

    Args:
        run: Whose network.
        objective: Of the stage, as the engine prepared it.
        optimiser: Of the stage.
        loaded: This process's images of the batch.
        global_step: Steps done before it, over all stages.
        rate: Learning rate.
        weight: λ, where a schedule says it.
        is_looked_at: Compare the gradients of classification and task first, on the first part of the batch.

    Returns:
        Sums over this process's images, the number of steps, and the gradient norm; of a step that was looked at also
        the cosine between both gradients and their norms.
    """
    pixels, labels, _ = loaded
    # All processes draw the same for the whole batch, and use what is of their images; so do drop paths and mixup.
    seed = _seed_of(run.recipe, global_step)
    generator = torch.Generator().manual_seed(seed)
    share = _share(run)
    pixels, clean = augment_and_keep(pixels, run.recipe.augmentation, run.facts, generator, share)
    noise = share.of(torch.rand(share.total, run.encoder.num_tokens, generator=generator))
    plain: Any = run.accelerator.unwrap_model(objective)
    others = None
    if plain.num_views == 2:  # of a task that reconstructs, the second one is its target
        others = clean
        if not run.recipe.reconstructs:
            others = augment(loaded[0], run.recipe.augmentation, run.facts, generator, share)
    set_rate(optimiser, rate)
    if weight is not None:
        plain.weight = weight
    device = run.accelerator.device
    parts = share.parts(run.recipe.accumulate)
    sums = {"images": 0.0, "loss": 0.0}

    def inputs(part: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        images = _placed(pixels[part], run)
        views = {} if others is None else {"other": _placed(others[part], run)}
        return (images, labels[part].to(device), noise[part]), views

    if is_looked_at:
        rows, part = parts[0]
        first, views = inputs(rows)
        with _seeded(seed, device), shared(part), run.accelerator.autocast():
            sums |= _agreement(plain, first, views, part.weight)
    execution = run.execution
    with (
        reproducible(execution.deterministic),
        recomputing(run.network, execution.checkpointing),
        _seeded(seed, device),
    ):
        for rows, part in parts:
            arguments, views = inputs(rows)
            is_last = rows is parts[-1][0]
            with shared(part):
                with (
                    nullcontext() if is_last else run.accelerator.no_sync(objective),
                    run.accelerator.autocast(),
                    run.attention.step(),
                ):
                    losses = objective(*arguments, **views)
                # Gradients are averaged over the processes, which may hold a different number of images.
                run.accelerator.backward(losses.total * (len(rows) * share.step / share.total))
            for name, value in _sums(losses, arguments[1]).items():
                sums[name] = sums.get(name, 0.0) + value
    norm = run.accelerator.clip_grad_norm_(objective.parameters(), run.recipe.clip_grad or float("inf"))
    optimiser.step()
    optimiser.zero_grad()
    if hasattr(plain, "after_step"):
        plain.after_step()
    if run.accelerator.scaler is None:
        return {**sums, "steps": 1.0, "grad_norm": float(norm)}
    # A gradient that overflowed, the scale being too large. A fused optimiser skips it itself, unseen by the engine.
    was_skipped = not math.isfinite(float(norm))
    made = {"steps": 0.0, "grad_norm": 0.0} if was_skipped else {"steps": 1.0, "grad_norm": float(norm)}
    return {**sums, **made, "skipped_steps": float(was_skipped)}


def refuse_too_small(run: Run) -> None:
    """Refuse batches of which a process would get no image, or whose parts hold too few to learn from.

    Args:
        run: With its processes.

    Raises:
        ValueError: If there are such.
    """
    share = _share(run)
    least = min(part.total for _, part in share.parts(run.recipe.accumulate))
    got = f"got parts of {least} (batch_size {share.total}, accumulate {run.recipe.accumulate})"
    if least < share.step:
        raise ValueError(
            f"batch_size must give each process an image of every part of a batch, {got} for {share.step} processes; "
            "use fewer processes."
        )
    needs_two = "batch_size must leave two images in every part of a batch"
    if least < 2 and run.recipe.has_task and run.recipe.task == "contrastive":
        raise ValueError(
            f"{needs_two} for task contrastive, whose negatives are other images, {got}; use more images at once."
        )
    if least < getattr(run.encoder, "least_images", 1):
        raise ValueError(
            f"{needs_two} for the batch norms of {run.recipe.model}, which see one place of an image of this size, "
            f"{got}; use more images at once, or a larger img_size."
        )


def _share(run: Run) -> Share:
    """This process's images of every batch."""
    total = min(run.recipe.batch_size, len(run.train))
    return Share(run.accelerator.process_index, run.accelerator.num_processes, total)


def _placed(pixels: Tensor, run: Run) -> Tensor:
    """Images as the network takes them, where it is."""
    images = normalise(pixels.to(run.accelerator.device), run.facts)
    return images.contiguous(memory_format=torch.channels_last) if run.execution.channels_last else images


def _agreement(
    objective: Any, arguments: tuple[Tensor, ...], views: dict[str, Tensor], weight: float
) -> dict[str, float]:
    """Cosine and norms of the gradients of both terms; the objective is left as it was."""
    buffers = [(buffer, buffer.clone()) for buffer in objective.buffers()]  # running statistics move in a forward pass
    classified, own = objective.terms(*arguments, **views)
    found = gradient_agreement(classified.total * weight, own.total * weight, objective.parameters(), summed)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    names = ("gradient_cosine", "classification_grad_norm", "task_grad_norm")
    return {**dict(zip(names, found, strict=True)), "looks": 1.0}


def _seed_of(recipe: Recipe, global_step: int) -> int:
    return int(np.random.SeedSequence([recipe.seed, global_step]).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What a network draws itself depends on the step alone; the global generators are left as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _sums(losses: Losses, labels: Tensor) -> dict[str, float]:
    """Loss terms summed over the images of a batch, and the number of correct predictions."""
    num = len(labels)
    sums = {"images": float(num), "loss": float(losses.total.detach()) * num}
    for name in ("cross_entropy", "reconstruction", "auxiliary"):
        if (value := getattr(losses, name)) is not None:
            sums[name] = float(value) * num
    if losses.logits is not None:
        sums["correct"] = float((losses.logits.argmax(dim=1) == labels).sum())
    return sums
