"""What is looked at after an epoch, and what follows from it."""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType

from ssat_probe.checkpoint import Checkpoint, load_checkpoint
from ssat_probe.data import open_dataset
from ssat_probe.epoch import evaluate, has_lost_patience
from ssat_probe.images import normalise, split
from ssat_probe.recipe import Recipe
from ssat_probe.run import State
from ssat_probe.training import images_of, train


def tiny(method: str = "scratch", **fields: Any) -> Recipe:
    options = {"subset": 230, "batch_size": 70, "epochs": 6, "warmup_epochs": 0.5, "base_lr": 0.3} | fields
    return Recipe(method=method, **options)  # type: ignore[arg-type]


def log_of(checkpoint: Checkpoint) -> pd.DataFrame:
    return pd.read_csv(checkpoint.path.parent / "log.csv")


def test_evaluation_counts_and_sums_over_images_and_leaves_the_mode(checkpoints: dict[str, Path]) -> None:
    checkpoint = load_checkpoint(checkpoints["scratch"])
    images, encoder = split(open_dataset("digits"), "test"), checkpoint.encoder()
    assert len(images) > 256  # more than one batch
    correct, loss = evaluate(encoder, images, checkpoint.facts, "cpu")
    assert encoder.training
    with torch.no_grad():
        logits = encoder.eval()(normalise(images.read(range(len(images))), checkpoint.facts)).double()
    labels = torch.from_numpy(images.labels)
    assert correct == int((logits.argmax(1) == labels).sum())
    expected = float((logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).sum())
    assert loss == pytest.approx(expected, rel=1e-6)
    evaluate(encoder, images, checkpoint.facts, "cpu", [3, 5])
    assert not encoder.training
    assert evaluate(encoder, images, checkpoint.facts, "cpu", [3, 5])[0] <= 2


def test_selection_on_test_trains_on_all_images_looks_at_test_and_warns(tmp_path: Path) -> None:
    dataset = open_dataset("digits")
    recipe = tiny("ssl_ft", select_on="test", subset=None, batch_size=650, epochs=3)
    with pytest.warns(UserWarning, match="select_on test keeps the epoch that is best on the test images, so their ac"):
        kept = train(recipe, tmp_path, device="cpu")
    train_images, looked_at = images_of(kept.recipe, dataset)
    assert len(train_images) == len(dataset.images("train")) == 1300  # of which 130 would be for validation
    assert looked_at.fingerprint() == split(dataset, "test").fingerprint()
    log = log_of(kept)
    assert not [name for name in log.columns if name.startswith("val_")]
    found = log.loc[log["stage"] == "finetune", "test_accuracy"].to_numpy()
    assert kept.epoch == found.argmax() + 1
    correct, _ = evaluate(kept.encoder(), looked_at, kept.facts, "cpu")
    assert correct / len(looked_at) == pytest.approx(found.max())


def test_without_being_asked_no_test_image_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset("digits")
    read, images = [], type(dataset).images

    def noted(self: Any, name: str) -> Any:
        read.append(name)
        return images(self, name)

    monkeypatch.setattr(type(dataset), "images", noted)
    train(tiny(select="best", patience=1, epochs=2), tmp_path, device="cpu")
    assert set(read) == {"train"}


@pytest.mark.parametrize(
    ("accuracies", "patience", "is_lost"),
    [
        ([0.1], 1, False),
        ([0.1, 0.2, 0.2], 1, True),  # the first of equals is the best
        ([0.1, 0.2, 0.2], 2, False),
        ([0.5, 0.2, 0.4], 2, True),
        ([0.5, float("nan"), 0.4], 2, False),  # epochs without a look do not count
        ([float("nan")], 1, False),
        ([0.5, 0.4, 0.3, 0.6], 3, False),
        ([0.5, 0.4, 0.3], None, False),
    ],
)
def test_patience_counts_looks_since_the_best(accuracies: list[float], patience: int | None, *, is_lost: bool) -> None:
    rows = [{"stage": "pretrain", "val_accuracy": float("nan")}] * 9
    state = State(rows=[*rows, *({"stage": "finetune", "val_accuracy": one} for one in accuracies)])
    recipe = Recipe(method="ssl_ft", patience=patience)
    assert has_lost_patience(recipe, state, "finetune") == is_lost
    assert not has_lost_patience(recipe, state, "pretrain")


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_run_that_ends_early_is_the_beginning_of_the_whole_one(tmp_path: Path, select: Any) -> None:
    # A constant rate, so that the planned length is no matter; far too high a one, so that nothing gets better.
    fields: dict[str, Any] = {"schedule": "constant", "base_lr": 3.0, "epochs": 12, "seed": 1}
    whole = train(tiny(**fields), tmp_path / "whole", device="cpu", snapshots=True)
    early = train(tiny(patience=2, select=select, **fields), tmp_path / "early", device="cpu", snapshots=True)
    log, full = log_of(early), log_of(whole)
    num, found = len(log), full["val_accuracy"].to_numpy()
    assert num < 12
    assert num - 1 - found[:num].argmax() == 2
    np.testing.assert_array_equal(log["val_accuracy"], found[:num])
    np.testing.assert_array_equal(log["loss"], full["loss"][:num])
    assert early.epoch == (num if select == "last" else num - 2)
    same = load_checkpoint(whole.path.parent / "snapshots" / f"train-{early.epoch:05d}.pt")
    assert all(torch.equal(same.state[name], early.state[name]) for name in same.state)
    assert train(tiny(patience=2, select=select, **fields), tmp_path / "early", device="cpu", snapshots=True).hash == (
        early.hash
    )


