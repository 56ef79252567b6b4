"""Spectrum of the loss Hessian: both ends, density, negative part with certified brackets, trace."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.registry import known
from ssat_probe.table import Column, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from ssat_probe.measures.hessian import HessianOperator
    from ssat_probe.measures.lanczos import Krylov
    from ssat_probe.measures.memory import Room
    from ssat_probe.measures.mode import Mode
    from ssat_probe.subject import Subject

LOSSES = ("cross_entropy", "reconstruction", "joint")
MATRICES = ("hessian", "gauss_newton")


@dataclass(frozen=True)
class Probe:
    """Spectrum of the loss Hessian: both ends, density, negative part with certified brackets, trace."""

    loss: str = "cross_entropy"
    "Whose Hessian: cross_entropy, reconstruction or joint."
    steps: int = 80
    "Lanczos steps per probe vector: Hessian-vector products, each a pass over all images."
    probes: int = 1
    "Random start vectors; more of them for the trace, more steps for everything else."
    seed: int = 0
    "Of the start vectors."
    method: str = "lanczos"
    "How: lanczos, exact (small models or blocks), lissa, batches (ends per mini-batch) or pyhessian."
    compare: tuple[str, ...] = ()
    "Methods to put side by side instead, with products, seconds and distance to the exact spectrum."
    params: tuple[str, ...] = ()
    "Patterns of the parameters looked at, as 'blocks.5.*' or '*.attn.q.*'; none means all."
    matrix: str = "hessian"
    "hessian, or gauss_newton: its positive semi-definite part, for any of the losses."
    memory: float = 2.0
    "GiB on the device, beside model and images; Lanczos vectors that do not fit lie on the CPU, or else on disk."
    mode: str = "auto"
    "How products are made: cached, fresh, batched (several start vectors at once), or auto: the fastest, measured."
    until: tuple[str, ...] = ()
    "Stop Lanczos before --steps where all hold: bracket=0.01 (share below -0.001 λmax), residual=1e-3 (both ends)."
    vectors: Path | None = None
    "Folder in which the two outermost eigenvectors of each end are kept, for landscape --eigenvectors; empty: none."
    most_seconds: float = 3600.0
    "Seconds that an exact spectrum may take; one that is estimated to take longer is refused."
    jackknife: bool = True
    "Add the error from the choice of images to a Lanczos run: 11 products more, two batches; =false leaves it out."
    augmented: bool = False
    "Look at images changed as in training, each always in the same way."
    l2: bool = False
    "Add the weight decay of the training to the loss, as half of it times the squared length of what decays."
    tau: tuple[float, ...] = (1e-3, 1e-2)
    "Shares below -τ λmax are given for these τ, and the share near zero for the least; others need no new product."
    bandwidth: float = 0.1
    "Least width of smoothed densities, as a share of an eigenvalue far out; another needs no new product."
    lissa: tuple[str, ...] = ()
    "Koh & Liang's settings of LiSSA: damping=0.01 scale=25 recursion_depth=5000 num_samples=4; none: calibrated."

    split: ClassVar[str] = "train"
    resumes: ClassVar[bool] = True
    redrawn: ClassVar[tuple[str, ...]] = ("tau", "bandwidth")
    shares: ClassVar[bool] = True
    columns: ClassVar[tuple[Column, ...]] = (
        Column("quantity", "", "what the row holds"),
        Column("probe", "", "start vector, from 0; -1 for what all of them give together"),
        Column(
            "index", "", "rank of an eigenvalue from its end, from 1; node or step, from 0; 0 for single quantities"
        ),
        Column("tau", "", "threshold as a share of the largest eigenvalue; empty where there is none"),
        Column("value", "", "the quantity, in `unit`; empty if its bracket is too wide to give one number"),
        Column("low", "", "lower end of what is certain: of value ± residual, or of the bracket of a share"),
        Column("high", "", "upper end of what is certain; for a check, the largest error allowed"),
        Column("standard_error", "", "chance error of the random start vectors, in `unit`"),
        Column(
            "data_error", "", "standard error from the choice of images (jackknife over batches), in `unit`, or empty"
        ),
        Column("residual", "", "an eigenvalue lies within this distance of the value, in `unit`"),
        Column(
            "converged", "", "1 if the residual is small (or a check passed), 0 if not; empty where it does not apply"
        ),
        Column("weight", "", "of a quadrature node: share of the probe's mass"),
        Column("unit", "", "of value, low, high, standard_error, residual; 'loss' is loss per squared parameter unit"),
    )

    @property
    def num_steps(self) -> int:
        """Products that a run will take and tell of; 0 where the method does not know beforehand."""
        from ssat_probe.measures.jackknife import NUM_PRODUCTS  # loads torch

        after = NUM_PRODUCTS if self.jackknife else 0
        return self.steps * self.probes + after if self.method == "lanczos" and not self.compare else 0

    def measure(
        self, subject: "Subject", on_step: Callable[[int], None] | None = None, unfinished: Path | None = None
    ) -> "DataFrame":
        """Certified spectrum of the mean loss over the subject's images.

        Args:
            subject: Model, images and losses.
            on_step: Called after each product of a Lanczos run, and each batch of the jackknife, with the number of
                products so far.
            unfinished: Folder where a Lanczos run that is interrupted is kept, and gone on with by the same call.

        Returns:
            One row per quantity, then one per eigenvalue listed, quadrature node and Lanczos coefficient. An option
            out of range or an operator that fails its certificate is a ValueError.
        """
        import pandas as pd

        from ssat_probe.measures.calibration import recursion
        from ssat_probe.measures.certificate import certify
        from ssat_probe.measures.methods import Settings, compared, rows_of
        from ssat_probe.measures.processes import place
        from ssat_probe.measures.redrawing import redrawn
        from ssat_probe.measures.stopping import until

        subject, everything, space, plain, operator = self._prepared(subject)
        plan = [space.micro_batch, space.is_cached, place()[1]]
        key = "" if unfinished is None else self._key(subject, plan)
        folder = None if unfinished is None else unfinished / hashlib.sha256(key.encode()).hexdigest()[:16]
        certificate, evaluation = certify(operator, evaluated=plain), plain.evaluate()
        mode = self._mode(operator, space, folder)
        on_run = None if self.vectors is None else partial(self._keep, self.vectors, subject, self.loss)
        settings = Settings(
            self.steps,
            self.probes,
            self.seed,
            max_bytes=self._max_bytes,
            max_chunk=space.max_chunk,
            max_seconds=self.most_seconds,
            bystanders=tuple(everything.values()),
            jackknife=self.jackknife,
            solvers=True,
            recursion=recursion(self.lissa),
            on_step=on_step,
            on_run=on_run,
            until=tuple(map(until, self.until)),
            folder=folder,
            key=key,
            chunk=mode.chunk,
            home=space.home,
        )
        if self.compare:
            rows = compared(self.compare, operator, certificate, evaluation, settings)
        else:
            rows = rows_of(self.method, operator, certificate, evaluation, settings) + self._edge(subject)
        names = [column.name for column in Probe.columns]
        defaults = {"probe": -1, "index": 0, "unit": ""}
        table = pd.DataFrame([defaults | row for row in rows], columns=names)
        table = redrawn(table.astype({name: float for name in names[3:-1]}), self.tau, self.bandwidth)
        table.attrs = {"mode": asdict(mode), "memory": asdict(space)}  # measured seconds: for the record
        return table

    def estimate(self, subject: "Subject") -> str:
        """What an exact spectrum of one such checkpoint costs, from rows that are timed now.

        Args:
            subject: Model, images and losses.

        Returns:
            Seconds and memory; empty for the other methods. What does not fit into the memory is a ValueError.
        """
        if "exact" not in (self.method, *self.compare):
            return ""
        from ssat_probe.measures.exact import cost

        _, _, space, _, operator = self._prepared(subject)
        found, _ = cost(operator, space.max_chunk)
        return (
            f"exact spectrum of {found.num_parameters:,} parameters, {found.num_bytes / 2**30:.2g} GiB of matrices: "
            f"about {found.row_seconds:.2g} s for rows and {found.solver_seconds:.2g} s for eigenvalues per checkpoint"
        )

    def redraw(self, table: "DataFrame") -> "DataFrame":
        """The table for this τ and bandwidth, from the coefficients in it.

        Args:
            table: What a run with other ``redrawn`` options wrote, with the identity columns.

        Returns:
            What `measure` would give with these options, with the identity columns.
        """
        import pandas as pd

        from ssat_probe.measures.redrawing import redrawn

        self._check()
        names = [column.name for column in self.columns]
        table = table.fillna({"unit": ""})
        parts = []
        for _, one in table.groupby("checkpoint", sort=False):
            identity = one.drop(columns=names).iloc[0]
            fresh = redrawn(one[names].reset_index(drop=True), self.tau, self.bandwidth)
            parts.append(fresh.assign(**identity)[list(table.columns)])
        return pd.concat(parts, ignore_index=True)

    def _prepared(
        self, subject: "Subject"
    ) -> tuple["Subject", dict[str, Any], "Room", "HessianOperator", "HessianOperator"]:
        """Subject in the arithmetic of the method, its parameters, the memory; operators of loss and matrix."""
        from ssat_probe.curvature import in_float64, operators, room_for
        from ssat_probe.measures.exact import refuse
        from ssat_probe.measures.jackknife import NUM_HELD
        from ssat_probe.measures.processes import place
        from ssat_probe.measures.selection import selected

        self._check()
        self._check_lissa(subject)
        is_exact = "exact" in (self.method, *self.compare)
        subject = in_float64(subject) if is_exact else subject
        everything = subject.parameters(self.loss)
        parameters, coordinates = selected(everything, self.params)
        size = sum(one.numel() for one in parameters.values()) if coordinates is None else len(coordinates)
        held = NUM_HELD if self.num_steps and self.jackknife else 0
        taken = (refuse(parameters, size, self._max_bytes) if is_exact else 0) + 8 * held * size
        budget: Any = {"max_bytes": self._max_bytes, "taken": taken, "num_vectors": self.num_steps and self.steps}
        space = room_for(subject, everything, self.loss, self.params, **budget)
        num, asked = place()[1], self.compare or (self.method,)
        needing = [name for name in asked if name == "batches" or (name == "lissa" and self.lissa)]
        if needing and space.micro_batch < (whole := min(subject.sample.batch_size, subject.num_images)):
            each, fewer = f" for each of {num} processes" * (num > 1), "Start fewer, take" if num > 1 else "Take"
            raise ValueError(
                f"The method {needing[0]} must have whole batches of {whole} images{each}, got room for "
                f"{space.micro_batch}. {fewer} a smaller --batch-size, or raise --memory."
            )
        chosen: Any = {"params": self.params, "matrix": self.matrix, "is_augmented": self.augmented, "l2": self.l2}
        plain, operator = operators(subject, everything, self.loss, micro_batch=space.micro_batch, **chosen)
        plain.keeps = operator.keeps = space.is_cached
        return subject, everything, space, plain, operator

    @property
    def _max_bytes(self) -> int:
        return int(self.memory * 2**30)

    def _check(self) -> None:
        """Refuse options that are out of range, before anything is computed."""
        from ssat_probe.measures.methods import METHODS
        from ssat_probe.measures.mode import MODES
        from ssat_probe.measures.processes import place
        from ssat_probe.measures.stopping import until

        for text in self.until:
            until(text)
        known(self.loss, LOSSES, "losses")
        known(self.matrix, MATRICES, "matrices")
        known(self.mode, MODES, "modes")
        for method in (self.method, *self.compare):
            known(method, METHODS, "methods")
        for name, least in (("steps", 2), ("probes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}. Take the default.")
        methods = self.compare or (self.method,)
        stepping = ("lanczos", "lissa", "batches")
        needs = {"until": ((), stepping[:1]), "probes": (1, stepping[:1]), "steps": (Probe.steps, stepping)}
        for name, (unused, using) in needs.items():
            if getattr(self, name) != unused and not {*using} & {*methods}:
                raise ValueError(
                    f"--{name} must go with the method {' or '.join(using)}, got {' '.join(methods)}. Leave it out, or "
                    f"add {using[0]}."
                )
        for name, unit in (("memory", "GiB"), ("most_seconds", "s")):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0 {unit}, got {getattr(self, name)}. Take the default.")
        for name, values in (("tau", self.tau or (0.0,)), ("bandwidth", (self.bandwidth,))):
            if not all(0 < value < 1 for value in values):
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}. Take the default.")
        if self.matrix == "gauss_newton" and self.l2:
            raise ValueError("The L2 term goes with the matrix hessian only, got 'gauss_newton'. Leave --l2 out.")
        if place()[1] > 1 and "pyhessian" in (self.method, *self.compare):
            raise ValueError(
                f"The method pyhessian must run in one process, which sees every batch, got {place()[1]} processes. "
                "Start it without accelerate launch or torchrun."
            )
        if self.matrix == "gauss_newton" and {"pyhessian"} & {self.method, *self.compare}:
            raise ValueError("PyHessian knows the matrix hessian only, got 'gauss_newton'. Leave pyhessian out.")
        if self.vectors is not None and str(self.vectors).isdigit():
            raise ValueError(
                "--vectors must be a folder, in which two eigenvectors of each end are kept, got "
                f"{self.vectors}, which looks like a number of them. Name a folder, as in --vectors eigenvectors."
            )
        is_whole = self.method == "lanczos" and self.matrix == "hessian" and not (self.compare or self.params)
        if self.vectors is not None and (not is_whole or self.steps < 4):
            raise ValueError(
                "--vectors keeps eigenvectors of the whole Hessian, found by at least 4 Lanczos steps, got another "
                "matrix, method or selection; leave --method, --matrix, --compare and --params out."
            )

    def _check_lissa(self, subject: "Subject") -> None:
        """Refuse settings of LiSSA that are out of range, or that nothing would come of."""
        from ssat_probe.measures.calibration import recursion
        from ssat_probe.measures.processes import place

        asked, methods = recursion(self.lissa), self.compare or (self.method,)
        if self.lissa and "lissa" not in methods:
            raise ValueError(
                f"--lissa must go with the method lissa, got {' '.join(methods)}. Add --method lissa, or leave it out."
            )
        if asked.num_samples == 1:
            return
        num, is_one = place()[1], subject.num_images <= subject.sample.batch_size
        reasons = {"--compare": bool(self.compare), f"{num} processes": num > 1, "one batch": is_one}
        why = next((reason for reason, holds in reasons.items() if holds), "")
        if why:
            raise ValueError(
                "num_samples averages recursions of LiSSA over several mini-batches, for one process without "
                f"--compare, got {why}. Leave num_samples out, or take a smaller --batch-size."
            )

    def _edge(self, subject: "Subject") -> list[dict[str, Any]]:
        """Curvature that the training's steps bear, where there is such a bound of this matrix."""
        from ssat_probe.recipe import Recipe
        from ssat_probe.schedule import edge_of_stability

        checkpoint = subject.checkpoint
        recipe, epoch = checkpoint.recipe, checkpoint.epoch
        is_whole = self.matrix == "hessian" and self.loss == "cross_entropy" and not self.params
        if not (is_whole and isinstance(recipe, Recipe) and isinstance(epoch, int)):
            return []
        edge = edge_of_stability(recipe, checkpoint.stage, epoch, is_augmented=self.augmented, has_l2=self.l2)
        return [] if edge is None else [{"quantity": "edge_of_stability", "value": edge, "unit": "loss"}]

    def _mode(self, operator: "HessianOperator", space: "Room", folder: Path | None) -> "Mode":
        """The fastest way to products; that of the interrupted run where there is one."""
        from ssat_probe.measures.mode import Mode, fastest
        from ssat_probe.measures.processes import first

        kept = None if folder is None else folder / "mode.json"
        found = json.loads(kept.read_text(encoding="utf-8")) if kept is not None and kept.is_file() else None
        if (known_mode := first(found)) is not None:
            mode = Mode(**known_mode)
        else:
            fits: Any = {"is_cached": space.is_cached, "max_chunk": space.max_chunk}
            mode = first(fastest(operator, num_vectors=self.probes, asked=self.mode, **fits))
        operator.keeps = mode.name != "fresh"
        if kept is not None:
            write_atomically(kept, json.dumps(asdict(mode)))
        return mode

    def _key(self, subject: "Subject", plan: list[Any]) -> str:
        """All that a run depends on, so that an unfinished one is gone on with by the same run only."""
        from importlib.metadata import version

        seen = [subject.checkpoint.hash, subject.fingerprint, asdict(subject.sample), str(subject.device), plan]
        options = {name: value for name, value in asdict(self).items() if name not in self.redrawn}
        return json.dumps([options, seen, version("ssat-probe"), version("torch")], default=str)

    @staticmethod
    def _keep(folder: Path, subject: "Subject", loss: str, krylov: "Krylov") -> None:
        from ssat_probe.eigenvectors import keep
        from ssat_probe.measures.directions import eigenvectors
        from ssat_probe.measures.processes import place

        if place()[0] == 0:
            keep(folder, subject, loss, eigenvectors(krylov, 2))

    def draw(self, table: "DataFrame") -> "Figure":
        """Density, negative part apart, certified shares below zero; both ends and negative energy per method.

        Args:
            table: What `measure` gave for one or more checkpoints, with the identity columns.

        Returns:
            Six panels; methods with several seeds as mean and 95 % interval over seeds. With several epochs of a run:
            both ends and negative energy over the epochs.
        """
        from ssat_probe import curvature_drawing, spectrum_drawing, trajectory_drawing
        from ssat_probe.measures.spectrum import methods_in

        if trajectory_drawing.is_trajectory(table) and (table["quantity"] == "lambda_max").any():
            return trajectory_drawing.draw(table)

        if methods_in(table) or not (table["quantity"].isin(["alpha", "eigenvalue"])).any():
            return curvature_drawing.draw(table)
        return spectrum_drawing.draw(table)

    def summary(self, table: "DataFrame") -> "DataFrame":
        """One row per checkpoint: both ends, then the negative part from the most to the least certain quantity.

        Args:
            table: What `measure` gave, with the identity columns.

        Returns:
            Shares of eigenvalues as brackets; a star marks an end that has not converged.
        """
        from ssat_probe import spectrum_drawing

        return spectrum_drawing.summary(table)
