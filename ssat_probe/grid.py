"""Values at the points of a grid: estimated beforehand, kept on disk as they come, shared by threads or processes."""

import copy
import hashlib
import json
import os
import pickle
import queue
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from ssat_probe.measures.landscape import values_at
from ssat_probe.subject import Subject
from ssat_probe.table import write_atomically
from ssat_probe.terms import NAMES, WITH_ERROR, Terms
from ssat_probe.workers import begin

SAVE_EVERY_S = 5.0
POINTS_AT_A_TIME = 8  # that a process or thread takes; the last ones of a grid wait for at most so many
MOST_AT_ONCE = 8  # threads with a model each: memory, and Python itself, which runs in one thread at a time
PAYS_BELOW = 0.9  # of the time that all threads take for one point; threads that share a cache slow each other down

Values = Float64[np.ndarray, "point value"]


@dataclass(frozen=True)
class Look:
    """A subject and the way it is looked at: all that makes its terms."""

    subject: Subject
    loss: str
    "Whose parameters move."
    is_augmented: bool
    num_batches: int

    def terms(self) -> Terms:
        """Terms at the subject's parameters.

        Returns:
            With images prepared anew.
        """
        return Terms(self.subject, self.subject.parameters(self.loss), self.is_augmented, self.num_batches)

    def copied(self) -> "Look":
        """The same look at a copy of the model, for another thread.

        Returns:
            With images and losses shared.
        """
        subject = self.subject
        model, decoder = copy.deepcopy(subject.model), copy.deepcopy(subject.decoder)
        return replace(self, subject=replace(subject, model=model, decoder=decoder))


@dataclass(frozen=True)
class Pace:
    """What points cost, and how many are looked at at once to make them as cheap."""

    seconds: float
    "Of a point, where they come one by one; of a round divided by its points otherwise."
    at_once: int
    "Each in a thread of its own, with a copy of the model and an equal share of torch's threads."


