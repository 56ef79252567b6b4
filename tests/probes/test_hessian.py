"""The Hessian probe on a small ViT: every number against the dense Hessian, table, summary and figure."""

import dataclasses
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from pyhessian import hessian as pyhessian
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssat_probe import probe as runner
from ssat_probe.curvature import room_for
from ssat_probe.measures import methods
from ssat_probe.measures.dense import dense
from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.jackknife import standard_error
from ssat_probe.measures.lanczos import LanczosRun, lanczos, ritz
from ssat_probe.measures.quadrature import Estimate, spectrum_mass
from ssat_probe.measures.spectrum import WIDEST, runs_of
from ssat_probe.probes import hessian
from ssat_probe.recipe import Recipe
from ssat_probe.sample import Sample
from ssat_probe.training import train

STEPS = 60


@dataclass(frozen=True)
class Batch:
    images: Tensor
    labels: Tensor


@dataclass
class Subject:
    """What the probe asks of a subject, on a real model and real images."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    batch_size: int = 37
    terms: list[str] = field(default_factory=list)
    checkpoint: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(recipe=None, stage="", epoch=""))

    def batches(self) -> Iterator[Batch]:
        for pair in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield Batch(*pair)

    def loss(self, batch: Batch, term: str) -> Tensor:
        self.terms.append(term)
        return F.cross_entropy(self.model(batch.images), batch.labels)

    def parameters(self, term: str) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())


@pytest.fixture(scope="module")
def subject() -> Subject:
    """ViT of 1,600 parameters, trained for a few steps on digits, in float64."""
    torch.manual_seed(3)
    digits = load_digits()
    images = torch.tensor(digits.images[:97] / 8 - 1, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target[:97])
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 10, "depth": 1}
    model = VisionTransformer(**sizes, num_heads=2, mlp_ratio=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return Subject(model.double().eval(), images.double(), labels)


@pytest.fixture(scope="module")
def exact(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of the dense Hessian."""
    operator = HessianOperator(
        subject.parameters(""), lambda b: subject.loss(b, ""), [(b, len(b.images)) for b in subject.batches()]
    )
    matrix = dense(operator).numpy()
    return np.linalg.eigh((matrix + matrix.T) / 2)


@pytest.fixture(scope="module")
def table(subject: Subject) -> pd.DataFrame:
    return hessian.Probe(steps=STEPS, probes=2).measure(subject)


def entry(table: pd.DataFrame, quantity: str, tau: float | None = None) -> pd.Series:
    rows = table[table["quantity"] == quantity]
    return (rows if tau is None else rows[rows["tau"] == tau]).iloc[0]


def probe_weights(eigenvectors: np.ndarray, seed: int) -> np.ndarray:
    size = len(eigenvectors)
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
    return (eigenvectors.T @ start / np.linalg.norm(start)) ** 2


