"""Which exact way to Hessian-vector products is the fastest for the case at hand, by a short measurement."""

import time
from dataclasses import dataclass, field

import torch

from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.registry import known

MODES = ("auto", "cached", "fresh", "batched")
REPEATS = 2  # the faster counts: other programs can only make a product slower
CHUNKS = (4, 16, 64)  # vectors of one batched product that are tried, as far as they are needed


@dataclass(frozen=True)
class Mode:
    """How products are made, and why."""

    name: str
    "fresh: new graphs for each product; cached: graphs kept; batched: kept, and several vectors share a backward pass."
    chunk: int = 1
    "Vectors per product."
    seconds: dict[str, float] = field(default_factory=dict)
    "Measured, per vector, by mode and chunk (batched_4); empty where there was no choice."


def fastest(
    operator: HessianOperator, *, num_vectors: int, is_cached: bool, max_chunk: int, asked: str = "auto"
) -> Mode:
    """Time one product in each way that the memory allows, and set the operator to the fastest.

    Args:
        operator: Whose products; `keeps` is set.
        num_vectors: Vectors whose products are wanted at the same time: start vectors, or all for a dense matrix.
        is_cached: Whether all graphs fit into memory.
        max_chunk: Vectors per product that fit into memory.
        asked: One of ``MODES``; anything but auto is taken without measuring.

    Returns:
        The mode; the same for the same timings only, so an unfinished run must remember it.

    Raises:
        ValueError: If the mode asked for does not fit.
    """
    known(asked, MODES, "modes")
    if asked in ("cached", "batched") and not is_cached:
        raise ValueError(
            f"The graphs of all images must fit into --memory for --mode {asked}, got too many. "
            "Raise --memory, or take --mode fresh."
        )
    chunks = sorted({min(chunk, num_vectors, max_chunk) for chunk in CHUNKS} - {0, 1}) if is_cached else []
    if asked != "auto" or not is_cached:
        name = asked if asked != "auto" else "fresh"
        operator.keeps = name != "fresh"
        return Mode(name, max(chunks, default=1) if name == "batched" else 1)
    seconds = {"fresh": _seconds(operator, 1, is_kept=False), "cached": _seconds(operator, 1, is_kept=True)}
    seconds |= {f"batched_{chunk}": _seconds(operator, chunk, is_kept=True) for chunk in chunks}
    name, _, chunk = min(seconds, key=lambda way: seconds[way]).partition("_")
    operator.keeps = name != "fresh"
    return Mode(name, int(chunk or 1), seconds)


def _seconds(operator: HessianOperator, chunk: int, *, is_kept: bool) -> float:
    """Per vector, of a product whose graphs are there already if they are kept."""
    operator.keeps = is_kept
    counts = operator.num_products, operator.num_images
    vectors = torch.ones(chunk, operator.size, dtype=torch.float64, device=operator.device)
    best = float("inf")
    with operator:
        if is_kept:
            operator.products(vectors[:1])
        for _ in range(REPEATS):
            started = time.perf_counter()
            operator.products(vectors)
            best = min(best, time.perf_counter() - started)
    operator.num_products, operator.num_images = counts  # they serve no result
    return best / chunk
