"""One step: what it draws depends on seed and step alone."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from ssat_probe import losses, training, update
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
