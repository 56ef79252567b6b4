import math
from typing import Any

import pytest
import torch

from ssat_probe.recipe import Recipe
from ssat_probe.schedule import classification_weight, edge_of_stability, learning_rate

PEAK, END, EPOCHS, PER_EPOCH = 2e-3, 1e-6, 100, 97
OFFICIAL = Recipe(base_lr=1e-3, batch_size=512, epochs=EPOCHS, warmup_epochs=5, min_lr=END)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (1, PEAK / (5 * PER_EPOCH)),
        (2.5 * PER_EPOCH, PEAK / 2),
        (5 * PER_EPOCH - 1, PEAK * (1 - 1 / (5 * PER_EPOCH))),
        (5 * PER_EPOCH, PEAK),
        (52.5 * PER_EPOCH, (PEAK + END) / 2),
        ((5 + 95 / 3) * PER_EPOCH, END + (PEAK - END) * 0.75),  # cos(π/3) = 1/2
        ((5 + 95 * 2 / 3) * PER_EPOCH, END + (PEAK - END) * 0.25),
        (EPOCHS * PER_EPOCH - 1, END + (PEAK - END) * math.sin(math.pi / 2 / 95 / PER_EPOCH) ** 2),
        (EPOCHS * PER_EPOCH, END),
    ],
)
def test_rates_of_the_official_recipe_at_each_step(step: float, rate: float) -> None:
    assert learning_rate(OFFICIAL, step / PER_EPOCH, EPOCHS) == pytest.approx(rate, rel=1e-9, abs=1e-18)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(Recipe(base_lr=1e-3, batch_size=512, warmup_epochs=0), 0, EPOCHS) == pytest.approx(PEAK)


def test_a_constant_schedule_stays_at_the_peak() -> None:
    recipe = Recipe(base_lr=1e-3, batch_size=512, warmup_epochs=5, schedule="constant")
    assert learning_rate(recipe, 2.5, EPOCHS) == pytest.approx(PEAK / 2)
    assert [learning_rate(recipe, epoch, EPOCHS) for epoch in (5, 50, 99.9)] == pytest.approx([PEAK] * 3)


def test_wsd_stays_at_the_peak_until_the_last_fifth_and_then_falls_with_the_root() -> None:
    recipe = Recipe(base_lr=1e-3, batch_size=512, warmup_epochs=5, schedule="wsd", min_lr=END)
    assert learning_rate(recipe, 2.5, EPOCHS) == pytest.approx(PEAK / 2)
    assert [learning_rate(recipe, epoch, EPOCHS) for epoch in (5, 37, 80)] == pytest.approx([PEAK] * 3)
    assert learning_rate(recipe, 85, EPOCHS) == pytest.approx((PEAK + END) / 2)  # √(1/4) = 1/2
    assert learning_rate(recipe, EPOCHS, EPOCHS) == pytest.approx(END)
    assert learning_rate(recipe, 0.5, 1) == pytest.approx(PEAK)  # the warm-up ends at half of the only epoch


@pytest.mark.parametrize("num_epochs", [1, 4, 10])
def test_a_warm_up_longer_than_half_of_the_stage_ends_there(num_epochs: int) -> None:
    recipe = Recipe(base_lr=1e-3, batch_size=512, warmup_epochs=7)
    assert learning_rate(recipe, num_epochs / 4, num_epochs) == pytest.approx(PEAK / 2)
    assert learning_rate(recipe, num_epochs / 2, num_epochs) == pytest.approx(PEAK)
    assert learning_rate(recipe, num_epochs, num_epochs) == pytest.approx(recipe.min_lr)


def test_the_rate_rises_to_the_peak_and_falls_from_it() -> None:
    rates = [learning_rate(OFFICIAL, step / PER_EPOCH, EPOCHS) for step in range(EPOCHS * PER_EPOCH + 1)]
    top = rates.index(max(rates))
    assert top == 5 * PER_EPOCH
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


GENTLE: dict[str, Any] = {
    "optimiser": "sgd",
    "augmentation": "none",
    "label_smoothing": 0.0,
    "weight_decay": 0.0,
    "method": "scratch",
}
GENTLE |= {"base_lr": 0.02, "lr_rule": "none", "warmup_epochs": 2, "epochs": 12, "min_lr": 1e-3}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_descent_on_a_quadratic_grows_beyond_the_edge_and_shrinks_below_it(momentum: float, schedule: Any) -> None:
    recipe = Recipe(**GENTLE | {"momentum": momentum, "schedule": schedule})
    epoch = 7.0
    edge, rate = edge_of_stability(recipe, "train", epoch), learning_rate(recipe, epoch, 12)
    assert edge == pytest.approx(2 * (1 + momentum) / rate)
    for share, grows in ((0.99, False), (1.01, True)):
        weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        optimiser = torch.optim.SGD([weight], lr=rate, momentum=momentum)
        for _ in range(3000):
            weight.grad = share * edge * weight.detach()
            optimiser.step()
        assert (abs(float(weight.detach())) > 1) is grows


@pytest.mark.parametrize(
    "change",
    [
        {"optimiser": "adamw"}, {"clip_grad": 1.0}, {"layer_decay": 0.9}, {"label_smoothing": 0.1}, {"mixup": 0.8},
        {"cutmix": 1.0}, {"drop_path": 0.1}, {"augmentation": "crop"}, {"weight_decay": 0.05}, {"method": "ssat"},
    ],
)  # fmt: skip
def test_no_edge_where_steps_or_loss_are_others(change: dict[str, Any]) -> None:
    assert edge_of_stability(Recipe(**GENTLE), "train", 7) == pytest.approx(2 / learning_rate(Recipe(**GENTLE), 7, 12))
    assert edge_of_stability(Recipe(**GENTLE | change), "train", 7) is None


def test_the_edge_is_of_the_loss_that_is_minimised() -> None:
    crop, decay = Recipe(**GENTLE | {"augmentation": "crop"}), Recipe(**GENTLE | {"weight_decay": 0.05})
    assert edge_of_stability(crop, "train", 7, is_augmented=True) is not None
    assert edge_of_stability(decay, "train", 7, has_l2=True) is not None
    tuned = Recipe(**GENTLE | {"method": "ssl_ft"})
    assert edge_of_stability(tuned, "finetune", 7) is not None
    assert edge_of_stability(tuned, "pretrain", 7) is None
    assert edge_of_stability(Recipe(**GENTLE), "train-ema", 12) is None
    assert edge_of_stability(Recipe(**GENTLE), "train", 0) is None  # the warm-up begins with no step at all


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", [0.1] * 4),
        ("linear", [0.1, 0.1 + 0.8 / 4, 0.5, 0.1 + 0.8 * 0.75]),
        ("cosine", [0.1, 0.5 - 0.4 * math.sqrt(0.5), 0.5, 0.5 + 0.4 * math.sqrt(0.5)]),
    ],
)
def test_weight_of_classification_goes_from_its_beginning_to_its_end(schedule: Any, values: list[float]) -> None:
    recipe = Recipe(lambda_schedule=schedule, lambda_end=None if schedule == "constant" else 0.9)
    got = [classification_weight(recipe, epoch, 8) for epoch in (0, 2, 4, 6)]
    assert got == pytest.approx(values, rel=1e-14)
    assert classification_weight(recipe, 8, 8) == pytest.approx(recipe.lambda_ends[1])
