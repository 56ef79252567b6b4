"""The ways to a spectrum, side by side: each takes an operator and gives rows of one and the same table."""

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from pandas import DataFrame
from torch import Tensor

from ssat_probe.measures import spectrum
from ssat_probe.measures.batches import average_positive, batch_ends, negative_proportion, signed_power
from ssat_probe.measures.calibration import CALIBRATED, Calibration, Recursion, calibrated
from ssat_probe.measures.certificate import Certificate
from ssat_probe.measures.exact import AGREEMENT, exact_spectrum
from ssat_probe.measures.hessian import CHUNK, Evaluation, HessianOperator
from ssat_probe.measures.inverse import (
    MAX_STEPS,
    SOLVERS,
    Solution,
    inverse_eigenvalues,
    inverse_product,
    lissa,
)
from ssat_probe.measures.jackknife import NUM_PRODUCTS, DataErrors, data_errors
from ssat_probe.measures.lanczos import Krylov, LanczosRun
from ssat_probe.measures.peers import pyhessian
from ssat_probe.measures.processes import first, gathered, place, woven
from ssat_probe.measures.stopping import Until, is_reached, run_length

METHODS = ("lanczos", "exact", "lissa", "batches", "pyhessian")
SAVE_EVERY_S = 10.0  # seconds between two states of an unfinished Lanczos run
LISSA_STEPS = 20  # outer Lanczos steps at most: each takes some hundred products; the negative edge comes first
MOST_STEPS = 1000  # of the recursion with mini-batches that is shown beside the others; it stops at their noise

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """Options of the methods; each takes what it needs."""

    steps: int = 80
    probes: int = 1
    seed: int = 0
    max_bytes: int = 2 * 2**30
    max_seconds: float = float("inf")
    "Of an exact spectrum."
    max_chunk: int = CHUNK
    "Rows of an exact Hessian that may share a backward pass."
    bystanders: tuple[Tensor, ...] = ()
    "Parameters of the model that the operator does not cover."
    jackknife: bool = False
    "Whether a Lanczos run is followed by a jackknife over batches."
    solvers: bool = False
    "Whether the eigenvalues by LiSSA are followed by a comparison of solvers on one right-hand side."
    recursion: Recursion = CALIBRATED
    "Of LiSSA; what is not set is calibrated."
    on_step: Callable[[int], None] | None = None
    on_run: Callable[[Krylov], None] | None = None
    "Given the first Lanczos run, with its basis."
    until: tuple[Until, ...] = ()
    "Stop a Lanczos run before ``steps`` where all of these hold."
    folder: Path | None = None
    "Where unfinished Lanczos runs are kept, to be gone on with; None keeps none."
    key: str = ""
    "Of all that the products depend on."
    chunk: int = 0
    "Start vectors whose runs go in lock-step; 0 means one at a time."
    home: str = "device"
    "Where Lanczos vectors lie: device, cpu or disk."

    @property
    def together(self) -> int:
        """Runs in lock-step."""
        return min(max(self.chunk, 1), self.probes)


def rows_of(
    method: str, operator: HessianOperator, certificate: Certificate, evaluation: Evaluation, settings: Settings
) -> Rows:
    """Rows of one method.

    Args:
        method: One of ``METHODS``.
        operator: Certified.
        certificate: Its certificate.
        evaluation: Loss and gradient of the model at the same images.
        settings: Options.

    Returns:
        Rows with a quantity each.
    """
    if method == "lanczos":
        return _lanczos(operator, certificate, evaluation, settings)
    makers = {"exact": _exact, "lissa": _lissa, "batches": _batches, "pyhessian": _pyhessian}
    return [*makers[method](operator, settings), *spectrum.facts(certificate, evaluation, operator)]


def compared(
    methods: Iterable[str],
    operator: HessianOperator,
    certificate: Certificate,
    evaluation: Evaluation,
    settings: Settings,
) -> Rows:
    """Rows of several methods on the same operator, with what each cost and how far its spectrum is from the best.

    Args:
        methods: Of ``METHODS``; the exact one is the reference, or else the first that gives a spectrum.
        operator: Certified.
        certificate: Its certificate.
        evaluation: Loss and gradient.
        settings: Options.

    Returns:
        Rows whose quantity begins with the method and a colon; ``products_used`` and ``seconds`` are without
        certificate and gradient, which all share.
    """
    found: dict[str, Rows] = {}
    settings = replace(settings, jackknife=False, solvers=False)  # not part of what is compared
    for method in methods:
        before, started = operator.num_products, time.perf_counter()
        rows = rows_of(method, operator, certificate, evaluation, settings)
        seconds = time.perf_counter() - started
        own = [row for row in rows if row["quantity"] == "products_used"]
        spent = own[0]["value"] if own else operator.num_products - before
        rows = [row for row in rows if row["quantity"] != "products_used"]
        costs = [{"quantity": "products_used", "value": spent}, {"quantity": "seconds", "value": seconds, "unit": "s"}]
        found[method] = rows + costs
    blank = {"probe": -1, "index": 0, "weight": np.nan, "converged": np.nan}
    tables = {method: DataFrame([blank | row for row in rows]) for method, rows in found.items()}
    with_spectrum = [method for method in found if len(spectrum.measure_of(tables[method])[0])]
    reference = "exact" if "exact" in found else with_spectrum[0] if with_spectrum else ""
    for method in with_spectrum:
        distance = spectrum.wasserstein(tables[method], tables[reference])
        found[method].append({"quantity": "wasserstein", "value": distance, "unit": "loss"})
    for method in found if "exact" in found else ():
        if method != "exact":
            found[method] += spectrum.errors(tables[method], tables["exact"])
    return [row | {"quantity": f"{method}:{row['quantity']}"} for method, rows in found.items() for row in rows]