class TestAgainstDenseHessian:
    def test_every_eigenvalue_is_right_within_its_residual(self, table, exact):
        eigenvalues, _ = exact
        assert 1000 < len(eigenvalues) < 3000
        rows = table[
            table["quantity"].isin(["lambda_max", "lambda_min", "top_eigenvalue", "bottom_eigenvalue", "node"])
        ]
        distances = np.abs(rows["value"].to_numpy()[:, None] - eigenvalues).min(axis=1)
        assert (distances <= rows["residual"]).all()
        ends = rows[rows["quantity"] != "node"]
        inside = (ends["low"].to_numpy()[:, None] <= eigenvalues) & (eigenvalues <= ends["high"].to_numpy()[:, None])
        assert inside.any(axis=1).all()

    def test_converged_ends_are_the_ends_of_their_rank(self, table, exact):
        eigenvalues, _ = exact
        for quantity, ordered in (("top_eigenvalue", eigenvalues[::-1]), ("bottom_eigenvalue", eigenvalues)):
            rows = table[(table["quantity"] == quantity) & (table["converged"] == 1)]
            assert len(rows) >= 2
            assert rows["index"].tolist() == list(range(1, len(rows) + 1))
            np.testing.assert_allclose(rows["value"], ordered[: len(rows)], rtol=1e-3)
        assert entry(table, "lambda_max")["value"] == pytest.approx(eigenvalues[-1], rel=1e-9)
        assert entry(table, "lambda_min")["value"] == pytest.approx(eigenvalues[0], rel=1e-6)
        assert entry(table, "lambda_ratio")["value"] == pytest.approx(-eigenvalues[0] / eigenvalues[-1], rel=1e-6)
        assert entry(table, "lambda_max")["converged"] == entry(table, "lambda_min")["converged"] == 1

    def test_every_bracket_contains_the_mass_of_the_probes_and_with_their_error_that_of_the_spectrum(
        self, table, exact
    ):
        eigenvalues, eigenvectors = exact
        weights = np.mean([probe_weights(eigenvectors, seed) for seed in (0, 1_000_003)], axis=0)
        largest = eigenvalues[-1]
        cases = {
            ("mass_below", 1e-3): eigenvalues < -1e-3 * largest,
            ("mass_below", 1e-2): eigenvalues < -1e-2 * largest,
            ("near_zero_mass", 1e-3): np.abs(eigenvalues) <= 1e-3 * largest,
            ("negative_fraction", 0.0): eigenvalues < 0,
        }
        for (quantity, tau), inside in cases.items():
            found = entry(table, quantity, tau)
            assert found["low"] <= weights[inside].sum() <= found["high"], quantity
            bracket = Estimate(found["value"], found["low"], found["high"], found["standard_error"])
            low, high = spectrum_mass(bracket, len(eigenvalues), 2, level=0.999)
            assert low <= inside.mean() <= high, quantity

    def test_negative_energy_and_trace_are_right_within_their_errors(self, table, exact):
        eigenvalues, _ = exact
        energy, total = entry(table, "negative_energy"), entry(table, "trace")
        true = -eigenvalues[eigenvalues < 0].sum() / np.abs(eigenvalues).sum()
        assert energy["low"] - 3 * energy["standard_error"] <= true <= energy["high"] + 3 * energy["standard_error"]
        assert energy["high"] - energy["low"] < 0.02
        assert abs(total["value"] - eigenvalues.sum()) < 3 * total["standard_error"]

    @pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
    def test_pyhessian_finds_the_same_two_largest(self, subject, table):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                theirs = pyhessian(
                    subject.model, nn.CrossEntropyLoss(), data=(subject.images, subject.labels), cuda=False
                )
            values, _ = theirs.eigenvalues(maxIter=500, tol=1e-7, top_n=2)
        finally:
            torch.set_default_dtype(default)
            subject.model.zero_grad(set_to_none=True)
        ours = table[table["quantity"] == "top_eigenvalue"]["value"].to_numpy()[:2]
        np.testing.assert_allclose(values, ours, rtol=1e-3)

    def test_loss_and_gradient_are_those_of_all_images(self, subject, table):
        loss = F.cross_entropy(subject.model(subject.images), subject.labels)
        gradients = torch.autograd.grad(loss, list(subject.model.parameters()))
        assert entry(table, "loss")["value"] == pytest.approx(float(loss.detach()), rel=1e-12)
        norm = float(torch.cat([gradient.reshape(-1) for gradient in gradients]).norm())
        assert entry(table, "gradient_norm")["value"] == pytest.approx(norm, rel=1e-12)


