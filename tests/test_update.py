"""One step: what it draws depends on seed and step alone."""

import itertools
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from ssat_probe import losses, training, update
from ssat_probe.checkpoint import load_checkpoint, load_tensors
from ssat_probe.images import normalise
from ssat_probe.recipe import Recipe
from ssat_probe.training import train
from ssat_probe.update import _seed_of, _seeded


def test_seeds_of_steps_differ_and_do_not_change() -> None:
    keys = list(itertools.product((0, 1), (0, 1, 2)))
    seeds = [_seed_of(Recipe(seed=seed), step) for seed, step in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [_seed_of(Recipe(seed=seed), step) for seed, step in keys]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == 7896617691693857887  # what finished runs were trained with: numpy pads with zeros


def test_what_a_network_draws_itself_is_seeded_and_the_global_generator_goes_on() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = torch.rand(2)
    drawn = []
    for _ in range(2):
        with _seeded(7, torch.device("cpu")):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)


@pytest.mark.parametrize("task", ["reconstruction", "simmim"])
@pytest.mark.parametrize("method", ["ssat", "ssl_ft"])
def test_a_clean_target_is_what_the_image_was_before_its_colours_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Any, method: Any
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = losses.target_of

    def noted(images: torch.Tensor, *more: Any) -> torch.Tensor:
        if not images.is_meta:  # those are counted for the budget
            seen.append(images)
        return plain(images, *more)

    monkeypatch.setattr(losses, "target_of", noted)
    given: list[torch.Tensor] = []
    keep = update.augment_and_keep

    def kept(*arguments: Any) -> Any:
        given.append(keep(*arguments))
        return given[-1]

    monkeypatch.setattr(update, "augment_and_keep", kept)
    recipe = Recipe(method=method, task=task, subset=14, batch_size=7, epochs=1, augmentation="strong",
                    reconstruction_target="clean", accumulate=7)  # fmt: skip
    facts = train(recipe, tmp_path, device="cpu").facts
    targets = torch.cat(seen)
    pairs = given[: len(targets) // 7]
    assert len(pairs) == 2
    assert torch.equal(targets, normalise(torch.cat([clean for _, clean in pairs]), facts))
    assert not torch.equal(targets, normalise(torch.cat([changed for changed, _ in pairs]), facts))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"task": "contrastive", "accumulate": 6}, "for task contrastive, whose negatives are other images, got parts"),
        ({"task": "contrastive", "batch_size": 1}, r"got parts of 1 \(batch_size 1, accumulate 1\); use more images"),
        ({"task": "contrastive", "subset": 2, "accumulate": 2}, r"got parts of 1 \(batch_size 2, accumulate 2\)"),
        ({"model": "cvt_nano", "accumulate": 6}, "for the batch norms of cvt_nano, which see one place of an image"),
    ],
)
def test_a_batch_with_too_few_images_to_learn_from_is_refused(
    tmp_path: Path, fields: dict[str, Any], sentence: str
) -> None:
    recipe = Recipe(**{"model": "vit_pico", "subset": 20, "batch_size": 6, "epochs": 1, "warmup_epochs": 0} | fields)
    with pytest.raises(ValueError, match=sentence):
        train(recipe, tmp_path, device="cpu")


def test_a_repeated_image_is_changed_anew_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[torch.Tensor] = []
    ids: list[torch.Tensor] = []
    step, keep = training.update, update.augment_and_keep
    monkeypatch.setattr(training, "update", lambda *given, **more: ids.append(given[3][2]) or step(*given, **more))

    def kept(*arguments: Any) -> Any:
        changed.append(keep(*arguments)[0])
        return changed[-1], changed[-1]

    monkeypatch.setattr(update, "augment_and_keep", kept)
    train(Recipe(method="scratch", subset=24, batch_size=8, epochs=1, repeats=4, augmentation="strong"), tmp_path,
          device="cpu")  # fmt: skip
    assert [len(one.unique()) for one in ids] == [2, 2, 2]
    assert [len(one.flatten(1).unique(dim=0)) for one in changed] == [8, 8, 8]


def test_fp16_scales_its_loss_skips_steps_that_overflow_and_resumes_bit_by_bit(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"subset": 24, "batch_size": 8, "epochs": 4, "warmup_epochs": 0, "base_lr": 1e-2}
    recipe = Recipe(precision="fp16", **fields)
    whole = train(recipe, tmp_path / "whole", device="cpu")
    log = pd.read_csv(whole.path.parent / "log.csv")
    assert log["skipped_steps"].sum() < 4 * 3
    assert {value.dtype for value in whole.state.values()} == {torch.float32}
    full = train(Recipe(**fields), tmp_path / "full", device="cpu")
    assert whole.hash != full.hash
    exact = pd.read_csv(full.path.parent / "log.csv")
    assert "skipped_steps" not in exact
    assert log["loss"][0] == pytest.approx(exact["loss"][0], rel=0.02)
    scales = []
    for _ in range(12):
        with suppress(KeyboardInterrupt):
            died = train(recipe, tmp_path / "dying", device="cpu", save_every_s=-1, progress=_stop_after_one())
            break
        state = load_tensors(tmp_path / "dying" / recipe.name / "training_state.pt", "a state")
        scales.append(state["scaler"]["scale"])
    assert died.hash == whole.hash
    assert len(scales) == 11
    assert scales == sorted(scales, reverse=True)  # it falls with each step that is skipped


def test_a_step_whose_gradient_overflows_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0**40, backoff_factor=0.5))
    recipe = Recipe(precision="fp16", subset=24, batch_size=8, epochs=1, warmup_epochs=0, base_lr=1e-2)
    run = train(recipe, tmp_path, device="cpu", snapshots=True)
    log = pd.read_csv(run.path.parent / "log.csv")
    assert log["skipped_steps"].tolist() == [3]
    assert log["grad_norm"].isna().all()
    begun = load_checkpoint(run.path.parent / "snapshots" / "train-00000.pt")
    assert all(torch.equal(value, begun.state[name]) for name, value in run.state.items())


def _stop_after_one() -> Any:
    seen: list[int] = []

    def progress(done: int, total: int, text: str) -> None:
        seen.append(done)
        if len(seen) > 1:
            raise KeyboardInterrupt

    return progress
