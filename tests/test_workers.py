"""Pieces of work side by side: what they did, what they tell, what stays as it was."""

import functools
import operator
import os
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import torch

from ssat_probe import workers
from ssat_probe.workers import Progress, side_by_side


def silent(done: int, total: int, text: str) -> None:
    pass


# Workers are started anew, so that what they do must be importable there: bool(told) is true, not_(told) false.
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(("last", "is_new"), [(bool, True), (operator.not_, False)])
def test_all_pieces_are_done_and_one_that_did_something_is_told_of(jobs: int, last: Any, is_new: bool) -> None:
    assert side_by_side([operator.not_, operator.not_, last], jobs, 1, silent) is is_new


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_piece_that_fails_ends_the_others_with_its_error(jobs: int) -> None:
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        side_by_side([operator.index, operator.not_, operator.not_], jobs, 1, silent)  # type: ignore[list-item]


def test_a_killed_process_is_tried_once_more_and_then_named() -> None:
    dies = functools.partial(next, map(os._exit, [9]))  # next(..., told), so that a worker can import it
    with pytest.raises(
        ChildProcessError, match="All 2 pieces of work must end by themselves, got a process that was k"
    ):
        side_by_side([operator.not_, dies], 2, 1, silent)


def test_what_was_killed_once_is_done_in_the_second_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []
    real = workers._in_pool

    def killed_once(*arguments: Any) -> bool:
        attempts.append(len(arguments[0]))
        if len(attempts) == 1:
            raise BrokenProcessPool
        return real(*arguments)

    monkeypatch.setattr(workers, "_in_pool", killed_once)
    assert side_by_side([operator.not_, operator.not_], 2, 1, silent)
    assert attempts == [2, 2]


def test_progress_is_that_of_all_and_expects_of_the_unknown_what_the_known_take() -> None:
    def piece(told: Progress) -> bool:
        told(1, 2, "half")
        told(2, 2, "done")
        return True

    told: list[tuple[int, int, str]] = []
    side_by_side([piece, piece, piece], 1, 1, lambda *news: told.append(news))
    assert told == [(done, 6, "half" if done % 2 else "done") for done in range(1, 7)]


def test_threads_are_as_asked_and_afterwards_as_before() -> None:
    before, seen = torch.get_num_threads(), []

    def piece(told: Progress) -> bool:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side([piece], 1, 3, silent)
    assert (seen, torch.get_num_threads()) == ([3], before)


def test_a_worker_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def exits(status: int) -> None:
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr(workers.os, "_exit", exits)
    with pytest.raises(SystemExit):
        workers._end_with(-1)
    assert ended == [1]
