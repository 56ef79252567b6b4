"""Between checkpoints: which can be put together, and that each is exactly itself there."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ssat_probe.between import Together, short_labels
from ssat_probe.checkpoint import load_checkpoint
from ssat_probe.recipe import Recipe
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject
from ssat_probe.terms import Terms, value_of
from ssat_probe.training import train

Paths = dict[str, Path]


def subject(path: Path) -> Subject:
    return Subject.of(path, Sample(num_images=7, batch_size=7, device="cpu"), "train")


def test_at_its_own_place_each_checkpoint_has_exactly_its_own_loss(checkpoints: Paths) -> None:
    subjects = [subject(path) for path in checkpoints.values()]
    found = Together.of(subjects, 2).values(np.eye(3))
    for place, one in enumerate(subjects):
        own = Terms(one, one.parameters())()[None]
        for term in ("cross_entropy", "accuracy", "l2"):
            assert value_of(found, term)[place] == value_of(own, term)[0]


def test_the_decoder_moves_where_all_have_one(checkpoints: Paths) -> None:
    both = Together.of([subject(checkpoints[name]) for name in ("ssl_ft", "ssat")], 2)
    assert "reconstruction" in both.terms.present
    assert any(name.startswith("decoder.") for name in both.parameters)
    mixed = Together.of([subject(checkpoints[name]) for name in ("ssat", "scratch")], 2)
    assert mixed.terms.present == ("cross_entropy", "l2", "accuracy")


def test_points_that_are_kept_are_not_measured_again_and_others_are(
    checkpoints: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = [subject(checkpoints[name]) for name in ("ssl_ft", "ssat")]
    weights = np.stack([np.linspace(0, 1, 5), np.linspace(1, 0, 5)], axis=1)
    plain = Together.of(subjects, 2).values(weights)
    whole, calls = Terms.__call__, []

    def counted(self: Terms) -> np.ndarray:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr(Terms, "__call__", counted)
    together = Together.of(subjects, 2, keep=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        together.values(weights)
    assert np.array_equal(together.values(weights), plain)
    assert len(calls) == 6  # three, the interrupted one, and the two that were left
    assert np.array_equal(together.values(weights), plain)
    assert len(calls) == 6
    together.values(weights[::-1].copy())
    assert len(calls) == 11


def test_no_jobs_are_refused(checkpoints: Paths) -> None:
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        Together.of([subject(checkpoints["ssat"])], 1, jobs=0)


def test_too_few_checkpoints_are_refused(checkpoints: Paths) -> None:
    with pytest.raises(ValueError, match="must name at least 3 checkpoints, got 1"):
        Together.of([subject(checkpoints["ssat"])], 3)


def test_another_architecture_is_refused_with_its_name(checkpoints: Paths, tmp_path: Path) -> None:
    recipe = Recipe(method="scratch", patch_size=(4, 4), subset=20, epochs=1, batch_size=10, warmup_epochs=0)
    other = train(recipe, tmp_path, device="cpu").path
    words = (
        r"must have one architecture, got patch_size \(2, 2\) in .* and \(4, 4\) in .*; give checkpoints of one recipe"
    )
    with pytest.raises(ValueError, match=words):
        Together.of([subject(checkpoints["scratch"]), subject(other)], 2)


def test_another_decoder_is_refused_with_the_parameter(checkpoints: Paths, tmp_path: Path) -> None:
    recipe = Recipe(decoder_width=8, subset=20, epochs=1, batch_size=10, warmup_epochs=0)
    other = train(recipe, tmp_path, device="cpu").path
    with pytest.raises(ValueError, match=r"got another decoder\.mask_token in"):
        Together.of([subject(checkpoints["ssat"]), subject(other)], 2)


def test_labels_say_what_differs(checkpoints: Paths) -> None:
    subjects = [subject(path) for path in checkpoints.values()]
    assert short_labels(subjects, ["a", "b", "c"]) == ["scratch", "SSL+FT", "SSAT"]
    checkpoint = load_checkpoint(checkpoints["ssat"])
    other = dataclasses.replace(
        subjects[2], checkpoint=dataclasses.replace(checkpoint, recipe=dataclasses.replace(checkpoint.recipe, seed=3))
    )
    assert short_labels([subjects[2], other], ["a", "b"]) == ["SSAT seed 0", "SSAT seed 3"]
    later = dataclasses.replace(subjects[2], checkpoint=dataclasses.replace(checkpoint, epoch=9))
    assert short_labels([subjects[2], later], ["a", "b"]) == ["SSAT seed 0 epoch 1", "SSAT seed 0 epoch 9"]
    assert short_labels([subjects[2], subjects[2]], ["a", "b"]) == ["a", "b"]
