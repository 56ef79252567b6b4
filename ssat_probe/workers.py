"""Workers: pieces of work in processes side by side, their progress as one, and none that outlives its parent."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

Progress = Callable[[int, int, str], None]
Work = Callable[[Progress], bool]
"A picklable piece of work: tells how far it is, and says in the end whether it did anything."

NUM_NAMED = 5
"Failures that a message names."

KILLED = "its process was killed, twice; if memory is short, use --jobs 1"


def side_by_side(pieces: Sequence[Work], names: Sequence[str], jobs: int, threads: int, progress: Progress) -> bool:
    """Do all pieces, in this process or in several; one that fails leaves the others alone.

    Args:
        pieces: What to do.
        names: Of the pieces, for messages.
        jobs: Processes; 0 means as many as the cores allow.
        threads: Of each process; 0 means that the processes share the cores.
        progress: Told of steps over all pieces.

    Returns:
        Whether any of them did anything.
    """
    jobs, threads = shares(jobs, threads, len(pieces))
    together = _Together(len(pieces), progress)
    if jobs == 1:
        with _threads(threads):
            outcomes = [_outcome(piece, together.teller(number)) for number, piece in enumerate(pieces)]
    else:
        outcomes = _in_processes(pieces, jobs, threads, together)
    refuse_failed({name: why for name, why in zip(names, outcomes, strict=True) if isinstance(why, str)}, len(pieces))
    return any(outcomes)


def shares(jobs: int, threads: int, num_pieces: int) -> tuple[int, int]:
    """How the cores are shared.

    Args:
        jobs: Processes; 0 means as many as the cores allow.
        threads: Of each process; 0 means that the processes share the cores.
        num_pieces: All that there is to do.

    Returns:
        Processes, of which there are no more than pieces, and the threads of each.
    """
    cores = os.cpu_count() or 1
    threads = threads or max(1, cores // max(1, jobs or 1))
    return min(jobs or max(1, cores // threads), num_pieces), threads


def refuse_failed(failed: Mapping[str, str], num_pieces: int, hint: str = "") -> None:
    """Say at the end what was not done.

    Args:
        failed: Why, by name.
        num_pieces: All that there were.
        hint: Where more is known about it.

    Raises:
        ChildProcessError: If anything failed.
    """
    if failed:
        shown = "; ".join(f"{name} ({why})" for name, why in list(failed.items())[:NUM_NAMED])
        more = f"; and {len(failed) - NUM_NAMED} more" if len(failed) > NUM_NAMED else ""
        raise ChildProcessError(
            f"All {num_pieces} trainings must be done, got {len(failed)} that failed: {shown}{more}. {hint}What is "
            "done is kept; the same command does these again and none of the others."
        )


def sentence_of(error: BaseException) -> str:
    """What went wrong, in one line.

    Args:
        error: A user's mistake, whose message is enough, or another one, which says its type.

    Returns:
        Without a full stop at its end.
    """
    lines = str(error).strip().splitlines()
    is_explained = isinstance(error, ValueError | OSError | FloatingPointError) and lines
    return (lines[-1] if is_explained else f"{type(error).__name__}: {' '.join(lines[-1:])}").rstrip(". ")


def _outcome(piece: Work, told: Progress) -> bool | str:
    """Whether a piece did anything, or why it failed."""
    try:
        return piece(told)
    except Exception as error:
        return sentence_of(error)


def _in_processes(pieces: Sequence[Work], jobs: int, threads: int, together: "_Together") -> list[bool | str]:
    """Outcome of each piece; who is free takes the next one, and one whose process was killed is tried once more."""
    numbers = iter(range(len(pieces)))
    found: dict[int, bool | str] = {}
    running: dict[_Worker, int] = {}
    was_killed: set[int] = set()

    def begin(worker: _Worker, number: int | None) -> None:
        if number is None:
            worker.end()
        else:
            worker.begin(pieces[number], number)
            running[worker] = number

    try:
        for number in itertools.islice(numbers, jobs):
            begin(_Worker(threads), number)
        while running:
            wait([worker.future for worker in running], timeout=0.2, return_when=FIRST_COMPLETED)
            for worker, number in list(running.items()):
                worker.pass_on(together)
                if not worker.future.done():
                    continue
                outcome = worker.outcome()
                del running[worker]
                if outcome is not None:
                    found[number] = outcome
                    begin(worker, next(numbers, None))
                    continue
                worker.end()
                if number in was_killed:
                    found[number] = KILLED
                    begin(_Worker(threads), next(numbers, None))
                else:
                    was_killed.add(number)  # what it has written is there, and it goes on from it
                    begin(_Worker(threads), number)
    finally:
        for worker in running:
            worker.end(is_killed=True)
    return [found[number] for number in range(len(pieces))]


class _Worker:
    """A process of its own, which does one piece after another."""

    # A pool of one, since a pool is lost with any of its processes; its own queue, whose lock may be lost with it.
    def __init__(self, threads: int) -> None:
        context = get_context("spawn")  # a forked torch may hang
        self.news = context.SimpleQueue()
        self.pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(self.news, threads, os.getpid()))
        self.future: Future[bool | str]

    def begin(self, piece: Work, number: int) -> None:
        """Start with a piece."""
        self.future = self.pool.submit(_work, piece, number)

    def pass_on(self, together: "_Together") -> None:
        """What the process has told since."""
        while not self.news.empty():
            together.told(*self.news.get())

    def outcome(self) -> bool | str | None:
        """Of the piece; none if the process was killed."""
        try:
            return self.future.result()
        except BrokenProcessPool:
            return None

    def end(self, *, is_killed: bool = False) -> None:
        """Let the process go, or stop it."""
        if is_killed:
            for process in list((self.pool._processes or {}).values()):
                process.terminate()
        self.pool.shutdown(wait=False, cancel_futures=True)


def begin(threads: int, parent: int) -> None:
    """Make this process a worker: with its number of threads, and gone soon after its parent.

    Args:
        threads: Of torch.
        parent: Its process number.
    """
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process soon after its parent has gone, so that a killed command leaves nobody writing."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


_news: "SimpleQueue[Any]"
"Of a worker process: where it tells how far it is."


def _begin(news: "SimpleQueue[Any]", threads: int, parent: int) -> None:
    """Start a worker process."""
    global _news
    _news = news
    begin(threads, parent)


def _work(piece: Work, number: int) -> bool | str:
    """A piece in a worker process."""
    last = 0.0

    def told(done: int, total: int, text: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 0.2:
            last = time.monotonic()
            _news.put((number, done, total, text))

    return _outcome(piece, told)


class _Together:
    """Progress of all pieces as one."""

    def __init__(self, num_pieces: int, progress: Progress) -> None:
        self.done, self.totals, self.progress = [0] * num_pieces, [0] * num_pieces, progress

    def teller(self, number: int) -> Progress:
        """What one piece tells its news to."""
        return lambda done, total, text: self.told(number, done, total, text)

    def told(self, number: int, done: int, total: int, text: str) -> None:
        """One piece's news."""
        self.done[number], self.totals[number] = done, total
        known_totals = [value for value in self.totals if value]
        expected = sum(known_totals) / len(known_totals) * len(self.totals)
        self.progress(sum(self.done), round(expected), text)


@contextmanager
def _threads(num: int) -> Iterator[None]:
    """Torch's number of threads, as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)