class TestTable:
    def test_columns_are_the_declared_ones_and_rows_follow_the_order_of_report(self, table):
        assert list(table.columns) == [column.name for column in hessian.Probe.columns]
        order = table["quantity"].drop_duplicates().tolist()
        wanted = ["lambda_max", "lambda_min", "lambda_ratio", "negative_energy", "mass_below", "near_zero_mass"]
        assert [name for name in order if name in {*wanted, "negative_fraction"}] == [*wanted, "negative_fraction"]
        assert entry(table, "num_images")["value"] == 97
        assert entry(table, "num_products")["value"] >= 2 * STEPS
        assert (table["quantity"] == "node").sum() == 2 * STEPS
        checks = table[table["quantity"].str.startswith("check_")]
        assert checks["quantity"].tolist() == [
            "check_determinism",
            "check_reduction",
            "check_symmetry",
            "check_finite_difference",
        ]
        assert (checks["value"] <= checks["high"]).all()

    def test_fraction_below_zero_is_refused_as_a_number_when_its_bracket_is_wide(self, table):
        found = entry(table, "negative_fraction")
        assert found["high"] - found["low"] > WIDEST
        assert np.isnan(found["value"])

    def test_fraction_below_zero_is_given_when_its_bracket_is_narrow(self, subject):
        class Small(Subject):
            def parameters(self, term: str) -> dict[str, nn.Parameter]:
                return {"head.bias": self.model.head.bias}

        small = hessian.Probe().measure(Small(subject.model, subject.images, subject.labels))
        found = entry(small, "negative_fraction")
        assert found["value"] == pytest.approx((found["low"] + found["high"]) / 2)
        assert entry(small, "num_parameters")["value"] == 10
        assert (small["quantity"] == "node").sum() == 10

    def test_same_table_twice_and_for_any_batch_size(self, subject):
        probe = hessian.Probe(steps=30)
        one, two = probe.measure(subject), probe.measure(subject)
        pd.testing.assert_frame_equal(one, two)
        for batch_size in (20, 97):
            other = probe.measure(Subject(subject.model, subject.images, subject.labels, batch_size))
            rounding = one["quantity"].str.match("check_|noise|data_batches")
            same = [table[~rounding].drop(columns="data_error") for table in (one, other)]
            pd.testing.assert_frame_equal(*same, rtol=1e-6, atol=1e-9)

    def test_model_is_left_as_found(self, subject):
        before = {name: value.clone() for name, value in subject.model.state_dict().items()}
        state = torch.get_rng_state()
        hessian.Probe(steps=5).measure(subject)
        torch.testing.assert_close(subject.model.state_dict(), before, rtol=0, atol=0)
        assert all(parameter.grad is None and parameter.requires_grad for parameter in subject.model.parameters())
        assert torch.equal(torch.get_rng_state(), state)
        assert not subject.model.training

    def test_asked_loss_is_the_one_measured(self, subject):
        asked = Subject(subject.model, subject.images, subject.labels)
        hessian.Probe(loss="joint", steps=2).measure(asked)
        assert set(asked.terms) == {"joint"}

    def test_progress_goes_through_all_probes(self, subject):
        told = []
        probe = hessian.Probe(steps=3, probes=2)
        probe.measure(subject, told.append)
        assert told == sorted(set(told))
        assert told[-1] == probe.num_steps == 6 + 11  # and the jackknife's
        # Both vectors at once, or one after the other if that is faster; the jackknife follows the first.
        assert told in ([2, 4, 6, 10, 14, 17], [1, 2, 3, 7, 11, 14, 15, 16, 17])

    def test_float32_model_gives_the_same_ends_and_the_same_table_for_any_batch_size(self, subject, table):
        single = Subject(subject.model.float(), subject.images.float(), subject.labels)
        parts = Subject(single.model, single.images, single.labels, batch_size=20)
        try:
            found, other = (hessian.Probe(steps=STEPS).measure(one) for one in (single, parts))
        finally:
            subject.model.double()
        for quantity in ("lambda_max", "lambda_min"):
            wanted = entry(table, quantity)["value"]
            assert entry(found, quantity)["value"] == pytest.approx(wanted, rel=1e-4)
        for name, tau in (("negative_energy", None), ("mass_below", 1e-3), ("near_zero_mass", None), ("trace", None)):
            pair = [entry(one, name, tau)[["value", "low", "high"]].astype(float) for one in (found, other)]
            pd.testing.assert_series_equal(*pair, rtol=1e-3, check_names=False, check_index=False)
        assert entry(found, "noise_floor")["value"] < 1e-4 * entry(found, "lambda_max")["value"]


