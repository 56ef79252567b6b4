import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssat_probe.recipe import Recipe

SUBSET = "subset must be a share between 0 and 1, or a count of at least 2 (all images: leave it out)"


def test_defaults_are_those_of_the_paper() -> None:
    recipe = Recipe()
    assert (recipe.lambda_weight, recipe.mask_ratio, recipe.norm_pix) == (0.1, 0.75, False)
    assert (recipe.base_lr, recipe.min_lr, recipe.warmup_epochs, recipe.epochs) == (1e-3, 1e-6, 5, 100)
    assert (recipe.betas, recipe.weight_decay, recipe.label_smoothing) == ((0.9, 0.999), 0.05, 0.1)


@pytest.mark.parametrize(
    ("rule", "batch_size", "rate"),
    [("linear", 512, 2e-3), ("linear", 256, 1e-3), ("linear", 64, 2.5e-4), ("none", 512, 1e-3)],
)
def test_peak_learning_rate_grows_with_the_batch_under_the_linear_rule(rule: Any, batch_size: int, rate: float) -> None:
    assert Recipe(base_lr=1e-3, lr_rule=rule, batch_size=batch_size).learning_rate == pytest.approx(rate, rel=1e-15)


@pytest.mark.parametrize(
    ("fields", "stages"),
    [
        ({"method": "scratch", "epochs": 13}, {"train": 13}),
        ({"method": "ssat", "epochs": 13, "pretrain_epochs": 7}, {"train": 13}),
        ({"method": "ssl_ft", "epochs": 13}, {"pretrain": 13, "finetune": 13}),
        ({"method": "ssl_ft", "epochs": 13, "budget": "equal_epochs"}, {"pretrain": 6, "finetune": 7}),
        ({"method": "ssl_ft", "epochs": 13, "pretrain_epochs": 7}, {"pretrain": 7, "finetune": 13}),
    ],
)
def test_stages_follow_method_and_budget(fields: dict[str, Any], stages: dict[str, int]) -> None:
    assert Recipe(**fields).stage_epochs == stages
    assert list(Recipe(**fields).stage_epochs) == list(stages)


@given(
    st.builds(
        Recipe,
        method=st.sampled_from(["scratch", "ssl_ft", "ssat"]),
        subset=st.one_of(st.none(), st.integers(2, 10**6), st.floats(0.001, 0.999)),
        img_size=st.sampled_from([(), 28, (28,), (24, 32), [24, 32]]),
        lambda_weight=st.floats(0, 1),
        betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        clip_grad=st.one_of(st.none(), st.floats(1e-3, 10)),
    )
)
def test_a_recipe_survives_a_trip_through_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe


def test_one_number_stands_for_both_sides_of_an_image() -> None:
    assert Recipe(img_size=28, patch_size=(7,)).img_size == (28, 28)  # type: ignore[arg-type]
    assert Recipe(patch_size=(7,)).patch_size == (7, 7)
    assert Recipe(img_size=(24, 32)).img_size == (24, 32)


def test_the_name_says_model_data_method_and_seed() -> None:
    assert Recipe(model="vit_tiny", data="cifar10", method="scratch", seed=3).name == "vit_tiny-cifar10-scratch-seed3"
    assert Recipe(model="timm:resnet", seed=3).name == "timm_resnet-digits-ssat-seed3"


