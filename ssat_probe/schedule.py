"""Learning rate as a function of the epoch."""

import math

from ssat_probe.recipe import Recipe


def learning_rate(recipe: Recipe, epoch: float, num_epochs: int) -> float:
    """Learning rate of a step.

    Linear from 0 over the warm-up, then half a cosine from the peak to ``min_lr``, or constant.

    Args:
        recipe: Gives peak, end, warm-up and shape; a warm-up longer than half of the stage ends there.
        epoch: Epochs done when the step begins, a fraction within an epoch.
        num_epochs: Epochs of the stage.

    Returns:
        The learning rate, at least 0.

    References:
        Loshchilov & Hutter (2017), Eq. 5, after the linear warm-up of Goyal et al. (2017), Sec. 2.2, per step as in the
        official code of Das et al. (2024).
    """
    warmup = min(recipe.warmup_epochs, num_epochs / 2)
    peak = recipe.learning_rate
    if epoch < warmup:
        return peak * epoch / warmup
    if recipe.schedule == "constant":
        return peak
    share = (epoch - warmup) / (num_epochs - warmup)
    return recipe.min_lr + (peak - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