def pace_of(terms: Terms, jobs: int = 1) -> Pace:
    """Measure what a point costs, where the parameters are.

    A network too small to keep several threads busy with one point is looked at at several points at once.

    Args:
        terms: Of the grid.
        jobs: Processes that will share the points; one looks at several points at once only if it is alone.

    Returns:
        From medians of three, after one that does not count.
    """
    threads = torch.get_num_threads()
    alone = seconds_per_point(terms)
    at_once = min(threads, MOST_AT_ONCE)
    if at_once == 1 or jobs > 1 or terms.device.type != "cpu":
        return Pace(alone / jobs, 1)
    with _threads(threads // at_once):
        together = seconds_per_point(terms) / at_once
    return Pace(together, at_once) if together < PAYS_BELOW * alone else Pace(alone, 1)


def seconds_per_point(terms: Terms) -> float:
    """What a point costs, where the parameters are.

    Args:
        terms: Of the grid.

    Returns:
        Median of three, after one that does not count.
    """
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        terms()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many threads of torch's, here and in Python threads that begin meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def refuse_too_large(num_left: int, seconds: float, budget_s: float) -> None:
    """Refuse a grid before any work.

    Args:
        num_left: Points that have not been measured.
        seconds: A point's.
        budget_s: What a checkpoint may take.

    Raises:
        ValueError: If the points take longer.
    """
    expected = num_left * seconds
    if expected > budget_s:
        raise ValueError(
            f"The grid must fit into budget_s, {budget_s:g} s per checkpoint, got {num_left} points that would take "
            f"{expected:.0f} s; take fewer points, fewer images, more jobs, or more budget_s."
        )


class Kept:
    """Values of the points that have been measured, on disk if there is a folder."""

    def __init__(self, folder: Path | None, look: Look, options: dict[str, Any]) -> None:
        """Read what is there.

        Args:
            folder: None keeps nothing.
            look: At what.
            options: All that determines the points.
        """
        self._path = None if folder is None else folder / f"{_key(look, options)}.json"
        self._last = time.monotonic()
        self.values: dict[int, Float64[np.ndarray, " value"]] = {}
        if self._path is not None and self._path.is_file():
            content = json.loads(self._path.read_text(encoding="utf-8"))
            self.values = {int(number): np.array(values, dtype=float) for number, values in content.items()}

    def add(self, number: int, values: Float64[np.ndarray, " value"]) -> None:
        """A point's values; written every few seconds.

        Args:
            number: Of the point.
            values: Its.
        """
        self.values[number] = values
        if time.monotonic() - self._last > SAVE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write all that is known."""
        if self._path is not None:
            content = {str(number): values.tolist() for number, values in sorted(self.values.items())}
            write_atomically(self._path, json.dumps(content))
            self._last = time.monotonic()


def values_of(
    look: Look,
    terms: Terms,
    anchors: Sequence[Tensor],
    weights: Float64[np.ndarray, "point anchor"],
    kept: Kept,
    jobs: int = 1,
    at_once: int = 1,
) -> Values:
    """Values at all points: those that are kept, and the others.

    Each process, or each of the points looked at at once, has an equal share of torch's threads. The values do not
    depend on how many there are, bit for bit where each has as many threads as the one.

    Args:
        look: At what.
        terms: Its terms, used in this process.
        anchors: As for `values_at`.
        weights: One row per point.
        kept: What was measured before, and takes what is measured now, also if the work is interrupted.
        jobs: Processes.
        at_once: Points that one process looks at at once, where there is one.

    Returns:
        One row per point.
    """
    left = [number for number in range(len(weights)) if number not in kept.values]
    is_small = len(left) <= POINTS_AT_A_TIME
    try:
        if jobs > 1 and not is_small:
            for number, found in _by_processes(look, anchors, weights, left, jobs):
                kept.add(number, found)
        elif at_once > 1 and not is_small:
            for number, found in _by_threads(look, terms, anchors, weights, left, at_once):
                kept.add(number, found)
        elif left:
            parameters = look.subject.parameters(look.loss)
            values_at(
                parameters, terms, anchors, weights[left], on_point=lambda place, found: kept.add(left[place], found)
            )
    finally:
        if left:
            kept.write()
    return np.array([kept.values[number] for number in range(len(weights))])


def _by_threads(
    look: Look,
    terms: Terms,
    anchors: Sequence[Tensor],
    weights: Float64[np.ndarray, "point anchor"],
    left: list[int],
    at_once: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """Points with their values as threads find them, each with a copy of the model."""
    free: queue.SimpleQueue[tuple[Any, Terms]] = queue.SimpleQueue()
    for _ in range(at_once):
        subject = look.copied().subject
        parameters = subject.parameters(look.loss)
        free.put((parameters, terms.on(subject, parameters)))

    def work(some: np.ndarray) -> Values:
        mine = free.get()
        try:
            return values_at(*mine, anchors, some)
        finally:
            free.put(mine)

    with _threads(torch.get_num_threads() // at_once):
        yield from _as_they_come(ThreadPoolExecutor(at_once), work, weights, left)


def _by_processes(
    look: Look, anchors: Sequence[Tensor], weights: Float64[np.ndarray, "point anchor"], left: list[int], jobs: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Points with their values as processes of their own find them."""
    threads = max(1, torch.get_num_threads() // jobs)
    content = pickle.dumps((look, [anchor.cpu() for anchor in anchors]))
    context = get_context("spawn")  # a forked torch may hang
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(content, threads, os.getpid()))
    yield from _as_they_come(pool, _work, weights, left)


def _as_they_come(
    pool: Executor, work: Callable[[np.ndarray], Values], weights: Float64[np.ndarray, "point anchor"], left: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Points with their values in the order in which they are found."""
    parts = [left[place : place + POINTS_AT_A_TIME] for place in range(0, len(left), POINTS_AT_A_TIME)]
    try:
        waiting = {pool.submit(work, weights[part]): part for part in parts}
        for future in as_completed(waiting):
            yield from zip(waiting[future], future.result(), strict=True)
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"The {len(left)} points of the grid must be measured, got a process that was killed; if memory is short, "
            "take fewer jobs. With keep, the same command goes on from here."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_measure: Callable[[np.ndarray], Values]
"Of a worker process: values at points."


def _begin(content: bytes, threads: int, parent: int) -> None:
    """Start a worker process, which ends when its parent does."""
    global _measure
    begin(threads, parent)
    look, anchors = pickle.loads(content)
    terms, parameters = look.terms(), look.subject.parameters(look.loss)
    _measure = lambda weights: values_at(parameters, terms, anchors, weights)  # noqa: E731


def _work(weights: np.ndarray) -> Values:
    """Points in a worker process."""
    return _measure(weights)


def _key(look: Look, options: dict[str, Any]) -> str:
    """Name of a kept grid: another for any other weights, images or points."""
    subject = look.subject
    facts = [subject.checkpoint.hash, subject.fingerprint, str(subject.dtype), subject.sample.sample_seed]
    parts = [*facts, look.loss, look.is_augmented, look.num_batches, options, NAMES, WITH_ERROR, torch.__version__]
    return "grid-" + hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
