"""Learning rate as a function of the epoch, the curvature that it bears, and the weight of classification."""

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


def edge_of_stability(
    recipe: Recipe, stage: str, epoch: float, *, is_augmented: bool = False, has_l2: bool = False
) -> float | None:
    """Curvature above which gradient descent at the rate of the step that comes next oscillates and grows.

    2 (1 + momentum) / learning rate, for the largest eigenvalue of the Hessian of the very loss that is minimised, here
    the cross-entropy. With steps from parts of the images curvature settles below it. AdamW's own bound is one of the
    Hessian preconditioned by its second moments (Cohen et al., 2022, https://arxiv.org/abs/2207.14484), so it has none
    here; pre-training and SSAT minimise other losses.

    Args:
        recipe: Of the training.
        stage: Of the checkpoint.
        epoch: Epochs of the stage that are done.
        is_augmented: Whether curvature is that of images changed as in training.
        has_l2: Whether it is that of the loss with the weight decay as an L2 term.

    Returns:
        In units of the loss per squared parameter unit; None where no such bound holds: another optimiser, loss or
        stage, or steps that are clipped, of different rates, or of no length.

    References:
        Cohen et al. (2021), https://arxiv.org/abs/2103.00065, Sec. 2: 2/η, and (2 + 2β)/η for heavy ball.
    """
    descends = recipe.optimiser == "sgd" and recipe.clip_grad is None and recipe.layer_decay == 1
    classifies = stage in recipe.stage_epochs and stage == ("finetune" if recipe.method == "ssl_ft" else "train")
    is_smooth = recipe.label_smoothing == recipe.mixup == recipe.cutmix == recipe.drop_path == 0
    is_same = (recipe.augmentation == "none" or is_augmented) and (recipe.weight_decay == 0 or has_l2)
    if not (descends and classifies and recipe.method != "ssat" and is_smooth and is_same):
        return None
    rate = learning_rate(recipe, epoch, recipe.stage_epochs[stage])
    return 2 * (1 + recipe.momentum) / rate if rate else None


def classification_weight(recipe: Recipe, epoch: float, num_epochs: int) -> float:
    """λ of a step of ssat.

    Args:
        recipe: Gives its beginning, its end and the way between them: a line, or half a cosine.
        epoch: Epochs done when the step begins, a fraction within an epoch.
        num_epochs: Epochs of the training.

    Returns:
        In [0, 1].
    """
    begin, end = recipe.lambda_ends
    share = epoch / num_epochs
    if recipe.lambda_schedule == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return begin + (end - begin) * share