def _lanczos(operator: HessianOperator, certificate: Certificate, evaluation: Evaluation, settings: Settings) -> Rows:
    """Everything that a run gives, its coefficients, and the error from the choice of images."""
    errors: list[DataErrors] = []

    def tell(num_images: int) -> None:
        share = min(1.0, num_images * place()[1] / sum(evaluation.batch_sizes))
        if settings.on_step is not None:
            settings.on_step(settings.together * settings.steps + round(share * NUM_PRODUCTS))

    def look(krylov: Krylov) -> None:
        if settings.on_run is not None:
            settings.on_run(krylov)
        if settings.jackknife:
            errors.append(data_errors(operator, krylov, on_images=tell))

    runs = _runs(
        operator, settings, certificate.noise, look if settings.jackknife or settings.on_run is not None else None
    )
    kept = spectrum.distance_kept(runs, certificate.noise)
    rows = [*spectrum.ends(runs), *spectrum.negative_part(runs, kept), spectrum.trace_row(runs)]
    rows += run_length(runs, settings.until, certificate.noise)
    rows = _with_data_errors(rows, errors[0]) if errors else rows
    return [*rows, *spectrum.facts(certificate, evaluation, operator), *spectrum.coefficients(runs)]


def _runs(
    operator: HessianOperator, settings: Settings, noise: float, on_first: Callable[[Krylov], None] | None
) -> list[Krylov]:
    """One run per start vector, some at the same time; unfinished ones are gone on with."""
    krylovs: list[Krylov] = []
    with operator, ExitStack() as stack:
        folder = settings.folder
        if folder is None and settings.home == "disk":
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="ssat-probe-")))
        for first in range(0, settings.probes, settings.together):
            some = range(first, min(first + settings.together, settings.probes))
            krylovs += _runs_together(some, operator, settings, folder, noise, on_first if first == 0 else None)
    return krylovs


def _runs_together(
    probes: range,
    operator: HessianOperator,
    settings: Settings,
    folder: Path | None,
    noise: float,
    on_first: Callable[[Krylov], None] | None,
) -> list[Krylov]:
    """Runs in lock-step; their bases are gone when it returns."""
    with ExitStack() as stack:
        runs = [_run(operator, settings, folder, probe) for probe in probes]
        for run in runs:
            stack.callback(run.close)
            operator.num_products += run.num_steps  # those before an interruption
        before = probes.start * settings.steps + (NUM_PRODUCTS if probes.start and settings.jackknife else 0)
        _finish(runs, operator, settings, noise, before)
        if on_first is not None:
            operator.release()
            on_first(runs[0].krylov(with_basis=True))
        return [run.krylov() for run in runs]


def _run(operator: HessianOperator, settings: Settings, folder: Path | None, probe: int) -> LanczosRun:
    """The run of one start vector, where it was left if it was."""
    own = None if folder is None else folder / f"probe{probe}"
    if own is not None:
        own.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"precision": operator.precision, "device": operator.device, "folder": own}
    options |= {"home": settings.home, "seed": settings.seed + 1_000_003 * probe}
    run = LanczosRun(operator.size, settings.steps, key=settings.key, **options)
    if operator.is_sharded and len(set(gathered([run.num_steps]))) > 1:  # interrupted between one save and the next
        run.close()
        run = LanczosRun(operator.size, settings.steps, key=settings.key, is_new=True, **options)
    return run