class TestErrorFromTheData:
    def test_ends_trace_and_energy_have_one_apart_from_the_others(self, table, subject):
        assert set(table.loc[table["data_error"].notna(), "quantity"]) == {
            "lambda_max",
            "lambda_min",
            "trace",
            "negative_energy",
        }
        assert (table["data_error"].dropna() > 0).all()
        assert entry(table, "data_batches")["value"] == 3
        assert entry(table, "data_products")["value"] == 11
        top, batches = entry(table, "lambda_max"), list(subject.batches())
        sizes = np.array([float(len(batch.images)) for batch in batches])
        ends = []
        for left_out in range(3):
            pairs = [(batch, len(batch.images)) for place, batch in enumerate(batches) if place != left_out]
            operator = HessianOperator(subject.parameters(""), lambda b: subject.loss(b, ""), pairs)
            krylov = lanczos(operator.product, operator.size, 40)
            ends.append(ritz(krylov).values[-1])
        assert top["data_error"] == pytest.approx(standard_error(top["value"], np.array(ends), sizes), rel=0.1)

    def test_it_can_be_left_out(self, subject):
        found = hessian.Probe(steps=5, jackknife=False).measure(subject)
        assert found["data_error"].isna().all()
        assert not found["quantity"].str.startswith("data_").any()


class TestRefusals:
    def test_unknown_loss(self, subject):
        with pytest.raises(ValueError, match=r"No 'cross_entropi' in losses: .* Did you mean 'cross_entropy'\?"):
            hessian.Probe(loss="cross_entropi").measure(subject)

    @pytest.mark.parametrize(("option", "value"), [("steps", 1), ("probes", 0)])
    def test_options_out_of_range(self, subject, option, value):
        with pytest.raises(ValueError, match=f"{option} must be at least {value + 1}, got {value}"):
            hessian.Probe(**{option: value}).measure(subject)

    def test_an_unknown_mode_is_named_before_anything_is_computed(self, subject):
        seen = len(subject.terms)
        with pytest.raises(ValueError, match="No 'quick' in modes: auto, cached, fresh, batched"):
            hessian.Probe(mode="quick").measure(subject)
        assert len(subject.terms) == seen

    def test_a_number_of_eigenvectors_is_not_taken_for_a_folder(self, subject):
        with pytest.raises(ValueError, match=r"--vectors must be a folder, .* got 2, which looks like a number"):
            hessian.Probe(vectors=Path("2")).measure(subject)

    @pytest.mark.parametrize(("option", "value"), [("until", ("residual=1e-3",)), ("probes", 2)])
    def test_options_of_lanczos_without_it(self, subject, option, value):
        for chosen in ({"method": "exact"}, {"compare": ("exact", "lissa")}):
            with pytest.raises(ValueError, match=f"--{option} must go with the method lanczos, got exact"):
                hessian.Probe(**chosen, **{option: value}).measure(subject)
        hessian.Probe(compare=("exact", "lanczos"), **{option: value})._check()

    @pytest.mark.parametrize("method", ["exact", "pyhessian"])
    def test_steps_without_a_method_that_makes_them(self, subject, method):
        sentence = rf"--steps must go with the method lanczos or lissa or batches, got {method}\. Leave it out"
        with pytest.raises(ValueError, match=sentence):
            hessian.Probe(method=method, steps=7).measure(subject)
        hessian.Probe(compare=(method, "lissa"), steps=7)._check()

    @pytest.mark.parametrize(
        ("method", "settings"), [("batches", ()), ("lissa", ("damping=0.1", "scale=30"))], ids=["batches", "lissa"]
    )
    def test_mini_batches_that_do_not_fit_are_not_cut_in_secret(self, method, settings):
        checkpoint = Path(__file__).parents[2] / "checkpoints" / "vit_nano-digits-scratch-seed0" / "scratch.pt"
        small: dict[str, Any] = {"method": method, "lissa": settings, "memory": 6e-3, "steps": 2}
        sample = Sample(num_images=32, batch_size=16, device="cpu")
        said = (
            rf"The method {method} must have whole batches of 16 images, got room for \d+\. Take a smaller --batch-size"
        )
        with pytest.raises(ValueError, match=said):
            runner.measure_all(hessian.Probe(**small), [checkpoint], sample)

    def test_limits_of_an_exact_spectrum(self, subject):
        with pytest.raises(ValueError, match="most_seconds must be more than 0 s, got 0"):
            hessian.Probe(method="exact", most_seconds=0.0).measure(subject)
        with pytest.raises(ValueError, match=r"must take at most 0\.001 s, got an estimate of .* At most"):
            hessian.Probe(method="exact", most_seconds=1e-3).measure(subject)
        for call in ("measure", "estimate"):  # before anything is timed
            with pytest.raises(ValueError, match=r"must fit into 0\.001 GiB, got 1\d\d\d parameters that need"):
                getattr(hessian.Probe(method="exact", memory=1e-3), call)(subject)

    def test_an_exact_spectrum_says_before_what_it_will_cost(self, subject):
        line = hessian.Probe(compare=("lanczos", "exact")).estimate(subject)
        assert line.startswith("exact spectrum of 1,"), line
        assert "GiB of matrices: about" in line
        assert hessian.Probe().estimate(subject) == ""

    def test_failed_certificate_comes_before_any_number(self, subject):
        class Noisy(Subject):
            def loss(self, batch: Batch, term: str) -> Tensor:
                return super().loss(batch, term) * (1 + 1e-3 * torch.rand(()))

        told = []
        with pytest.raises(ValueError, match="must pass the check of determinism, got"):
            hessian.Probe(steps=3).measure(Noisy(subject.model, subject.images, subject.labels), told.append)
        assert told == []


