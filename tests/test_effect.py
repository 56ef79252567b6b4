"""Options that change nothing are named."""

from typing import Any

import pytest

from ssat_probe.effect import refuse_idle, without_effect
from ssat_probe.recipe import Recipe


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"method": "scratch", "mask_ratio": 0.5, "lambda_weight": 0.2}, {"mask_ratio", "lambda_weight"}),
        ({"method": "scratch", "decoder_depth": 1, "pretrain_epochs": 3}, {"decoder_depth", "pretrain_epochs"}),
        ({"method": "ssat", "budget": "equal_epochs"}, {"budget"}),
        ({"method": "ssat", "lambda_weight": 1.0, "norm_pix": True}, {"norm_pix"}),
        ({"method": "ssat", "lambda_weight": 0.0, "label_smoothing": 0.2}, {"label_smoothing"}),
        ({"method": "ssl_ft", "pretrain_epochs": 3, "budget": "equal_epochs", "lambda_weight": 0.3},
         {"budget", "lambda_weight"}),
        ({"method": "ssl_ft", "mask_ratio": 0.5, "pretrain_epochs": 3, "schedule": "constant", "min_lr": 1e-5},
         {"min_lr"}),
        ({"method": "ssat", "mask_ratio": 0.5, "lambda_weight": 0.2, "decoder_width": 32, "min_lr": 0.0}, set()),
        ({"method": "ssl_ft", "mask_ratio": 0.5, "decoder_heads": 2, "label_smoothing": 0.0}, set()),
    ],
)  # fmt: skip
def test_options_that_change_nothing_are_named_with_the_reason(fields: dict[str, Any], named: set[str]) -> None:
    found = without_effect(Recipe(**fields))
    assert found.keys() == named
    assert all(found.values())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"task": "dino", "norm_pix": True, "mask_ratio": 0.5}, {"norm_pix", "mask_ratio"}),
        ({"task": "dino", "cls_view": "masked", "mask_ratio": 0.5}, set()),
        ({"task": "simmim", "decoder_depth": 1, "reconstruction_loss": "l1"}, {"decoder_depth", "reconstruction_loss"}),
        ({"task": "simmim", "norm_pix": True, "mask_ratio": 0.5}, set()),
        ({"decoder": "simmim", "model": "swin_nano", "decoder_depth": 1, "decoder_width": 8, "decoder_heads": 3},
         {"decoder_depth", "decoder_width", "decoder_heads"}),
        ({"decoder": "simmim", "model": "swin_nano", "reconstruction_loss": "l1", "norm_pix": True}, set()),
        ({"method": "scratch", "task": "simmim"}, {"task"}),
        ({"method": "ssl_ft", "cls_view": "masked"}, {"cls_view"}),
        ({"lambda_weight": 0.0, "cls_view": "masked"}, {"cls_view"}),
        ({"reconstruction_loss": "l1"}, set()),
        ({"reconstruction_target": "clean", "augmentation": "strong"}, set()),
        ({"reconstruction_target": "clean", "augmentation": "strong", "task": "simmim"}, set()),
        ({"reconstruction_target": "clean", "augmentation": "standard"}, {"reconstruction_target"}),
        ({"reconstruction_target": "clean", "augmentation": "strong", "task": "dino"}, {"reconstruction_target"}),
        ({"reconstruction_target": "clean", "augmentation": "strong", "method": "scratch"}, {"reconstruction_target"}),
        ({"subset_seed": 3}, {"subset_seed"}),
        ({"masked_convolutions": True}, {"masked_convolutions"}),
        ({"masked_convolutions": True, "model": "cvt_nano"}, set()),
        ({"masked_convolutions": True, "model": "cvt_nano", "method": "scratch"}, {"masked_convolutions"}),
        ({"subset_seed": 3, "subset": 30}, set()),
    ],
)  # fmt: skip
def test_options_that_a_task_does_not_look_at_are_named(fields: dict[str, Any], named: set[str]) -> None:
    assert without_effect(Recipe(**fields)).keys() == named


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"method": "scratch", "lambda_schedule": "linear", "lambda_end": 0.5}, {"lambda_schedule", "lambda_end"}),
        ({"method": "ssl_ft", "lambda_schedule": "linear"}, {"lambda_schedule"}),
        ({"lambda_schedule": "linear", "lambda_end": 0.5, "lambda_weight": 0.0, "mixup": 0.8}, set()),
        ({"lambda_schedule": "cosine", "lambda_end": 0.0, "lambda_weight": 1.0, "decoder_depth": 3}, set()),
        ({"lambda_schedule": "linear", "lambda_end": 0.1}, set()),
        ({"lambda_weight": 0.0, "select": "best"}, {"select"}),
        ({"method": "ssl_ft", "select": "best", "init_from": "a.pt"}, set()),
        ({"lambda_weight": 0.0, "select_on": "test", "patience": 3}, {"select_on", "patience"}),
        ({"select_on": "test", "select": "best", "patience": 3}, {"select"}),
        ({"select_on": "test", "patience": 3, "repeats": 2}, set()),
    ],
)
def test_a_schedule_between_weights_has_both_terms(fields: dict[str, Any], named: set[str]) -> None:
    assert without_effect(Recipe(**fields)).keys() == named


@pytest.mark.parametrize(
    ("words", "fields", "sentence"),
    [
        (["--method", "scratch", "--lambda-weight", "0.1"], {"method": "scratch"}, "--lambda-weight must have an effe"),
        (["--mask_ratio=0.75", "--method=scratch"], {"method": "scratch"}, "--mask-ratio must have an effect"),
        (["--subset-seed", "0"], {}, "--subset-seed must have an effect, got one that has none: all images are used"),
        (["--select-on", "test", "--select", "last"], {"select_on": "test"}, "--select must have an effect"),
        ([], {"method": "scratch", "mask_ratio": 0.5}, "--mask-ratio must have an effect"),
        (
            [],
            {"lambda_schedule": "linear", "lambda_end": 0.1},
            "--lambda-end must have an effect, .* λ ends where it beg",
        ),
    ],
)
def test_an_option_that_is_typed_counts_even_at_its_default(
    words: list[str], fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        refuse_idle(Recipe(**fields), words)


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ([], {"method": "scratch", "lambda_weight": 0.1}),
        (["--mask-ratio", "0.75", "--lambda-weight", "0.1", "--method", "ssat", "--device", "cpu"], {}),
        (["--subset-seed", "0", "--subset", "30"], {"subset": 30}),
    ],
)
def test_options_that_act_and_defaults_of_a_file_are_taken(words: list[str], fields: dict[str, Any]) -> None:
    refuse_idle(Recipe(**fields), words)
