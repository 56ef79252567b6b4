"""Whole spectrum of a Hessian: dense by rows of exact second derivatives in float64, then LAPACK; costs known before.

Rows of one parameter tensor are differentiated with respect to this tensor and later ones alone; symmetry gives the
rest. For the early layers that leaves out half of the entries, for late ones nearly all of the graph.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from ssat_probe.measures.hessian import CHUNK, HessianOperator
from ssat_probe.measures.isolation import undisturbed
from ssat_probe.measures.processes import first, place, summed

GAIN = 0.95  # a larger chunk must take at most this share of the time to be taken; keeps the memory small; ours
_TRIAL = (
    1500  # rows of the random matrix whose eigenvalues are timed: a smaller one lies in the cache and says too much
)
_PLACES = 8  # parameters of which some rows are timed; between them the time per row is interpolated; ours
_COPIES = 2  # matrices of full size that live at once: the Hessian and LAPACK's workspace
CHUNKS = (1, 4, 16, CHUNK)
FLOAT64 = 2.0**-52
AGREEMENT = 1e-10  # largest relative difference between the matrix and a product, both in float64; ours


@dataclass(frozen=True)
class Cost:
    """What the whole spectrum will take."""

    num_parameters: int
    row_seconds: float
    solver_seconds: float
    num_bytes: int

    @property
    def seconds(self) -> float:
        """Rows and eigenvalues together."""
        return self.row_seconds + self.solver_seconds


@dataclass(frozen=True)
class Dense:
    """A whole Hessian, on the CPU, and how far it may be trusted."""

    matrix: Float64[Tensor, "row column"]
    "Symmetric."
    asymmetry: float
    "Largest difference between mirrored entries within one parameter, relative to the largest entry of all."
    disagreement: float
    "Relative length of the difference between the matrix times a random vector and the product with it."


@dataclass(frozen=True)
class Spectrum:
    """All eigenvalues, and what was known of the cost before."""

    eigenvalues: Float64[np.ndarray, " eigenvalue"]
    "Ascending."
    asymmetry: float
    "As of `Dense`."
    disagreement: float
    "As of `Dense`."
    cost: Cost


@dataclass(frozen=True)
class _Block:
    """What is wanted of one parameter."""

    tensor: int
    "Its place among the parameters."
    entries: Int[Tensor, " row"]
    "Of its coordinates."
    begin: int
    "Its first row in the matrix."
    columns: Int[Tensor, " column"]
    "Of the row from this parameter on."

    @property
    def end(self) -> int:
        return self.begin + len(self.entries)


def exact_spectrum(
    operator: HessianOperator,
    *,
    max_bytes: int = 2 * 2**30,
    max_seconds: float = float("inf"),
    max_chunk: int = CHUNK,
    on_step: Callable[[int], None] | None = None,
) -> Spectrum:
    """All eigenvalues, and how far the computed matrix may be trusted.

    Args:
        operator: Of a model in float64.
        max_bytes: Refuse to take more memory for matrices.
        max_seconds: Refuse to take longer, by the estimate of `cost`.
        max_chunk: Rows that may share a backward pass.
        on_step: As for `assembled`.

    Returns:
        The spectrum.

    Raises:
        ValueError: If the model is not in float64, the spectrum would not fit (says what would), or the matrix is not
            that of the operator's products.
    """
    if operator.precision > FLOAT64:
        raise ValueError(
            f"An exact spectrum needs a model in float64, got a machine epsilon of {operator.precision:.2g}. "
            "Convert it with .double()."
        )
    refuse(operator.parameters, operator.size, max_bytes)
    expected, chunk = cost(operator, max_chunk)
    if expected.seconds > max_seconds:
        raise ValueError(
            f"An exact spectrum must take at most {max_seconds:.3g} s, got an estimate of {expected.seconds:.3g} s for "
            f"{operator.size} parameters. {_what_fits(operator.parameters, _fitting(expected, max_seconds))}"
        )
    found = assembled(operator, chunk, on_step)
    if not found.disagreement <= AGREEMENT:
        raise ValueError(
            f"Rows of the Hessian must agree with its products to {AGREEMENT:.0e}, got {found.disagreement:.2g}: the "
            "loss is not the same function twice, or an operation is differentiated wrongly. Look for random numbers."
        )
    # torch's LAPACK, MKL on x86: 1.5 to 1.9 times as fast as scipy's (n = 3,000 and 6,000, one thread, every driver)
    values = torch.linalg.eigvalsh(found.matrix).numpy()
    return Spectrum(values, found.asymmetry, found.disagreement, expected)


def assembled(operator: HessianOperator, chunk: int = 16, on_step: Callable[[int], None] | None = None) -> Dense:
    """The whole Hessian; each batch makes one graph, whatever the operator keeps.

    Args:
        operator: In any arithmetic; sums over batches are float64.
        chunk: Rows that share a backward pass.
        on_step: Called with the number of rows so far, those of every batch counted.

    Returns:
        The matrix, compared with a product.
    """
    size, num_images, num_rows = operator.size, 0, 0
    matrix = torch.zeros(size, size, dtype=torch.float64)
    with undisturbed():
        for gradients, num, _ in operator.graphs():
            for block, start, entries in _passes(operator, chunk):
                rows = operator.rows(gradients, block.tensor, entries)[:, block.columns].cpu()
                share = num if operator.reduction == "mean" else 1
                matrix[start : start + len(entries), block.begin :].add_(rows, alpha=share)
                num_rows += len(entries)
                if on_step is not None:
                    on_step(num_rows)
            num_images += num
            del gradients  # the graph must not outlive the making of the next one
    if operator.is_sharded:
        summed(matrix)
        num_images = int(summed(torch.tensor(num_images)))
    matrix /= num_images
    operator.num_products += size
    operator.num_images += num_images * size
    asymmetry = _mirror(matrix, [(block.begin, block.end) for block in _blocks(operator)])
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = operator.product(vector.to(operator.device)).cpu()
    difference = float((matrix @ vector - product).norm())
    return Dense(matrix, asymmetry, difference / float(product.norm()) if difference else 0.0)


def cost(operator: HessianOperator, max_chunk: int = CHUNK) -> tuple[Cost, int]:
    """Time and memory of `exact_spectrum`, from some real rows and a smaller eigenvalue problem that are timed.

    Args:
        operator: As it will be used.
        max_chunk: Rows that may share a backward pass.

    Returns:
        Seconds for this machine in its present load, bytes for the matrices (the graph of a batch comes on top); and
        the number of rows per backward pass that is fastest. The same in all processes.
    """
    found = _timed_rows(operator, max_chunk) if place()[0] == 0 else (0.0, 0)
    seconds, chunk = first(found)
    size = operator.size
    trial = torch.randn(2 * (min(_TRIAL, size),), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    started = time.perf_counter()
    torch.linalg.eigvalsh(trial + trial.T)
    solver = (time.perf_counter() - started) * (size / len(trial)) ** 3
    return first(Cost(size, seconds, solver, 8 * _COPIES * size**2)), chunk


def _timed_rows(operator: HessianOperator, max_chunk: int) -> tuple[float, int]:
    """Seconds for the rows of all batches of this process, and the best number of them per backward pass."""
    num_images = sum(num for _, num in operator.batches)
    blocks = _blocks(operator)
    with undisturbed():
        gradients, num, _ = next(operator.graphs())

        def per_row(block: _Block, chunk: int) -> float:
            entries = block.entries[:chunk]
            started = time.perf_counter()
            operator.rows(gradients, block.tensor, entries)
            return (time.perf_counter() - started) / len(entries)

        largest = max(blocks, key=lambda block: len(block.entries))
        per_row(largest, 2)  # the first of its kind is slow
        best, least = 1, float("inf")
        for chunk in CHUNKS:
            if chunk > max_chunk or (each := per_row(largest, chunk)) > GAIN * least:
                break
            best, least = chunk, each
        wanted = np.linspace(0, operator.size - 1, _PLACES)
        timed = sorted({next(i for i, block in enumerate(blocks) if row < block.end) for row in wanted})
        centres = [(blocks[i].begin + blocks[i].end) / 2 for i in timed]
        seconds = [per_row(blocks[i], best) for i in timed]
    return float(np.interp(np.arange(operator.size), centres, seconds).sum()) * num_images / num, best


def _blocks(operator: HessianOperator) -> list[_Block]:
    """One per parameter of which anything is wanted."""
    blocks, offset, begin = [], 0, 0
    whole = sum(parameter.numel() for parameter in operator.parameters.values())
    coordinates = torch.arange(whole) if operator.coordinates is None else operator.coordinates.cpu()
    for tensor, parameter in enumerate(operator.parameters.values()):
        left = coordinates[begin:] - offset
        entries = left[left < parameter.numel()]
        if len(entries):
            blocks.append(_Block(tensor, entries, begin, left))
        begin, offset = begin + len(entries), offset + parameter.numel()
    return blocks


def _passes(operator: HessianOperator, chunk: int) -> Iterator[tuple[_Block, int, Int[Tensor, " row"]]]:
    """Rows that share a backward pass: their block, the first row in the matrix, entries of the parameter."""
    for block in _blocks(operator):
        for start in range(0, len(block.entries), chunk):
            yield block, block.begin + start, block.entries[start : start + chunk]


def _mirror(matrix: Float64[Tensor, "row column"], spans: list[tuple[int, int]]) -> float:
    """Fill what lies below the blocks of the diagonal, in place, and make these symmetric; asymmetry found in them."""
    off = 0.0
    for begin, end in spans:
        corner = matrix[begin:end, begin:end]
        off = max(off, float((corner - corner.T).abs().max()))
        corner.copy_((corner + corner.T) / 2)
        matrix[end:, begin:end] = matrix[begin:end, end:].T
    largest = max(float(matrix[begin:end].abs().max()) for begin, end in spans)
    return off / largest if largest > 0 else 0.0


def refuse(parameters: Mapping[str, Tensor], size: int, max_bytes: int) -> int:
    """Stop before anything is computed if the matrices would not fit.

    Args:
        parameters: Of the operator, by name.
        size: Coordinates of them that are looked at.
        max_bytes: Largest memory for matrices.

    Returns:
        Bytes that they take.

    Raises:
        ValueError: If they would take more.
    """
    needed = 8 * _COPIES * size**2
    if needed > max_bytes:
        most = int((max_bytes / 8 / _COPIES) ** 0.5)
        raise ValueError(
            f"An exact spectrum must fit into {max_bytes / 2**30:.3g} GiB, got {size} parameters that need "
            f"{needed / 2**30:.3g} GiB. {_what_fits(parameters, most)}"
        )
    return needed


def _fitting(expected: Cost, max_seconds: float) -> int:
    """Most parameters whose spectrum takes no longer."""
    sizes = np.arange(1, expected.num_parameters + 1)
    share = sizes / expected.num_parameters
    seconds = expected.row_seconds * share + expected.solver_seconds * share**3
    return int((seconds <= max_seconds).sum())


def _what_fits(parameters: Mapping[str, Tensor], most: int) -> str:
    """The largest parts of the model with at most so many parameters."""
    sums: dict[str, int] = {}
    for name, parameter in parameters.items():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            prefix = ".".join(parts[:depth]) + ".*"
            sums[prefix] = sums.get(prefix, 0) + parameter.numel()
    fits = sorted((num, prefix) for prefix, num in sums.items() if num <= most)[-3:]
    named = ", ".join(f"'{prefix}' ({num})" for num, prefix in reversed(fits))
    return f"At most {most} parameters fit: select fewer" + (f", such as {named}." if named else ".")