class TestRunControl:
    def test_a_small_budget_cuts_batches_and_changes_no_number(self, subject):
        probe = hessian.Probe(steps=20)
        whole, one = probe.measure(subject), hessian.Probe(steps=20, memory=1e-3).measure(subject)
        # The jackknife leaves out what is read at once: smaller batches, and more of them.
        is_other = whole["quantity"].str.match("check_|noise|data_")
        same = [table[~is_other].drop(columns="data_error") for table in (one, whole)]
        pd.testing.assert_frame_equal(*same, rtol=1e-6, atol=1e-9)
        space = room_for(subject, subject.parameters(""), max_bytes=2**20, num_vectors=20)
        assert not space.is_cached
        assert space.micro_batch < subject.batch_size

    def test_a_basis_that_lies_on_disk_takes_no_error_away(self, subject):
        found = hessian.Probe(steps=STEPS, memory=1.1e-3).measure(subject)
        assert found.attrs["memory"]["home"] == "disk"
        rows = found[found["quantity"].isin(["lambda_max", "lambda_min", "trace", "negative_energy"])]
        assert (rows["data_error"] > 0).all()

    def test_a_budget_too_small_is_refused(self, subject):
        with pytest.raises(ValueError, match=r"memory must be at least .* GiB .* got 1e-05"):
            hessian.Probe(memory=1e-5).measure(subject)

    def test_rules_are_checked_and_obeyed(self, subject):
        with pytest.raises(ValueError, match=r"as 'bracket=0.01' or 'residual=1e-3', got 'bracket=x'"):
            hessian.Probe(until=("bracket=x",)).measure(subject)
        table = hessian.Probe(steps=STEPS, until=("residual=0.5", "bracket=0.2")).measure(subject)
        assert 10 <= entry(table, "steps_used")["value"] < STEPS
        assert entry(table, "until_residual")["converged"] == entry(table, "until_bracket")["converged"] == 1
        assert entry(table, "until_bracket")["high"] == 0.2

    def test_an_interrupted_command_goes_on_and_another_does_not(self, tmp_path, monkeypatch):
        checkpoint = Path(__file__).parents[2] / "checkpoints" / "vit_nano-digits-scratch-seed0" / "scratch.pt"
        sample = Sample(num_images=7, device="cpu")
        monkeypatch.setattr(methods, "SAVE_EVERY_S", 0.0)
        products: list[int] = []
        take = LanczosRun.take
        monkeypatch.setattr(LanczosRun, "take", lambda run, image: (products.append(1), take(run, image)))

        def run(out: str, steps: int = 4, num_images: int = 7, stop: int = 0) -> pd.DataFrame:
            def progress(done: int, total: int, text: str) -> None:
                if total == hessian.Probe(steps=steps).num_steps and stop and done >= stop:
                    raise KeyboardInterrupt

            products.clear()
            chosen = dataclasses.replace(sample, num_images=num_images)
            return runner.run(hessian.Probe(steps=steps), [checkpoint], chosen, tmp_path / out, progress)

        whole = run("whole")
        assert len(products) == 4
        with pytest.raises(KeyboardInterrupt):
            run("cut", stop=3)
        assert (tmp_path / "cut" / ".hessian-unfinished").is_dir()
        for other in ({"steps": 5}, {"num_images": 8}):
            with pytest.raises(KeyboardInterrupt):
                run("cut", stop=2, **other)
            assert len(products) == 2
        pd.testing.assert_frame_equal(run("cut"), whole, check_exact=True)
        assert len(products) == 1
        assert not (tmp_path / "cut" / ".hessian-unfinished").exists()


