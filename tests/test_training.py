"""The loop: resuming bit by bit, refusing, stopping, counting; on digits, in seconds."""

import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from ssat_probe import images as images_module
from ssat_probe import training
from ssat_probe.checkpoint import Checkpoint, load_checkpoint, load_tensors, save_tensors
from ssat_probe.data import open_dataset
from ssat_probe.images import split
from ssat_probe.loading import batches, epoch_order
from ssat_probe.meter import POWERCAP, PROCESS, peak_memory_bytes
from ssat_probe.network import build_encoder
from ssat_probe.recipe import Recipe
from ssat_probe.training import evaluate, plan, train

METHODS = ("scratch", "ssl_ft", "ssat")
TIMINGS = ["seconds", "images_per_s", "data_wait_s"]


class Stop(Exception):  # noqa: N818
    """Somebody pulled the plug."""


def tiny(method: str = "ssat", **fields: Any) -> Recipe:
    options = {"subset": 23, "batch_size": 7, "epochs": 2, "warmup_epochs": 0.5, "base_lr": 1e-2} | fields
    return Recipe(method=method, **options)  # type: ignore[arg-type]


def stop_after(steps: int) -> Callable[[int, int, str], None]:
    """Progress that raises when it is told of one step more."""
    seen = []

    def progress(done: int, total: int, text: str) -> None:
        seen.append(done)
        if len(seen) > steps:
            raise Stop(text)

    return progress


def log_of(checkpoint: Checkpoint) -> pd.DataFrame:
    return pd.read_csv(checkpoint.path.parent / "log.csv")


def assert_same_run(one: Checkpoint, other: Checkpoint) -> None:
    """The same weights to the last bit, and the same log but for timings."""
    assert one.hash == load_checkpoint(one.path).hash
    assert load_checkpoint(one.path).hash == load_checkpoint(other.path).hash
    pd.testing.assert_frame_equal(
        log_of(one).drop(columns=TIMINGS), log_of(other).drop(columns=TIMINGS), check_exact=True
    )
    costs = [json.loads((run.path.parent / "cost.json").read_text()) for run in (one, other)]
    assert [{stage: cost["images"] for stage, cost in run.items()} for run in costs][::-1] == [
        {stage: cost["images"] for stage, cost in run.items()} for run in costs
    ]
    if one.recipe.method == "ssl_ft":
        first, second = (load_checkpoint(run.path.parent / "pretrain.pt") for run in (one, other))
        assert first.hash == second.hash


# Resuming


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_dies_in_every_step_ends_as_one_that_never_did(tmp_path: Path, method: str) -> None:
    options = {"ema_decay": 0.9, "drop_path": 0.3, "layer_decay": 0.8, "schedule": "wsd", "cutmix": 1.0}
    options |= {"mixup": 0.8}
    recipe = tiny(method, augmentation="strong", clip_grad=1.0, **options)
    whole = train(recipe, tmp_path / "whole", device="cpu")
    folder, deaths = tmp_path / "dying", 0
    for _ in range(30):
        try:
            died = train(recipe, folder, device="cpu", save_every_s=-1, progress=stop_after(1))
            break
        except Stop:
            deaths += 1
    # Each attempt keeps one step, and the step before each end of an epoch is kept before the epoch is closed.
    assert deaths == 3 * 2 * (2 if method == "ssl_ft" else 1) - 1
    assert_same_run(died, whole)
    averages = [load_checkpoint(run.path.with_stem(f"{method}-ema")) for run in (died, whole)]
    assert averages[0].hash == averages[1].hash != whole.hash
    assert not (folder / recipe.name / "training_state.pt").exists()


def test_momentum_survives_a_death_in_every_step(tmp_path: Path) -> None:
    recipe = tiny("scratch", optimiser="sgd", momentum=0.9)
    whole, deaths = train(recipe, tmp_path / "whole", device="cpu"), 0
    while deaths < 6:
        with suppress(Stop):
            died = train(recipe, tmp_path / "dying", device="cpu", save_every_s=-1, progress=stop_after(1))
            break
        deaths += 1
    assert deaths == 3 * 2 - 1
    assert_same_run(died, whole)
    assert train(tiny("scratch", optimiser="sgd"), tmp_path / "plain", device="cpu").hash != whole.hash


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
def test_a_run_that_lost_steps_since_its_last_save_repeats_them(tmp_path: Path, steps: int) -> None:
    recipe = tiny("ssl_ft", accumulate=7)
    whole = train(recipe, tmp_path / "whole", device="cpu")
    with pytest.raises(Stop):
        train(recipe, tmp_path / "dying", device="cpu", save_every_s=-1, progress=stop_after(2))
    with pytest.raises(Stop):
        train(recipe, tmp_path / "dying", device="cpu", save_every_s=1e9, progress=stop_after(steps))
    assert_same_run(train(recipe, tmp_path / "dying", device="cpu"), whole)


KILLED = """
import os, sys
from pathlib import Path
from ssat_probe.recipe import Recipe
from ssat_probe.training import train
folder = Path(sys.argv[1])
for method in ("scratch", "ssl_ft", "ssat"):
    if not (pid := os.fork()):
        train(Recipe(method=method, subset=23, batch_size=7, epochs=5, base_lr=1e-2), folder, device="cpu",
              save_every_s=0)
        os._exit(0)
    print(method, pid, flush=True)
for _ in range(3):
    os.wait()
"""


