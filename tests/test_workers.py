"""Pieces of work side by side: what they did, what they tell, what stays as it was."""

import importlib
import operator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ssat_probe import workers
from ssat_probe.workers import Progress, refuse_failed, side_by_side


def silent(done: int, total: int, text: str) -> None:
    pass


# Workers are started anew, so that what they do must be importable there: bool(told) is true, not_(told) false.
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(("last", "is_new"), [(bool, True), (operator.not_, False)])
def test_all_pieces_are_done_and_one_that_did_something_is_told_of(jobs: int, last: Any, is_new: bool) -> None:
    assert side_by_side([operator.not_, operator.not_, last], "abc", jobs, 1, silent) is is_new


@pytest.mark.parametrize(
    ("jobs", "threads", "num", "expected"),
    [
        (0, 0, 9, (1, 8)),
        (0, 1, 9, (8, 1)),
        (0, 3, 9, (2, 3)),
        (2, 0, 9, (2, 4)),
        (5, 2, 3, (3, 2)),
        (0, 16, 9, (1, 16)),
    ],
)
def test_cores_are_shared(
    monkeypatch: pytest.MonkeyPatch, jobs: int, threads: int, num: int, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 8)
    assert workers.shares(jobs, threads, num) == expected


PIECES = """
import os, signal, time

def touch(path, seconds, told):
    time.sleep(seconds)
    with path.open("a") as file:
        file.write("done")
    return True

def die_once(path, told):
    if not path.exists():
        path.write_text("killed, ")
        os.kill(os.getpid(), signal.SIGKILL)
    return touch(path, 0.0, told)

def die(told):
    os.kill(os.getpid(), signal.SIGKILL)

def miss(told):
    raise FileNotFoundError("a.npz must be there, got nothing.")
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pieces that a worker can import."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "pieces_of_work.py").write_text(PIECES)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return importlib.import_module("pieces_of_work")


def written(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("jobs", [1, 2])
def test_pieces_that_fail_leave_the_others_alone_and_are_named_at_the_end(tmp_path: Path, work: Any, jobs: int) -> None:
    pieces = [operator.index, partial(work.touch, tmp_path / "a", 0), work.miss, partial(work.touch, tmp_path / "b", 0)]
    sentence = (
        r"^All 4 trainings must be done, got 2 that failed: first \(TypeError: 'function' object cannot be interpreted "
        r"as an integer\); third \(a\.npz must be there, got nothing\)\. What is done is kept; the same command does "
        r"these again and none of the others\.$"
    )
    with pytest.raises(ChildProcessError, match=sentence):
        side_by_side(pieces, ["first", "second", "third", "fourth"], jobs, 1, silent)
    assert written(tmp_path) == {"a": "done", "b": "done"}


def test_many_that_fail_are_counted() -> None:
    failed = {f"seed {number}": "it did" for number in range(7)}
    with pytest.raises(ChildProcessError, match=r"got 7 that failed: .*; seed 4 \(it did\); and 2 more\. See"):
        refuse_failed(failed, 9, "See there. ")
    refuse_failed({}, 9)


def test_a_killed_process_is_tried_once_more_and_the_others_go_on_undisturbed(tmp_path: Path, work: Any) -> None:
    others = [partial(work.touch, tmp_path / name, 0.2) for name in "bcd"]
    assert side_by_side([partial(work.die_once, tmp_path / "a"), *others], "abcd", 2, 1, silent)
    assert written(tmp_path) == {"a": "killed, done", "b": "done", "c": "done", "d": "done"}


def test_one_that_is_killed_twice_is_named_and_the_others_are_done(tmp_path: Path, work: Any) -> None:
    others = [partial(work.touch, tmp_path / name, 0.2) for name in "acd"]
    with pytest.raises(ChildProcessError, match=r"got 1 that failed: b \(its process was killed, twice; if memory is"):
        side_by_side([others[0], work.die, *others[1:]], "abcd", 2, 1, silent)
    assert written(tmp_path) == {"a": "done", "c": "done", "d": "done"}


def test_progress_is_that_of_all_and_expects_of_the_unknown_what_the_known_take() -> None:
    def piece(told: Progress) -> bool:
        told(1, 2, "half")
        told(2, 2, "done")
        return True

    told: list[tuple[int, int, str]] = []
    side_by_side([piece, piece, piece], "abc", 1, 1, lambda *news: told.append(news))
    assert told == [(done, 6, "half" if done % 2 else "done") for done in range(1, 7)]


def test_threads_are_as_asked_and_afterwards_as_before() -> None:
    before, seen = torch.get_num_threads(), []

    def piece(told: Progress) -> bool:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side([piece], "a", 1, 3, silent)
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