def test_a_whole_number_from_the_command_line_is_a_count_of_images() -> None:
    assert Recipe(subset=500.0).subset == 500
    assert isinstance(Recipe(subset=500.0).subset, int)
    assert Recipe(subset=0.5).subset == 0.5


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("field", dataclasses.fields(Recipe), ids=lambda field: field.name)
def test_no_field_takes_a_value_of_no_type_it_could_have(field: dataclasses.Field[Any]) -> None:
    with pytest.raises(ValueError, match=rf"{field.name} must be .*, got .*object"):
        Recipe(**{field.name: object()})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"lambda_weight": -0.1}, "lambda_weight must be between 0 and 1, got -0.1."),
        ({"lambda_weight": 1.1}, "lambda_weight must be between 0 and 1, got 1.1."),
        ({"lambda_weight": float("nan")}, "lambda_weight must be between 0 and 1, got nan."),
        ({"mask_ratio": 0.0}, "mask_ratio must be between 0 and 1, both excluded, got 0.0."),
        ({"mask_ratio": 1}, "mask_ratio must be between 0 and 1, both excluded, got 1."),
        ({"subset": 0}, f"{SUBSET}, got 0."),
        ({"subset": -3}, f"{SUBSET}, got -3."),
        ({"subset": 1.5}, f"{SUBSET}, got 1.5."),
        ({"subset": 1.0}, f"{SUBSET}, got 1."),  # not all of them, nor one
        ({"subset": 1}, f"{SUBSET}, got 1."),
        ({"min_lr": 0.1}, "min_lr must be at most 0.00025, the peak, from which the learning rate falls, got 0.1."),
        ({"subset": True}, "subset must be float or int or none, got True."),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0."),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers in [0, 1), got (0.9, 1.0)."),
        ({"betas": ("a", 0.9)}, "betas must be two numbers in [0, 1), got ('a', 0.9)."),
        ({"betas": 0.9}, "betas must be two numbers in [0, 1), got 0.9."),
        ({"betas": (0.9,)}, "betas must be two numbers in [0, 1), got (0.9,)."),
        ({"epochs": 0}, "epochs must be at least 1, got 0."),
        ({"epochs": 1.5}, "epochs must be int, got 1.5."),
        ({"epochs": "ten"}, "epochs must be int, got 'ten'."),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0."),
        ({"batch_size": 10, "accumulate": 3}, "accumulate must be a divisor of batch_size 10, got 3."),
        ({"patience": 0}, "patience must be at least 1, got 0."),
        ({"repeats": 0}, "repeats must be at least 1, got 0."),
        ({"repeats": 3, "batch_size": 8}, "repeats must be a divisor of batch_size 8, got 3."),
        ({"repeats": 2, "augmentation": "none"}, "repeats must be 1 with augmentation none, got 2."),
        ({"repeats": 2, "task": "contrastive"},
         "repeats must be 1 with task contrastive, whose negatives are other images, got 2."),
        ({"pretrain_epochs": 0}, "pretrain_epochs must be at least 1, got 0."),
        ({"decoder_depth": 0}, "decoder_depth must be at least 1, got 0."),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0."),
        ({"warmup_epochs": -1.0}, "warmup_epochs must be at least 0, got -1.0."),
        ({"seed": -1}, "seed must be at least 0, got -1."),
        ({"seed": 2**64}, "seed must be below 2^63 - 1, got 18446744073709551616."),
        ({"base_lr": 0.0}, "base_lr must be above 0, got 0.0."),
        ({"base_lr": float("inf")}, "base_lr must be a finite number, got inf."),
        ({"clip_grad": 0.0}, "clip_grad must be above 0, got 0.0."),
        ({"norm_pix": 1}, "norm_pix must be bool, got 1."),
        ({"optimiser": "sdg"}, "No 'sdg' in optimiser: adamw, sgd. Did you mean 'sgd'?"),
        ({"optimiser": "sgd", "momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0."),
        ({"optimiser": "sgd", "momentum": -0.1}, "momentum must be at least 0 and below 1, got -0.1."),
        ({"lambda_end": 0.5}, "lambda_end must be left out with lambda_schedule constant, got 0.5."),
        ({"lambda_schedule": "cosine"}, "lambda_end must be given with lambda_schedule cosine, got None."),
        ({"lambda_schedule": "linear", "lambda_end": 1.5}, "lambda_end must be between 0 and 1, got 1.5."),
        ({"momentum": 0.9}, "momentum must be 0 with optimiser adamw, whose averages are betas, got 0.9."),
        ({"optimiser": "sgd", "betas": (0.9, 0.95)},
         "betas must be left out with optimiser sgd, which has momentum instead, got (0.9, 0.95)."),
        ({"img_size": (8, 0)}, "img_size must be one or two positive whole numbers (height width), got (8, 0)."),
        ({"patch_size": (2,) * 3}, "patch_size must be one or two positive whole numbers (height width), "
         "got (2, 2, 2)."),
        ({"img_size": 2.5}, "img_size must be one or two positive whole numbers (height width), got 2.5."),
        ({"method": "sat"}, "No 'sat' in method: scratch, ssl_ft, ssat. Did you mean 'ssat'?"),
        ({"method": 3}, "method must be one of scratch, ssl_ft, ssat, got 3."),
        ({"method": "ssl_ft", "budget": "equal_epochs", "epochs": 1}, "epochs must be at least 2 to be halved, got 1."),
    ],
)  # fmt: skip
def test_what_no_run_can_use_is_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        Recipe(**fields)


def test_an_unknown_key_names_the_source_and_the_nearest_key() -> None:
    sentence = r"No 'lamda_weight' in the keys of a recipe \(a\.yaml\): method, .*\. Did you mean 'lambda_weight'\?$"
    with pytest.raises(ValueError, match=sentence):
        Recipe.from_dict({"lamda_weight": 0.3}, source="a.yaml")


def test_options_of_later_versions_are_part_of_the_identity_only_when_set() -> None:
    names = [field.name for field in dataclasses.fields(Recipe)]
    later = names[names.index("precision") + 1 :]
    assert list(Recipe(seed=3).identity) == names[: names.index("precision") + 1]
    assert Recipe(seed=3).identity == {k: v for k, v in Recipe(seed=3).as_dict().items() if k not in later}
    changed = Recipe(ema_decay=0.9)
    assert changed.identity == Recipe().identity | {"ema_decay": 0.9}


@pytest.mark.parametrize(
    "fields", [{"ema_decay": 1.0}, {"ema_decay": -0.1}, {"layer_decay": 0.0}, {"layer_decay": 1.1}, {"drop_path": 1.0}]
)
def test_shares_outside_their_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(fields))} must be "):
        Recipe(**fields)


@pytest.mark.parametrize("task", ["contrastive", "dino"])
def test_two_views_must_differ(task: Any) -> None:
    sentence = f"augmentation must be crop, standard or strong for task {task}, which compares two views, got 'none'"
    with pytest.raises(ValueError, match=sentence):
        Recipe(task=task, augmentation="none")
    assert Recipe(task=task, augmentation="none", method="scratch").has_task is False


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"img_size": (10**9, 8)}, r"img_size must be at most 16384 pixels high and wide, got \(1000000000, 8\)"),
        ({"decoder_depth": 10**6}, "decoder_depth must be at most 256, got 1000000"),
    ],
)
def test_sizes_that_no_network_has_are_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Recipe(**fields)