class TestFigure:
    def test_draws_and_sums_up_from_a_saved_table(self, table):
        saved = pd.read_csv(io.StringIO(table.to_csv(index=False)))
        identity = {"checkpoint": "a", "model": "vit", "method": "ssat", "data": "digits", "seed": 0, "epoch": 7}
        named = saved.assign(**identity)
        assert len(hessian.Probe().draw(named).axes) == 6
        assert hessian.Probe().summary(named)["checkpoint"].tolist() == ["a"]

    def test_runs_come_back_from_the_saved_table(self, subject):
        table = hessian.Probe(steps=7).measure(subject).assign(checkpoint="a")
        (back,) = runs_of(pd.read_csv(io.StringIO(table.to_csv(index=False))))
        np.testing.assert_allclose(back.alphas, table[table["quantity"] == "alpha"]["value"], rtol=1e-14)
        np.testing.assert_allclose(back.betas, table[table["quantity"] == "beta"]["value"], rtol=1e-14)
        assert back.breaks == ()


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_the_edge_of_stability_stands_beside_the_spectra_of_a_descent_alone(tmp_path: Path, optimiser: Any) -> None:
    plain: dict[str, Any] = {"augmentation": "none", "weight_decay": 0.0, "label_smoothing": 0.0, "warmup_epochs": 0.0}
    plain |= {"base_lr": 0.04, "lr_rule": "none", "min_lr": 0.01, "subset": 20, "batch_size": 20, "epochs": 3}
    run = train(Recipe(method="scratch", optimiser=optimiser, **plain), tmp_path, device="cpu", snapshots=True)
    paths, look = sorted((run.path.parent / "snapshots").iterdir()), Sample(num_images=10, device="cpu")
    table, _ = runner.measure_all(hessian.Probe(steps=3), paths, look)
    edges = table[table["quantity"] == "edge_of_stability"]
    rates = [0.01 + 0.03 * (1 + np.cos(np.pi * epoch / 3)) / 2 for epoch in range(4)]
    assert edges["value"].tolist() == (pytest.approx([2 / rate for rate in rates]) if optimiser == "sgd" else [])
    assert edges["epoch"].tolist() == ([0, 1, 2, 3] if optimiser == "sgd" else [])
    assert [ax.get_xlabel() for ax in hessian.Probe().draw(table).axes] == ["epochs"] * 3
    part, _ = runner.measure_all(hessian.Probe(steps=3, params=("head.*",)), paths[:1], look)
    assert "edge_of_stability" not in set(part["quantity"])