def _finish(runs: list[LanczosRun], operator: HessianOperator, settings: Settings, noise: float, before: int) -> None:
    """All steps that are left, in lock-step, with the state written now and then."""
    saved = time.monotonic()
    while going := [run for run in runs if not (run.is_done or is_reached(settings.until, run.krylov(), noise))]:
        images = operator.products(torch.stack([run.vector for run in going]))
        for run, image in zip(going, images, strict=True):
            run.take(image)
        # Of all processes at the same step: where one was left at another, all would begin again.
        if settings.folder is not None and first(time.monotonic() - saved >= SAVE_EVERY_S):
            for run in going:
                run.save()
            saved = time.monotonic()
        if settings.on_step is not None:
            settings.on_step(before + sum(run.num_steps for run in runs))
    if settings.folder is not None:
        for run in runs:
            run.save()


def _with_data_errors(rows: Rows, found: DataErrors) -> Rows:
    """The rows with what the choice of images adds to them."""
    errors = [row | {"data_error": found.errors.get(row["quantity"], float("nan"))} for row in rows]
    counts = {"data_batches": found.num_batches, "data_products": found.num_products}
    return [*errors, *({"quantity": quantity, "value": value} for quantity, value in counts.items())]


def _exact(operator: HessianOperator, settings: Settings) -> Rows:
    limits: dict[str, Any] = {name: getattr(settings, name) for name in ("max_bytes", "max_seconds", "max_chunk")}
    found = exact_spectrum(operator, on_step=settings.on_step, **limits)
    return [
        {"quantity": "estimated_seconds", "value": found.cost.seconds, "unit": "s"},
        {"quantity": "estimated_memory", "value": found.cost.num_bytes / 2**30, "unit": "GiB"},
        *spectrum.exact_rows(found.eigenvalues),
        {"quantity": "asymmetry", "value": found.asymmetry},
        {"quantity": "check_rows", "value": found.disagreement, "high": AGREEMENT, "converged": 1.0},
    ]


