"""A grid of points: shared by processes, kept on disk, refused where it is too large."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssat_probe import grid
from ssat_probe.grid import Kept, Look, Pace, pace_of, refuse_too_large, values_of
from ssat_probe.measures.directions import flat, random_direction
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject
from ssat_probe.terms import Terms

Paths = dict[str, Path]
NUM = 21


@pytest.fixture
def look(checkpoints: Paths) -> Look:
    sample = Sample(num_images=13, batch_size=5, device="cpu")
    return Look(Subject.of(checkpoints["ssat"], sample, "train"), "joint", False, 3)


def anchors_of(look: Look) -> list[Any]:
    parameters = look.subject.parameters(look.loss)
    return [flat(parameters), flat(random_direction(parameters, 5))]


def weights() -> np.ndarray:
    return np.stack([np.ones(NUM), np.linspace(-0.5, 0.5, NUM)], axis=1)


def test_several_processes_find_what_one_finds_bit_for_bit_and_go_on_with_a_kept_grid(
    look: Look, tmp_path: Path
) -> None:
    before = {name: p.detach().clone() for name, p in look.subject.parameters("joint").items()}
    one = values_of(look, look.terms(), anchors_of(look), weights(), Kept(None, look, {}))
    kept = Kept(tmp_path, look, {"points": NUM})
    kept.add(4, one[4])
    kept.add(7, np.full_like(one[7], np.nan))
    kept.write()
    two = values_of(look, look.terms(), anchors_of(look), weights(), Kept(tmp_path, look, {"points": NUM}), jobs=2)
    assert np.isnan(two[7]).all()
    assert np.array_equal(np.delete(one, 7, axis=0), np.delete(two, 7, axis=0))
    assert all((p == before[name]).all() for name, p in look.subject.parameters("joint").items())
    (path,) = tmp_path.iterdir()
    assert set(json.loads(path.read_text(encoding="utf-8"))) == {str(number) for number in range(NUM)}


@pytest.mark.parametrize("at_once", [2, 3])
def test_several_points_at_once_have_the_values_that_they_have_one_by_one_bit_for_bit(
    look: Look, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: p.detach().clone() for name, p in look.subject.parameters("joint").items()}
    one = values_of(look, look.terms(), anchors_of(look), weights(), Kept(None, look, {}))
    together = threading.Barrier(at_once)  # passed only if so many threads are at work
    whole = Terms.__call__

    def meeting(self: Terms) -> np.ndarray:
        if not together.broken and self not in met:
            met.append(self)
            together.wait(60)
        assert torch.get_num_threads() == 1
        return whole(self)

    met: list[Terms] = []
    monkeypatch.setattr(Terms, "__call__", meeting)
    torch.set_num_threads(at_once)
    try:
        many = values_of(look, look.terms(), anchors_of(look), weights(), Kept(None, look, {}), at_once=at_once)
        assert torch.get_num_threads() == at_once
    finally:
        torch.set_num_threads(1)
    assert len(met) == at_once
    assert np.array_equal(one, many)
    assert all((p == before[name]).all() for name, p in look.subject.parameters("joint").items())


def test_several_points_at_once_where_that_is_measured_to_be_faster(
    look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {1: 1.0, 4: 0.0}
    monkeypatch.setattr(grid, "seconds_per_point", lambda terms: seconds[torch.get_num_threads()])
    torch.set_num_threads(4)
    try:
        for of_four, expected in ((0.5, Pace(0.25, 4)), (0.27, Pace(0.27, 1)), (0.2, Pace(0.2, 1))):
            seconds[4] = of_four
            assert pace_of(look.terms()) == expected
        assert pace_of(look.terms(), jobs=2) == Pace(0.1, 1)
    finally:
        torch.set_num_threads(1)


def test_what_a_broken_grid_found_is_kept_and_the_model_as_it_was(
    look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: p.detach().clone() for name, p in look.subject.parameters("joint").items()}
    terms, calls = look.terms(), []
    whole = Terms.__call__

    def broken(self: Terms) -> np.ndarray:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("in the middle")
        return whole(self)

    monkeypatch.setattr(Terms, "__call__", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        values_of(look, terms, anchors_of(look), weights(), Kept(tmp_path, look, {}))
    assert sorted(Kept(tmp_path, look, {}).values) == [0, 1, 2]
    assert all((p == before[name]).all() for name, p in look.subject.parameters("joint").items())


def test_another_look_or_other_points_are_kept_apart(look: Look, tmp_path: Path) -> None:
    others = [Look(look.subject, "joint", True, 3), Look(look.subject, "cross_entropy", False, 3)]
    for one, options in [(look, {}), (look, {"seed": 1}), *((other, {}) for other in others)]:
        kept = Kept(tmp_path, one, options)
        assert kept.values == {}
        kept.add(0, np.zeros(2))
        kept.write()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_grid_is_refused_by_what_its_points_take(look: Look) -> None:
    assert 0 < pace_of(look.terms()).seconds < 60
    refuse_too_large(5, 2.0, 10.0)
    with pytest.raises(ValueError, match=r"into budget_s, 10 s .* got 11 points that would take 11 s; take fewer"):
        refuse_too_large(11, 1.0, 10.0)
