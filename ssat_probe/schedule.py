"""Learning rate as a function of the epoch."""

import math

from ssat_probe.recipe import Recipe

DECAY = 0.2
"Share of a stage in which wsd falls: Hägele et al. (2024), Sec. 3, find 10 to 20 % as good as a cosine."


def learning_rate(recipe: Recipe, epoch: float, num_epochs: int) -> float:
    """Learning rate of a step.

    Linear from 0 over the warm-up, then half a cosine from the peak to ``min_lr``, or constant, or constant until the
    last fifth of the stage and then down to ``min_lr`` as 1 - √share (``wsd``).

    Args:
        recipe: Gives peak, end, warm-up and shape; a warm-up longer than half of the stage ends there.
        epoch: Epochs done when the step begins, a fraction within an epoch.
        num_epochs: Epochs of the stage.

    Returns:
        The learning rate, at least 0.

    References:
        Loshchilov & Hutter (2017), Eq. 5, after the linear warm-up of Goyal et al. (2017), Sec. 2.2, per step as in the
        official code of Das et al. (2024); Hägele et al. (2024), https://arxiv.org/abs/2405.18392, Eq. 2, for wsd.
    """
    warmup = min(recipe.warmup_epochs, num_epochs / 2)
    peak = recipe.learning_rate
    if epoch < warmup:
        return peak * epoch / warmup
    if recipe.schedule == "constant":
        return peak
    if recipe.schedule == "wsd":
        begin = max(warmup, (1 - DECAY) * num_epochs)
        share = max(0.0, (epoch - begin) / (num_epochs - begin))
        return recipe.min_lr + (peak - recipe.min_lr) * (1 - math.sqrt(share))
    share = (epoch - warmup) / (num_epochs - warmup)
    return recipe.min_lr + (peak - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