def _lissa(operator: HessianOperator, settings: Settings) -> Rows:
    """Ends and spectrum through the damped inverse, without brackets: what the approximation gives by itself."""
    with operator:
        seed, device = settings.seed, operator.device
        options: dict[str, Any] = {"seed": seed, "device": device, "precision": operator.precision}
        calibration = settings.recursion.calibration or calibrated(operator.product, operator.size, **options)
        options |= {"max_steps": _steps_of(settings.recursion), "on_step": settings.on_step}
        num_steps = min(settings.steps, LISSA_STEPS)
        found = inverse_eigenvalues(operator.product, operator.size, calibration, num_steps, **options)
    values, weights = found.values, found.weights
    num = min(spectrum.NUM_ENDS, (len(values) + 1) // 2)

    def end(quantity: str, place: int, index: int) -> dict[str, Any]:
        value, low, high = (float(x[place]) for x in (values, found.lows, found.highs))
        residual = max(value - low, high - value)
        sure: dict[str, Any] = {"low": low, "high": high if np.isfinite(high) else np.nan}
        sure["residual"] = residual if np.isfinite(residual) else np.nan
        sure["converged"] = float(residual <= 1e-3 * abs(value))
        return {"quantity": quantity, "index": index, "value": value, "unit": "loss"} | sure

    top, bottom, absolute = values[-1], values[0], float(weights @ np.abs(values))
    return [
        end("lambda_max", -1, 0),
        end("lambda_min", 0, 0),
        {"quantity": "lambda_ratio", "value": float(max(-bottom, 0.0) / top) if top > 0 else float("nan")},
        *(end("top_eigenvalue", -rank, rank) for rank in range(1, num + 1)),
        *(end("bottom_eigenvalue", rank - 1, rank) for rank in range(1, num + 1)),
        {"quantity": "negative_energy", "value": float(weights @ np.maximum(-values, 0)) / absolute},
        *spectrum.node_shares(values, weights),
        {"quantity": "negative_fraction", "tau": 0.0, "value": float(weights @ (values < 0))},
        {"quantity": "trace", "value": operator.size * float(weights @ values), "unit": "loss"},
        {"quantity": "damping", "value": calibration.damping, "unit": "loss"},
        {"quantity": "damping_koh_liang", "value": calibration.in_convention("koh_liang")[0]},
        {"quantity": "scale", "value": calibration.scale, "unit": "loss"},
        {"quantity": "inner_residual", "value": found.worst_residual},
        *(_solver_rows(operator, calibration, settings) if settings.solvers else ()),
        *(
            {"quantity": "node", "probe": 0, "index": i, "value": value, "weight": weight, "unit": "loss"}
            for i, (value, weight) in enumerate(zip(values, weights, strict=True))
        ),
    ]


def _steps_of(recursion: Recursion) -> int:
    """Of a recursion over all images: Koh & Liang's begins with the first step's result, ours ends with a residual."""
    return MAX_STEPS if recursion.recursion_depth is None else recursion.recursion_depth + 2


def _solver_rows(operator: HessianOperator, calibration: Calibration, settings: Settings) -> Rows:
    """One damped inverse times one random vector by every solver: true residual, and products that it took."""
    generator = torch.Generator().manual_seed(settings.seed)
    vector = torch.randn(operator.size, generator=generator, dtype=torch.float64).to(operator.device)
    options: dict[str, Any] = {"reduction": operator.reduction, "coordinates": operator.coordinates}
    parts = [HessianOperator(operator.parameters, operator.loss, [pair], **options) for pair in operator.batches]
    products = [part.product for part in parts]
    rows: Rows = []
    with operator:
        limit = _steps_of(settings.recursion)
        found: dict[str, Solution] = {
            solver: inverse_product(operator.product, vector, calibration, solver, max_steps=limit)
            for solver in SOLVERS
        }
        if len(parts) > 1 and not operator.is_sharded:  # a process has not all of the mini-batches
            more: dict[str, Any] = {"precision": operator.precision, "device": operator.device, "seed": settings.seed}
            noisy = settings.recursion.calibration or calibrated(operator.product, operator.size, products, **more)
            depth = settings.recursion.recursion_depth
            many: dict[str, Any] = {"repeats": settings.recursion.num_samples, "seed": settings.seed}
            many["max_steps"] = MOST_STEPS if depth is None else depth + 1
            found["lissa_batches"] = lissa(operator.product, vector, noisy, batch_products=products, **many)
            rows.append({"quantity": "scale_batches", "value": noisy.scale, "unit": "loss"})
            sizes = [num for _, num in operator.batches]
            rows.append({"quantity": "batch_size", "value": float(np.mean(sizes))})
    for solver, solution in found.items():
        flag = {"converged": float(solution.converged)}
        rows.append({"quantity": f"inverse_residual_{solver}", "value": solution.residual} | flag)
        # one of a mini-batch counts as the share of the images that it holds
        spent = solution.num_products + solution.num_batch_products / len(parts)
        rows.append({"quantity": f"inverse_products_{solver}", "value": spent})
    return rows


def _batches(operator: HessianOperator, settings: Settings) -> Rows:
    """Both ends per mini-batch, NEP and APE of the dominant ones; beside them signed power iteration on the same."""
    space: dict[str, Any] = {"coordinates": operator.coordinates}
    options: dict[str, Any] = {"steps": settings.steps, "seed": settings.seed, "on_step": settings.on_step}
    found = batch_ends(operator.parameters, operator.loss, operator.batches, **options, **space)
    rows: Rows = []
    for end, (quantity, values) in enumerate((("batch_max", found.largest), ("batch_min", found.smallest))):
        for row, value in enumerate(values):
            residual = float(found.residuals[row, end])
            sure = {"residual": residual, "low": value - residual, "high": value + residual}
            flag = {"converged": float(found.converged[row, end]), "unit": "loss"}
            rows.append({"quantity": quantity, "index": row, "value": float(value)} | sure | flag)
    power, spent = [], 0
    for batch, num in operator.batches:
        one = HessianOperator(operator.parameters, operator.loss, [(batch, num)], **space)
        with one:
            values, products = signed_power(one.product, one.size, seed=settings.seed)
        power.append(values[0])
        spent += products
    power, spent = woven(power), sum(gathered([spent]))
    rows += [{"quantity": "batch_power", "index": i, "value": float(x), "unit": "loss"} for i, x in enumerate(power)]
    for prefix, dominant in (("", found.dominant), ("power_", np.array(power))):
        rows.append({"quantity": f"{prefix}nep", "value": negative_proportion(dominant)})
        rows.append({"quantity": f"{prefix}ape", "value": average_positive(dominant), "unit": "loss"})
    return [
        *rows,
        {"quantity": "batch_size", "value": float(np.mean(found.sizes))},
        {"quantity": "num_batches", "value": len(found.sizes)},
        {"quantity": "products_used", "value": found.num_products},
        {"quantity": "power_products", "value": spent},
    ]


def _pyhessian(operator: HessianOperator, settings: Settings) -> Rows:
    found = pyhessian(operator, seed=settings.seed, bystanders=settings.bystanders)
    values = np.array(found.eigenvalues)
    positive, negative = np.sort(values[values > 0])[::-1], np.sort(values[values < 0])
    listed = [("top_eigenvalue", positive), ("bottom_eigenvalue", negative)]
    rows: Rows = [
        {"quantity": quantity, "index": rank, "value": float(value), "unit": "loss"}
        for quantity, some in listed
        for rank, value in enumerate(some, start=1)
    ]
    rows += [{"quantity": "lambda_max", "value": float(values.max()), "unit": "loss"}] if len(positive) else []
    return [
        *rows,
        {"quantity": "trace", "value": found.trace, "unit": "loss"},
        {"quantity": "products_used", "value": found.eigenvalue_products + found.trace_products},
        {"quantity": "trace_products", "value": found.trace_products},
    ]
