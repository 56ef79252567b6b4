"""Workers: pieces of work in processes side by side, their progress as one, and none that outlives its parent."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

Progress = Callable[[int, int, str], None]
Work = Callable[[Progress], bool]
"A picklable piece of work: tells how far it is, and says in the end whether it did anything."


def side_by_side(pieces: Sequence[Work], jobs: int, threads: int, progress: Progress) -> bool:
    """Do all pieces, in this process or in several.

    Args:
        pieces: What to do.
        jobs: Processes; 0 means as many as the cores allow.
        threads: Of each process; 0 means that the processes share the cores.
        progress: Told of steps over all pieces.

    Returns:
        Whether any of them did anything.

    Raises:
        ChildProcessError: If a process was killed, and another one when all was tried once more.
    """
    cores = os.cpu_count() or 1
    threads = threads or max(1, cores // max(1, jobs or 1))
    jobs = min(jobs or max(1, cores // threads), len(pieces))
    together = _Together(len(pieces), progress)
    if jobs == 1:
        with _threads(threads):
            return any([piece(together.teller(number)) for number, piece in enumerate(pieces)])
    try:
        return _in_pool(pieces, jobs, threads, together)
    except BrokenProcessPool:  # a worker was killed; what is done is found done, what was begun goes on
        try:
            _in_pool(pieces, jobs, threads, together)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"All {len(pieces)} pieces of work must end by themselves, got a process that was killed, twice; if "
                "memory is short, use --jobs 1. The same command goes on from here."
            ) from error
        return True


def _in_pool(pieces: Sequence[Work], jobs: int, threads: int, together: "_Together") -> bool:
    """Do all pieces in processes of their own."""
    context = get_context("spawn")  # a forked torch may hang
    news = context.SimpleQueue()
    with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(news, threads, os.getpid())) as pool:
        waiting = [pool.submit(_work, piece, number) for number, piece in enumerate(pieces)]
        try:
            return _follow(waiting, news, together)
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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


def _follow(waiting: list[Future[bool]], news: "SimpleQueue[Any]", together: "_Together") -> bool:
    """Pass on what the workers tell, until all are done or one fails."""
    pending: set[Future[bool]] = set(waiting)
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        while not news.empty():
            together.told(*news.get())
    return any([future.result() for future in waiting])


_news: "SimpleQueue[Any]"
"Of a worker process: where it tells how far it is."


def _begin(news: "SimpleQueue[Any]", threads: int, parent: int) -> None:
    """Start a worker process."""
    global _news
    _news = news
    begin(threads, parent)


def _work(piece: Work, number: int) -> bool:
    """A piece in a worker process."""
    last = 0.0

    def told(done: int, total: int, text: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 0.2:
            last = time.monotonic()
            _news.put((number, done, total, text))

    return piece(told)


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
