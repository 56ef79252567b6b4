"""Effect: which options of a recipe change nothing in the configuration they were given for."""

import dataclasses
from collections.abc import Collection, Sequence

from ssat_probe import registry
from ssat_probe.recipe import Recipe


def refuse_idle(recipe: Recipe, words: Sequence[str]) -> None:
    """Refuse options of the command line that change nothing in this configuration.

    Args:
        recipe: As the user gave it, not resolved.
        words: Of the command line. An option that stands there counts though its value be the default; one in a YAML
            file does not, which may be a whole recipe.

    Raises:
        ValueError: If there is one.
    """
    typed = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    idle = without_effect(recipe, typed)
    if recipe.method == "ssat" and recipe.lambda_end == recipe.lambda_weight:  # a sweep may have it as one end
        idle["lambda_end"] = "λ ends where it begins"
    for option, why in idle.items():
        raise ValueError(
            f"--{option.replace('_', '-')} must have an effect, got one that has none: {why}; leave it out."
        )


def without_effect(recipe: Recipe, typed: Collection[str] = ()) -> dict[str, str]:
    """Options that were given and change nothing in this configuration.

    Args:
        recipe: As the user gave it, not resolved: what is not the default was given.
        typed: Options that were given even where they are at their default.

    Returns:
        Why each of them has no effect, by its name.
    """
    predicts = recipe.has_task and recipe.reconstructs
    classifies = recipe.method != "ssat" or max(recipe.lambda_ends) > 0
    lone = f"method {recipe.method}" + (
        f" with lambda_weight {recipe.lambda_weight:g}" if recipe.method == "ssat" else ""
    )
    reasons = {
        "lambda_weight": "" if recipe.method == "ssat" else f"method {recipe.method} has one loss at a time",
        "lambda_schedule": "" if recipe.method == "ssat" else f"method {recipe.method} has one loss at a time",
        "lambda_end": "" if recipe.method == "ssat" else f"method {recipe.method} has one loss at a time",
        "select": "" if classifies else f"{lone} does not classify",
        "select_on": "" if classifies else f"{lone} does not classify",
        "patience": "" if classifies else f"{lone} does not classify",
        "pretrain_epochs": "" if recipe.method == "ssl_ft" else f"method {recipe.method} has no pre-training",
        "budget": "" if recipe.method == "ssl_ft" else f"method {recipe.method} has one stage",
        "label_smoothing": "" if classifies else f"{lone} does not classify",
        "mixup": "" if classifies else f"{lone} does not classify",
        "cutmix": "" if classifies else f"{lone} does not classify",
        "task": "" if recipe.has_task else f"{lone} has no task",
        "cls_view": "" if recipe.method == "ssat" and classifies else f"{lone} classifies full images or none",
        "min_lr": "" if recipe.schedule != "constant" else "schedule constant never falls",
    }
    why = lone if not recipe.has_task else f"task {recipe.task}"
    decoding = ("decoder", "decoder_depth", "decoder_width", "decoder_heads", "norm_pix", "reconstruction_loss",
                "reconstruction_target")  # fmt: skip
    reasons |= dict.fromkeys(decoding, "" if predicts else f"{why} masks nothing")
    reasons["mask_ratio"] = "" if recipe.masks else f"{why} masks nothing"
    if predicts and recipe.task == "simmim":
        own = "task simmim has its own linear decoder and absolute errors"
        reasons |= dict.fromkeys([name for name in decoding if name not in ("norm_pix", "reconstruction_target")], own)
    elif predicts and recipe.decoder == "simmim":
        reasons |= dict.fromkeys(
            ("decoder_depth", "decoder_width", "decoder_heads"), "decoder simmim is one linear map"
        )
    if predicts and recipe.augmentation != "strong":
        reasons["reconstruction_target"] = f"augmentation {recipe.augmentation} has neither colours nor noise"
    reasons["masked_convolutions"] = "" if recipe.masks else f"{why} masks nothing"
    if registry.variants("models").get(recipe.model) != "cvt":
        reasons["masked_convolutions"] = f"model {recipe.model} has no convolutions but its patch embedding"
    if recipe.subset is None:
        reasons["subset_seed"] = "all images are used"
    if recipe.select_on == "test":
        reasons["select"] = "select_on test says it"
    if recipe.method == "ssl_ft" and recipe.pretrain_epochs is not None:
        reasons["budget"] = "pretrain_epochs says it"
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    given = {name for name, default in defaults.items() if getattr(recipe, name) != default or name in typed}
    return {name: why for name, why in reasons.items() if why and name in given}