def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path: Path) -> None:
    delays = {method: 0.8 * random.random() for method in METHODS}  # new moments each time
    (tmp_path / "delays.json").write_text(json.dumps(delays))  # kept if the test fails
    recipes = {method: tiny(method, epochs=5, warmup_epochs=5.0) for method in METHODS}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed")],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        pids = {method: int(pid) for method, pid in (process.stdout.readline().split() for _ in METHODS)}
        begun: dict[str, float] = {}
        while pids:
            time.sleep(0.003)
            for method in list(pids):
                if any((tmp_path / "killed" / recipes[method].name).glob("*.pt")):
                    begun.setdefault(method, time.monotonic())
                if time.monotonic() > begun.get(method, float("inf")) + delays[method]:
                    with suppress(ProcessLookupError):  # it was faster
                        os.kill(pids[method], signal.SIGKILL)
                    del pids[method]
    for recipe in recipes.values():
        whole = train(recipe, tmp_path / "whole", device="cpu")
        assert_same_run(train(recipe, tmp_path / "killed", device="cpu"), whole)


KILLED_TWENTY_TIMES = """
import json, os, random, signal, sys, time
from pathlib import Path
from ssat_probe.recipe import Recipe
from ssat_probe.training import train
folder, recipe = Path(sys.argv[1]), Recipe.from_dict(json.loads(sys.argv[2]))
kills = 0
while kills < 20:
    ear, mouth = os.pipe()
    if not (pid := os.fork()):
        train(recipe, folder, device="cpu", save_every_s=0, progress=lambda *news: os.write(mouth, b"."))
        os._exit(0)
    os.read(ear, 1)  # it is at work
    time.sleep(0.3 * random.random())
    if os.waitpid(pid, os.WNOHANG)[0]:
        sys.exit(f"the run was over after {kills} kills; make it longer")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ear), os.close(mouth)
    kills += 1
print(kills)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_twenty_times_ends_as_one_that_was_not(tmp_path: Path, method: str) -> None:
    recipe = tiny(method, epochs=200, warmup_epochs=5.0, augmentation="strong", ema_decay=0.9, eval_every=50)
    folder, described = tmp_path / "killed", json.dumps(recipe.as_dict())
    words = [sys.executable, "-c", KILLED_TWENTY_TIMES, str(folder), described]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout.strip() == "20", done.stderr
    state = load_tensors(folder / recipe.name / "training_state.pt", "a state")["state"]
    assert (state["stage"], state["epoch"]) > (0, 1)  # it got on between the kills
    assert_same_run(train(recipe, folder, device="cpu"), train(recipe, tmp_path / "whole", device="cpu"))


def test_a_finished_run_is_reused(tmp_path: Path) -> None:
    recipe = tiny()
    first = train(recipe, tmp_path, device="cpu")
    files = {path: path.stat().st_mtime_ns for path in first.path.parent.iterdir()}
    again = train(recipe, tmp_path, device="cpu", progress=stop_after(0))
    assert again.hash == first.hash
    assert {path: path.stat().st_mtime_ns for path in first.path.parent.iterdir()} == files
    assert {path.name for path in files} == {"ssat.pt", "log.csv", "cost.json", "recipe.json"}


def test_workers_read_files_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("scratch", model="vit_pico", data="folder", subset=None)
    mine = folder_of(tmp_path / "mine", ("cat", "dog"), 0)
    kept = train(recipe, tmp_path / "kept", data_dir=mine, device="cpu")
    with pytest.raises(ValueError, match=r"workers must be left out where images are kept in memory, .* got 1; leave"):
        train(recipe, tmp_path / "a", data_dir=mine, device="cpu", workers=1)
    monkeypatch.setattr(images_module, "IN_MEMORY_BYTES", 0)
    asked: list[int] = []
    monkeypatch.setattr(training, "batches", lambda *some: asked.append(some[2]) or batches(*some))
    assert train(recipe, tmp_path / "b", data_dir=mine, device="cpu", workers=1).hash == kept.hash
    assert set(asked) == {1}
    with pytest.raises(ValueError, match="and never negative, got -1"):
        train(recipe, tmp_path / "c", data_dir=mine, device="cpu", workers=-1)


def test_what_has_no_classes_cannot_be_trained_on(tmp_path: Path) -> None:
    mine = folder_of(tmp_path, ("cat", "dog"), 0)
    with pytest.raises(ValueError, match="data must have classes to train on, got 'unlabelled', which has none"):
        train(tiny("scratch", data="unlabelled", subset=None), tmp_path / "out", data_dir=mine, device="cpu")


@pytest.mark.parametrize("is_finished", [True, False])
def test_another_recipe_in_the_same_folder_is_refused_and_nothing_is_touched(
    tmp_path: Path, *, is_finished: bool
) -> None:
    recipe = tiny()
    if is_finished:
        train(recipe, tmp_path, device="cpu")
    else:
        with pytest.raises(Stop):
            train(recipe, tmp_path, device="cpu", save_every_s=-1, progress=stop_after(2))
    folder = tmp_path / recipe.name
    before = {path: path.read_bytes() for path in folder.iterdir()}
    sentence = "must be of the recipe that is asked for, got one with mask_ratio 0.75 instead of 0.5; choose another"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        train(tiny(mask_ratio=0.5), tmp_path, device="cpu")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert json.loads((folder / "recipe.json").read_text())["mask_ratio"] == 0.75


def test_an_interrupted_run_can_be_started_again(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tiny(mask_ratio=0.5), tmp_path / "a", device="cpu", save_every_s=-1, progress=stop_after(4))
    again = train(tiny(), tmp_path / "a", device="cpu", resume=False)
    assert_same_run(again, train(tiny(), tmp_path / "b", device="cpu"))


def test_nothing_of_a_run_that_is_started_again_stands_beside_the_new_one(tmp_path: Path) -> None:
    recipe = tiny(epochs=5, select="best")
    with pytest.raises(Stop):
        train(
            recipe,
            tmp_path,
            device="cpu",
            save_every_s=-1,
            progress=stop_after(14),
            snapshots=True,
            snapshot_steps=True,
        )
    folder = tmp_path / recipe.name
    assert {"snapshots", "steps", "training_state.pt", "best.pt"} <= {path.name for path in folder.iterdir()}
    with pytest.raises(Stop):
        train(tiny(epochs=4), tmp_path, device="cpu", resume=False, progress=stop_after(2))
    assert [path.name for path in folder.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize(
    ("option", "missing"), [("snapshots", "snapshots/train-00000"), ("snapshot_steps", "steps/train-00000")]
)
def test_snapshots_cannot_begin_in_the_middle(tmp_path: Path, option: str, missing: str) -> None:
    with pytest.raises(Stop):
        train(tiny(), tmp_path, device="cpu", save_every_s=-1, progress=stop_after(4))
    sentence = (
        rf"{missing}\d*\.pt must be there for --{option.replace('_', '-')}, got an interrupted run that was begun"
    )
    with pytest.raises(ValueError, match=sentence):
        train(tiny(), tmp_path, device="cpu", **{option: True})
    train(tiny(), tmp_path, device="cpu")


def folder_of(root: Path, classes: tuple[str, str], level: int) -> Path:
    """A few grey pictures of two classes."""
    for number, place in enumerate(f"{part}/{name}" for part in ("train", "test") for name in classes):
        (root / place).mkdir(parents=True)
        for i in range(8):
            pixels = np.full((8, 8), level + 5 * i + number, dtype=np.uint8)
            Image.fromarray(pixels).save(root / place / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            ("ant", "bee"),
            "must be of the images that are there now, got one of images with classes cat, dog instead of",
        ),
        (("cat", "dog"), "must be of the images that are there now, got one of images with mean 0.0"),
    ],
)
def test_a_finished_run_on_other_images_is_not_taken_for_this_one(
    tmp_path: Path, other: tuple[str, str], sentence: str
) -> None:
    recipe = tiny("scratch", model="vit_pico", data="folder", subset=None)
    mine = folder_of(tmp_path / "mine", ("cat", "dog"), 0)
    first = train(recipe, tmp_path / "out", data_dir=mine, device="cpu")
    assert train(recipe, tmp_path / "out", data_dir=mine, device="cpu").hash == first.hash
    theirs = folder_of(tmp_path / "theirs", other, 100)
    with pytest.raises(ValueError, match=sentence):
        train(recipe, tmp_path / "out", data_dir=theirs, device="cpu")


def test_a_state_made_from_other_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tiny(), tmp_path, device="cpu", save_every_s=-1, progress=stop_after(2))
    path = tmp_path / tiny().name / "training_state.pt"
    save_tensors(load_tensors(path, "a state") | {"images": "0" * 64}, path)
    with pytest.raises(ValueError, match=r"training_state\.pt must have been made from the images of data 'digits'"):
        train(tiny(), tmp_path, device="cpu")


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    path = tmp_path / tiny().name / "training_state.pt"
    path.parent.mkdir()
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(
        ValueError, match=r"training_state\.pt must be the state of an interrupted training, got 16 bytes"
    ):
        train(tiny(), tmp_path, device="cpu")


# Stopping


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_images_and_the_state_intact(tmp_path: Path) -> None:
    recipe = tiny("scratch", base_lr=1e30, lr_rule="none", warmup_epochs=0, schedule="constant", epochs=5)
    states = []
    path = tmp_path / recipe.name / "training_state.pt"

    def progress(done: int, total: int, text: str) -> None:
        if path.exists():
            states.append(path.read_bytes())

    with pytest.raises(FloatingPointError, match=r"^The loss must be finite, got (nan|inf) in stage train") as caught:
        train(recipe, tmp_path, device="cpu", save_every_s=-1, progress=progress)
    found = re.search(r"epoch (\d+), step (\d+) \(training images ([\d, ]+)\)", str(caught.value))
    assert found is not None
    epoch, step = int(found[1]) - 1, int(found[2]) - 1
    assert [int(i) for i in found[3].split(",")] == epoch_order(23, 0, epoch)[step * 7 : step * 7 + 7].tolist()
    assert f"the last saved state in {path.parent} is intact: lower base_lr" in str(caught.value)
    state = load_tensors(path, "a state")["state"]
    assert (state["epoch"], state["step"]) in {(epoch, step), (epoch - 1, 3)}
    assert not (path.parent / "scratch.pt").exists()
    assert "\n" not in str(caught.value)


def test_a_process_that_is_well_says_that_another_one_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "over_processes", lambda run, sums: {**sums, "loss": float("nan")})
    said = r"^The loss must be finite, got nan or infinity in another process in stage train, "
    with pytest.raises(FloatingPointError, match=said + r"epoch 1, step 1; nothing is kept: lower base_lr"):
        train(tiny("scratch"), tmp_path, device="cpu")


def test_a_last_step_that_leaves_no_finite_weights_is_no_checkpoint(tmp_path: Path) -> None:
    recipe = tiny("scratch", base_lr=1e38, lr_rule="none", warmup_epochs=0, epochs=1, batch_size=23)
    said = r"^The weights must be finite at the end of stage train, got nan or infinity, so .*scratch\.pt was not writt"
    with pytest.raises(FloatingPointError, match=said):
        train(recipe, tmp_path, device="cpu")
    assert not list(tmp_path.rglob("*.pt"))


def test_a_gradient_that_is_not_finite_stops_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_: nan)
    with pytest.raises(FloatingPointError, match=r"^The length of the gradient must be finite, got nan in stage train"):
        train(tiny("scratch"), tmp_path, device="cpu")


def test_a_long_batch_is_named_by_its_first_images(tmp_path: Path) -> None:
    recipe = tiny(
        "scratch", base_lr=1e30, lr_rule="none", warmup_epochs=0, schedule="constant", batch_size=23, epochs=9
    )
    with pytest.raises(FloatingPointError, match=r"\(training images (\d+, ){8}\.\.\.\)"):
        train(recipe, tmp_path, device="cpu")


def test_a_device_that_is_not_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device must be one that is here, got 'abacus'; use cpu, or leave it out"):
        train(tiny(), tmp_path, device="abacus")


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a folder that can be written, got 'Not a directory'"):
        train(tiny(), tmp_path / "file" / "sub", device="cpu", progress=stop_after(0))


# What is trained


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_starts_from_the_same_weights_whatever_the_method(tmp_path: Path, method: str) -> None:
    # A learning rate of next to nothing and no weight decay leave the weights where they began.
    recipe = tiny(method, epochs=1, base_lr=1e-30, min_lr=0.0, weight_decay=0.0)
    got = train(recipe, tmp_path, device="cpu").state
    fresh = training.build_encoder(*_resolved(tiny("scratch"))).state_dict()
    assert all(torch.allclose(got[name], fresh[name], rtol=0, atol=1e-20) for name in fresh)


def _resolved(recipe: Recipe) -> tuple:
    facts = open_dataset("digits").facts
    return training.resolve(recipe, facts), facts


def test_which_stages_hold_a_decoder(checkpoints: dict[str, Path]) -> None:
    held = {method: load_checkpoint(path).has_decoder for method, path in checkpoints.items()}
    assert held == {"scratch": False, "ssl_ft": True, "ssat": True}
    pretrain = load_checkpoint(checkpoints["ssl_ft"].with_name("pretrain.pt"))
    assert (pretrain.stage, pretrain.epoch, pretrain.has_decoder) == ("pretrain", 1, True)
    assert pretrain.label == "vit_nano-digits-ssl_ft-seed0-pretrain"


def test_lambda_one_trains_as_scratch(tmp_path: Path) -> None:
    scratch = train(tiny("scratch"), tmp_path, device="cpu")
    ssat = train(tiny("ssat", lambda_weight=1.0), tmp_path, device="cpu")
    assert scratch.state.keys() == ssat.state.keys()
    assert all(torch.equal(scratch.state[name], ssat.state[name]) for name in scratch.state)


def test_lambda_zero_trains_as_the_first_stage_of_ssl_ft(tmp_path: Path) -> None:
    ssat = train(tiny("ssat", lambda_weight=0.0), tmp_path, device="cpu")
    ssl_ft = train(tiny("ssl_ft"), tmp_path, device="cpu")
    pretrain = load_checkpoint(ssl_ft.path.with_name("pretrain.pt"))
    assert all(torch.equal(pretrain.state[name], ssat.state[name]) for name in ssat.state)
    assert not torch.equal(ssl_ft.state["blocks.0.mlp.fc1.weight"], ssat.state["blocks.0.mlp.fc1.weight"])
    assert all(torch.equal(ssl_ft.state[n], ssat.state[n]) for n in ssat.state if n.startswith("decoder."))


def test_vectors_and_biases_are_not_decayed_and_tokens_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Noted(torch.optim.AdamW):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", Noted)
    checkpoint = train(tiny(epochs=1, betas=(0.8, 0.95)), tmp_path, device="cpu")
    (optimiser,) = made
    decays = {group["weight_decay"]: {p.shape for p in group["params"]} for group in optimiser.param_groups}
    assert decays.keys() == {0.0, 0.05}
    assert all(len(shape) <= 1 for shape in decays[0.0])
    assert all(len(shape) > 1 for shape in decays[0.05])
    assert {(1, 1, 32), (1, 1, 16)} <= decays[0.05]  # class token and mask token
    counts = [len(group["params"]) for group in optimiser.param_groups]
    shapes = [v.ndim for n, v in checkpoint.state.items() if not n.endswith("pos_embed")]
    assert sum(counts) == len(shapes)
    assert sorted(counts) == sorted([sum(ndim <= 1 for ndim in shapes), sum(ndim > 1 for ndim in shapes)])
    assert all(group["betas"] == (0.8, 0.95) for group in optimiser.param_groups)


def test_splitting_a_batch_gives_the_same_gradient(tmp_path: Path) -> None:
    averages = {}
    for accumulate in (1, 2, 3, 12):
        recipe = tiny(subset=24, batch_size=12, accumulate=accumulate, norm_pix=True)
        with pytest.raises(Stop):
            train(recipe, tmp_path / str(accumulate), device="cpu", save_every_s=-1, progress=stop_after(1))
        state = load_tensors(tmp_path / str(accumulate) / recipe.name / "training_state.pt", "a state")
        # After one step AdamW's first moment is (1 - beta1) times the gradient.
        moments = [value["exp_avg"].flatten() for _, value in sorted(state["optimiser"]["state"].items())]
        averages[accumulate] = torch.cat(moments)
    largest = float(averages[1].abs().max())
    for accumulate, average in averages.items():
        torch.testing.assert_close(average, averages[1], rtol=1e-4, atol=1e-6 * largest, msg=str(accumulate))


def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tiny(clip_grad=1e-3), tmp_path, device="cpu", save_every_s=-1, progress=stop_after(1))
    state = load_tensors(tmp_path / tiny().name / "training_state.pt", "a state")
    moments = torch.cat([value["exp_avg"].flatten() for value in state["optimiser"]["state"].values()])
    assert float(moments.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_runs_and_keeps_its_weights_in_float32(tmp_path: Path, method: str) -> None:
    checkpoint = train(tiny(method, precision="bf16"), tmp_path, device="cpu")
    assert {value.dtype for value in checkpoint.state.values()} == {torch.float32}
    assert np.isfinite(log_of(checkpoint)["loss"]).all()
    full = train(tiny(method), tmp_path / "full", device="cpu")
    assert log_of(checkpoint)["loss"].to_numpy() == pytest.approx(log_of(full)["loss"].to_numpy(), rel=0.05)
    assert checkpoint.hash != full.hash


@pytest.mark.parametrize(("method", "column"), [("scratch", "cross_entropy"), ("ssat", "loss"), ("ssl_ft", "loss")])
def test_the_loss_falls(tmp_path: Path, method: str, column: str) -> None:
    recipe = tiny(method, subset=200, batch_size=20, epochs=9, augmentation="none", base_lr=0.04)
    for stage, log in log_of(train(recipe, tmp_path, device="cpu")).groupby("stage"):
        assert log[column].iloc[-1] < 0.9 * log[column].iloc[0], stage


# What is logged


def test_the_log_has_a_row_per_epoch_with_unweighted_terms(tmp_path: Path) -> None:
    recipe = tiny(lambda_weight=0.3, epochs=4, warmup_epochs=1.0)
    log = log_of(train(recipe, tmp_path, device="cpu"))
    assert list(log.columns) == [
        "stage", "epoch", "loss", "cross_entropy", "reconstruction", "learning_rate", "grad_norm", "train_accuracy",
        "val_accuracy", "val_cross_entropy", "seconds", "images_per_s", "data_wait_s",
    ]  # fmt: skip
    assert log["epoch"].tolist() == [1, 2, 3, 4]
    assert (log["stage"] == "train").all()
    np.testing.assert_allclose(log["loss"], 0.3 * log["cross_entropy"] + 0.7 * log["reconstruction"], rtol=1e-6)
    assert log.notna().all(axis=None)
    peak, end = 1e-2 * 7 / 256, 1e-6
    shares = [(epoch + 2 / 3 - 1) / 3 for epoch in range(1, 4)]  # the rate of the last step of each epoch
    expected = [peak * 2 / 3, *(end + (peak - end) * 0.5 * (1 + np.cos(np.pi * share)) for share in shares)]
    np.testing.assert_allclose(log["learning_rate"], expected, rtol=1e-12)
    np.testing.assert_allclose(log["images_per_s"], 21 / log["seconds"], rtol=1e-5)
    assert ((log["data_wait_s"] > 0) & (log["data_wait_s"] < log["seconds"])).all()


def test_ssl_ft_runs_both_stages_and_is_charged_for_both(tmp_path: Path) -> None:
    checkpoint = train(tiny("ssl_ft", pretrain_epochs=3), tmp_path, device="cpu")
    log, cost = log_of(checkpoint), json.loads((checkpoint.path.parent / "cost.json").read_text())
    assert log["stage"].tolist() == ["pretrain"] * 3 + ["finetune"] * 2
    pretrain, finetune = (log[log["stage"] == stage] for stage in ("pretrain", "finetune"))
    assert pretrain[["cross_entropy", "train_accuracy", "val_accuracy"]].isna().all(axis=None)
    assert pretrain["reconstruction"].equals(pretrain["loss"])
    assert finetune["reconstruction"].isna().all()
    assert {stage: values["images"] for stage, values in cost.items()} == {"pretrain": 63, "finetune": 42}
    for stage, rows in (("pretrain", pretrain), ("finetune", finetune)):
        assert cost[stage]["train_s"] == pytest.approx(rows["seconds"].sum(), rel=1e-6)
    assert (checkpoint.stage, checkpoint.epoch) == ("finetune", 2)


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_announced_is_what_is_spent(tmp_path: Path, method: str) -> None:
    recipe = tiny(method)
    resolved, budget = plan(recipe)
    checkpoint = train(recipe, tmp_path, device="cpu")
    cost = json.loads((checkpoint.path.parent / "cost.json").read_text())
    assert {stage.name: stage.images for stage in budget.stages} == {name: cost[name]["images"] for name in cost}
    for stage in budget.stages:
        spent = cost[stage.name]
        assert spent["multiply_adds"] == stage.training_multiply_adds
        assert 0 < spent["processor_s"] <= 1.5 * (spent["train_s"] + 0.1)  # one thread
        assert spent["peak_memory_bytes"] > 1e8  # torch alone takes more
        assert ("energy_j" in spent) == bool(list(POWERCAP.glob("intel-rapl:*/energy_uj")))
    assert resolved == checkpoint.recipe
    stored = {name: value for name, value in checkpoint.state.items() if not name.endswith("pos_embed")}
    assert sum(v.numel() for v in stored.values()) == budget.encoder_parameters + budget.decoder_parameters


@pytest.mark.skipif(not os.access(PROCESS / "clear_refs", os.W_OK), reason="the peak cannot be forgotten here")
def test_the_peak_of_a_stage_is_not_that_of_what_came_before(tmp_path: Path) -> None:
    size = 400_000_000
    block = np.ones(size, dtype=np.int8)
    before = peak_memory_bytes("cpu")
    del block
    blocks: list[np.ndarray] = []

    def told(done: int, total: int, text: str) -> None:
        """Hold a block during pre-training, until its last step."""
        blocks[:] = [np.ones(size, dtype=np.int8)] if done < total / 2 else []

    checkpoint = train(tiny("ssl_ft"), tmp_path / "block", device="cpu", progress=told)
    cost = json.loads((checkpoint.path.parent / "cost.json").read_text())
    assert cost["pretrain"]["peak_memory_bytes"] > cost["finetune"]["peak_memory_bytes"] + 0.8 * size
    assert cost["finetune"]["peak_memory_bytes"] < before - 0.5 * size
    checkpoint = train(tiny(), tmp_path, device="cpu")
    (spent,) = json.loads((checkpoint.path.parent / "cost.json").read_text()).values()
    assert spent["peak_memory_bytes"] < before - 0.5 * size


def test_progress_counts_every_step_of_every_stage(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    train(tiny("ssl_ft"), tmp_path, device="cpu", progress=lambda *told: seen.append(told))
    assert [done for done, _, _ in seen] == list(range(1, 13))
    assert {total for _, total, _ in seen} == {12}
    assert [text for _, _, text in seen[::3]] == ["pretrain 1/2", "pretrain 2/2", "finetune 1/2", "finetune 2/2"]


def test_training_leaves_the_global_generators_alone(tmp_path: Path) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    train(tiny("ssl_ft", augmentation="strong"), tmp_path, device="cpu")
    assert torch.equal(torch_state, torch.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state, np.random.get_state(), strict=True))


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    runs = [train(tiny(seed=seed), tmp_path / str(i), device="cpu") for i, seed in enumerate((3, 3, 4))]
    assert_same_run(runs[0], runs[1])
    assert not torch.equal(runs[0].state["head.weight"], runs[2].state["head.weight"])
    digests = {hashlib.sha256((run.path.parent / "recipe.json").read_bytes()).hexdigest() for run in runs}
    assert len(digests) == 2


# Several processes

NORMED = """
import sys
from accelerate import debug_launcher
from accelerate.state import PartialState
from ssat_probe.recipe import Recipe
from ssat_probe.training import train