def test_tensorboard_is_told_what_the_log_says(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(tiny(), tmp_path, device="cpu", tracker="tensorboard")
    (events,) = [path for path in run.path.parent.rglob("events.out*") if path.parent.name == run.recipe.name]
    told = EventAccumulator(str(events.parent)).Reload()
    log = log_of(run)
    for name in ("loss", "val_accuracy", "learning_rate", "grad_norm"):
        assert [one.step for one in told.Scalars(name)] == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose([one.value for one in told.Scalars(name)], log[name], rtol=1e-6)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> MagicMock:
    """A module that notes every call, in the place of a tracker's that is not installed."""
    module = MagicMock()
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType(name)])
    return module


def assert_told(checkpoint: Checkpoint, config: dict[str, str], calls: list[Any]) -> None:
    """What a tracker was told: the recipe, and a row of the log after each epoch."""
    assert config == {name: str(value) for name, value in checkpoint.recipe.as_dict().items()}
    assert [call.kwargs["step"] for call in calls] == [1, 2, 3, 4, 5, 6]
    log = log_of(checkpoint).drop(columns="stage")
    told = pd.DataFrame([call.args[0] for call in calls])
    pd.testing.assert_frame_equal(told[log.columns], log, check_dtype=False, rtol=1e-6)


def test_wandb_is_told_the_recipe_and_what_the_log_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = stand_in(monkeypatch, "wandb")
    checkpoint = train(tiny(), tmp_path, device="cpu", tracker="wandb")
    wandb.init.assert_called_once_with(project=checkpoint.recipe.name)
    started = wandb.init.return_value
    assert_told(checkpoint, wandb.config.update.call_args.args[0], started.log.call_args_list)
    started.finish.assert_called_once_with()


def test_a_tracker_that_cannot_start_is_named_and_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = stand_in(monkeypatch, "wandb")
    wandb.init.side_effect = OSError("No API key configured. Use `wandb login` to log in.")
    sentence = r"tracker must be ready to log to, got wandb which says: No API key .* to log in; set it up, or leave it"
    with pytest.raises(ValueError, match=sentence):
        train(tiny(), tmp_path, device="cpu", tracker="wandb")
    assert not list(tmp_path.rglob("*.*"))


def test_a_tracker_that_goes_away_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = stand_in(monkeypatch, "wandb")
    wandb.init.return_value.log.side_effect = [None, ConnectionError("server is gone"), *[None] * 4]
    with pytest.warns(UserWarning, match=r"did not take epoch 2 of stage train and says: server is gone; log.csv has"):
        followed = train(tiny(), tmp_path / "followed", device="cpu", tracker="wandb")
    assert len(log_of(followed)) == 6
    assert followed.hash == train(tiny(), tmp_path / "alone", device="cpu").hash


def test_mlflow_is_told_the_recipe_and_what_the_log_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = stand_in(monkeypatch, "mlflow")
    mlflow.search_experiments.return_value = []
    mlflow.utils.validation.MAX_PARAM_VAL_LENGTH, mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH = 6000, 7
    checkpoint = train(tiny(), tmp_path, device="cpu", tracker="mlflow")
    assert mlflow.create_experiment.call_args.kwargs["name"] == checkpoint.recipe.name
    config: dict[str, str] = {}
    for call in mlflow.log_params.call_args_list:
        config |= call.args[0]
    assert_told(checkpoint, config, mlflow.log_metrics.call_args_list)
    mlflow.end_run.assert_called_once_with()