def run(folder, rate):
    recipe = Recipe(method="scratch", model="cvt_nano", subset=24, batch_size=8, epochs=1, base_lr=rate, lr_rule="none",
                    warmup_epochs=0)
    try:
        found = train(recipe, folder, device="cpu").hash
    except FloatingPointError as error:
        found = "diverged"
    sys.stdout.write(f"{PartialState().process_index} {found}\\n")
    sys.stdout.flush()

if __name__ == "__main__":
    debug_launcher(run, (sys.argv[1], float(sys.argv[2])), num_processes=2)
"""


@pytest.mark.parametrize(("rate", "is_lost"), [(1e-3, False), (1e38, True)])
def test_processes_agree_on_statistics_and_on_when_to_stop(tmp_path: Path, rate: float, *, is_lost: bool) -> None:
    words = [sys.executable, "-c", NORMED, str(tmp_path), str(rate)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600)
    found = dict(line.split() for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 "))
    assert found.keys() == {"0", "1"}, done.stderr[-2000:]
    assert found["0"] == found["1"]
    assert (found["0"] == "diverged") == is_lost


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tracker must be one that is installed here, got 'clearml'; install it"):
        train(tiny(), tmp_path, device="cpu", tracker="clearml")


def test_the_moving_average_is_that_of_the_weights_after_each_step(tmp_path: Path) -> None:
    recipe = tiny(ema_decay=0.6, base_lr=3e-2)
    steps: list[dict[str, torch.Tensor]] = []
    path = tmp_path / recipe.name / "training_state.pt"

    def progress(done: int, total: int, text: str) -> None:
        if path.exists():  # as after the step before
            steps.append(load_tensors(path, "a state")["model"])

    last = train(recipe, tmp_path, device="cpu", save_every_s=-1, progress=progress)
    steps.append(last.state)
    assert len(steps) == 2 * 3
    found = load_checkpoint(last.path.with_stem("ssat-ema"))
    assert (found.stage, found.label) == ("train-ema", f"{recipe.name}-train-ema")
    expected = {name: value.double() for name, value in steps[0].items()}
    for number, weights in enumerate(steps[1:], start=1):
        decay = min(0.6, 1 - (1 + number) ** (-2 / 3))
        expected = {name: decay * value + (1 - decay) * weights[name].double() for name, value in expected.items()}
    for name, value in found.state.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name)
    assert any(not torch.equal(found.state[name], last.state[name]) for name in last.state)
    row = log_of(last).iloc[-1]
    dataset = open_dataset("digits")
    correct, loss = evaluate(found.encoder(), split(dataset, "val"), dataset.facts, "cpu")
    assert row["ema_val_accuracy"] == pytest.approx(correct / len(split(dataset, "val")))
    assert row["ema_val_cross_entropy"] == pytest.approx(loss / len(split(dataset, "val")), rel=1e-5)


def test_a_moving_average_changes_nothing_but_the_log(tmp_path: Path) -> None:
    one, other = (train(tiny(ema_decay=d), tmp_path / str(d), device="cpu") for d in (None, 0.9))
    assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)


def test_drop_path_skips_blocks_in_training_alone(make_recipe: Callable[..., Any]) -> None:
    recipe, facts = make_recipe(drop_path=0.5)
    encoder = build_encoder(recipe, facts)
    chances = [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.blocks]
    assert chances == pytest.approx([0.5 * i / 5 for i in range(6)])
    images = torch.rand(97, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    full = build_encoder(dataclasses.replace(recipe, drop_path=0.0), facts).eval()
    full.load_state_dict(encoder.state_dict())
    assert torch.equal(encoder.eval()(images), full(images))
    inputs, outputs = [], []
    block = encoder.train().blocks[5]
    block.drop_path1.register_forward_hook(lambda module, args, out: (inputs.append(args[0]), outputs.append(out))[0])
    encoder(images)
    skipped = (outputs[0] == 0).all(dim=(1, 2)).sum().item()
    assert 97 * 0.5 - 4 * (97 * 0.25) ** 0.5 < skipped < 97 * 0.5 + 4 * (97 * 0.25) ** 0.5
    kept = ~(outputs[0] == 0).all(dim=(1, 2))
    torch.testing.assert_close(outputs[0][kept], inputs[0][kept] / 0.5)


def test_snapshots_change_nothing_and_survive_a_stop(tmp_path: Path) -> None:
    recipe = tiny("ssl_ft", epochs=3)
    plain = train(recipe, tmp_path / "plain", device="cpu")
    with pytest.raises(Stop):
        train(recipe, tmp_path / "kept", device="cpu", snapshots=True, save_every_s=0, progress=stop_after(15))
    kept = train(recipe, tmp_path / "kept", device="cpu", snapshots=True)
    assert_same_run(plain, kept)
    assert train(recipe, tmp_path / "kept", device="cpu", snapshots=True).hash == kept.hash
    found = sorted((kept.path.parent / "snapshots").iterdir())
    stages = [(stage, epoch) for stage in ("finetune", "pretrain") for epoch in range(4)]
    assert [path.name for path in found] == [f"{stage}-{epoch:05d}.pt" for stage, epoch in stages]
    loaded = [load_checkpoint(path) for path in found]
    assert [(one.stage, one.epoch) for one in loaded] == stages
    assert all(torch.equal(value, loaded[3].state[name]) for name, value in kept.state.items())
    assert any(not torch.equal(value, loaded[2].state[name]) for name, value in kept.state.items())
    for name, value in loaded[7].state.items():  # fine-tuning begins where pre-training ended
        assert torch.equal(value, loaded[0].state[name])
    with pytest.raises(ValueError, match=r"snapshots/pretrain-00000\.pt must be there for --snapshots, got a finished"):
        train(recipe, tmp_path / "plain", device="cpu", snapshots=True)


def test_snapshots_by_step_are_the_weights_after_those_steps(tmp_path: Path) -> None:
    recipe, weights = tiny("ssl_ft"), {}
    state = tmp_path / "kept" / recipe.name / "training_state.pt"

    def progress(done: int, total: int, text: str) -> None:
        if state.exists():  # as after the step before
            weights[done - 1] = load_tensors(state, "a state")["model"]

    kept = train(recipe, tmp_path / "kept", device="cpu", snapshot_steps=True, save_every_s=-1, progress=progress)
    plain = train(recipe, tmp_path / "plain", device="cpu")
    assert kept.hash == plain.hash
    found = sorted((kept.path.parent / "steps").iterdir())
    steps = [0, 1, 2, 3, 4, 6]
    assert [path.name for path in found] == [f"{s}-{n:08d}.pt" for s in ("finetune", "pretrain") for n in steps]
    for path in found:
        one, step = load_checkpoint(path), int(path.stem[-8:])
        assert (one.stage, one.epoch) == (path.stem[:-9], step / 3)
        if one.stage == "pretrain" and step in weights:
            assert all(torch.equal(one.state[name], value) for name, value in weights[step].items())
    assert {1, 2, 4} <= weights.keys()
    with pytest.raises(ValueError, match=r"steps/pretrain-00000000\.pt must be there for --snapshot-steps, got"):
        train(recipe, tmp_path / "plain", device="cpu", snapshot_steps=True)


# Weights of classification, choices among epochs, weights to begin with


def test_lambda_follows_its_schedule_and_a_level_one_changes_nothing(tmp_path: Path) -> None:
    level = train(tiny(lambda_weight=0.3), tmp_path / "constant", device="cpu")
    flat = train(tiny(lambda_weight=0.3, lambda_schedule="linear", lambda_end=0.3), tmp_path / "flat", device="cpu")
    assert all(torch.equal(level.state[name], flat.state[name]) for name in level.state)
    moving = tiny(lambda_weight=0.2, lambda_schedule="linear", lambda_end=0.8, batch_size=23, epochs=3, accumulate=1)
    log = log_of(train(moving, tmp_path / "moving", device="cpu"))
    assert log["lambda_weight"].tolist() == pytest.approx([0.2, 0.4, 0.6])
    total = log["lambda_weight"] * log["cross_entropy"] + (1 - log["lambda_weight"]) * log["reconstruction"]
    np.testing.assert_allclose(log["loss"], total, rtol=1e-6)  # one step an epoch


def test_a_schedule_may_begin_without_one_of_the_terms(tmp_path: Path) -> None:
    recipe = tiny(lambda_weight=0.0, lambda_schedule="cosine", lambda_end=1.0)
    checkpoint = train(recipe, tmp_path, device="cpu")
    assert log_of(checkpoint)["lambda_weight"].tolist() == pytest.approx([0.25, (1 + np.sqrt(0.75)) / 2])
    assert checkpoint.has_decoder


@pytest.mark.parametrize("method", METHODS)
def test_the_best_epoch_is_kept_also_by_a_run_that_dies_in_every_step(tmp_path: Path, method: str) -> None:
    fields = {"subset": 230, "batch_size": 70, "epochs": 6, "base_lr": 0.3, "seed": 1}
    every = train(tiny(method, **fields), tmp_path / "every", device="cpu", snapshots=True)
    best = train(tiny(method, select="best", **fields), tmp_path / "best", device="cpu")
    log = log_of(best)
    last_stage = log[log["stage"] == best.stage]
    assert best.epoch == last_stage["val_accuracy"].to_numpy().argmax() + 1
    if best.epoch in (1, 2, 3, 4, 6):  # those that snapshots keep
        same = load_checkpoint(every.path.parent / "snapshots" / f"{best.stage}-{best.epoch:05d}.pt")
        assert all(torch.equal(same.state[name], best.state[name]) for name in best.state)
    assert (best.epoch == 6) == all(torch.equal(every.state[name], best.state[name]) for name in best.state)
    for _ in range(60):
        with suppress(Stop):
            died = train(tiny(method, select="best", **fields), tmp_path / "dying", device="cpu", save_every_s=-1,
                         progress=stop_after(3))  # fmt: skip
            break
    assert died.epoch == best.epoch
    assert_same_run(died, best)
    assert {path.name for path in best.path.parent.iterdir()} >= {f"{method}.pt", "log.csv"}
    assert not (best.path.parent / "best.pt").exists()


def test_looks_at_the_gradients_change_nothing_and_are_those_of_the_first_step(tmp_path: Path) -> None:
    recipe = tiny(augmentation="none", batch_size=23, epochs=2, warmup_epochs=0, drop_path=0.3)
    plain = train(recipe, tmp_path / "plain", device="cpu")
    looked = train(recipe, tmp_path / "looked", device="cpu", gradients_every=2)
    assert looked.hash == plain.hash
    log = log_of(looked)
    assert log["gradient_cosine"].notna().tolist() == [True, False]
    assert -1 <= log["gradient_cosine"][0] <= 1
    assert (log[["classification_grad_norm", "task_grad_norm"]].iloc[0] > 0).all()
    assert "gradient_cosine" not in log_of(plain)


@pytest.mark.parametrize("fields", [{"method": "scratch"}, {"lambda_weight": 1.0}, {"lambda_weight": 0.0}])
def test_one_loss_has_no_gradients_to_compare(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="gradients_every must be 0 where there is one loss, got 3 for method s"):
        train(tiny(**fields), tmp_path, device="cpu", gradients_every=3)


def test_a_negative_number_of_steps_between_looks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gradients_every must be at least 0, got -3; 0 means never"):
        train(tiny(), tmp_path, device="cpu", gradients_every=-3)


def test_a_training_may_begin_with_weights_of_another(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    pretrained = checkpoints["ssl_ft"].with_name("pretrain.pt")
    recipe = tiny("scratch", init_from=str(pretrained), base_lr=1e-12, min_lr=0.0, weight_decay=0.0)
    begun = train(recipe, tmp_path / "begun", device="cpu")
    given = load_checkpoint(pretrained)
    fresh = train(tiny("scratch", base_lr=1e-12, min_lr=0.0, weight_decay=0.0), tmp_path / "fresh", device="cpu")
    for name, value in begun.state.items():
        source = fresh if name.startswith("head.") else given
        torch.testing.assert_close(value, source.state[name], rtol=0, atol=1e-9)
    record = json.loads((begun.path.parent / "init.json").read_text())
    assert record["hash"] == given.hash
    assert record["report"]["fraction"] == 1
    assert not torch.allclose(begun.state["blocks.0.attn.qkv.weight"], fresh.state["blocks.0.attn.qkv.weight"])


def test_what_another_run_began_with_does_not_stay(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(Stop):
        train(tiny("scratch", init_from=str(checkpoints["ssat"])), tmp_path, device="cpu", progress=stop_after(2))
    (folder,) = tmp_path.iterdir()
    assert (folder / "init.json").exists()
    (folder / "scratch-ema.pt").touch()
    train(tiny("scratch"), tmp_path, device="cpu", resume=False)
    assert {path.name for path in folder.iterdir()} == {"scratch.pt", "log.csv", "cost.json", "recipe.json"}


def test_what_a_run_began_with_stays_written_when_it_goes_on_or_another_is_refused(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    given = tmp_path / "given.pt"
    given.write_bytes(checkpoints["ssl_ft"].read_bytes())
    recipe = tiny("scratch", init_from=str(given))
    with pytest.raises(Stop):
        train(recipe, tmp_path, device="cpu", save_every_s=-1, progress=stop_after(4))
    record = tmp_path / recipe.name / "init.json"
    before = record.read_bytes()
    with pytest.raises(ValueError, match="must be of the recipe that is asked for, got one with init_from"):
        train(tiny("scratch", init_from=str(checkpoints["ssat"])), tmp_path, device="cpu")
    given.unlink()  # a run that goes on needs it no more
    train(recipe, tmp_path, device="cpu")
    assert record.read_bytes() == before
