"""LiSSA by command, with the settings of an old script: against dense solves and Koh & Liang's own loop in float64."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from ssat_probe.cli import main
from ssat_probe.curvature import in_float64, operators
from ssat_probe.measures.dense import dense
from ssat_probe.probes import hessian
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "vit_nano-digits-scratch-seed0" / "scratch.pt"
WORDS = ("--params", "head.*", "--steps", "3", "--batch-size", "20", "--dtype", "float64", "--device", "cpu")


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    """The Hessian that the command looks at."""
    sample = Sample(num_images=60, batch_size=20, dtype="float64", device="cpu")
    subject = in_float64(Subject.of(CHECKPOINT, sample, "train"))
    found = dense(operators(subject, subject.parameters("cross_entropy"), params=("head.*",))[0])
    return (found + found.T) / 2


@pytest.fixture(scope="module")
def vector(matrix: Tensor) -> Tensor:
    """The right-hand side: the seed is that of --seed."""
    return torch.randn(len(matrix), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command into ``tmp_path``; gives status and the line on stderr."""

    def ran(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        images = () if "--num-images" in words else ("--num-images", "60")
        with pytest.raises(SystemExit) as caught:
            main(["hessian", "--ckpt", str(CHECKPOINT), "--out", str(tmp_path), *WORDS, *images, *words])
        assert isinstance(caught.value.code, int)
        return caught.value.code, capsys.readouterr().err.rstrip("\n")

    return ran


def values(folder: Path) -> dict[str, float]:
    table = pd.read_csv(folder / "hessian.csv")
    singles = table[~table["quantity"].isin(["node", "top_eigenvalue", "bottom_eigenvalue", "mass_below"])]
    return dict(zip(singles["quantity"], singles["value"], strict=True))


@pytest.mark.parametrize(
    ("convention", "damping", "scale", "added"), [("koh_liang", 0.02, 3.0, 0.06), ("absolute", 0.02, 3.0, 0.02)]
)
def test_an_unfinished_recursion_is_that_of_the_script(
    command, tmp_path, matrix, vector, convention, damping, scale, added
):
    depth = 30
    settings = (f"damping={damping}", f"scale={scale}", f"recursion_depth={depth}", f"convention={convention}")
    assert command("--method", "lissa", "--lissa", *settings) == (0, "")
    kept, theirs = 1 - (damping if convention == "koh_liang" else damping / scale), vector
    for _ in range(depth):
        theirs = vector + kept * theirs - matrix @ theirs / scale
    damped = matrix + added * torch.eye(len(matrix), dtype=torch.float64)
    found = values(tmp_path)
    assert found["inverse_residual_lissa"] == pytest.approx(residual(damped, theirs / scale, vector), rel=1e-9)
    assert 0.1 < found["inverse_residual_lissa"] < 1  # far from the end, where any recursion arrives
    assert found["inverse_products_lissa"] == depth + 2
    assert found["inverse_residual_lissa_batches"] == pytest.approx(found["inverse_residual_lissa"], rel=0.1)
    assert found["damping"] == pytest.approx(added)
    assert found["damping_koh_liang"] == pytest.approx(added / scale)
    assert found["scale"] == found["scale_batches"] == scale
    assert found["batch_size"] == 20
    assert json.loads((tmp_path / "hessian.json").read_text())["options"]["lissa"] == list(settings)


def residual(damped: Tensor, solution: Tensor, vector: Tensor) -> float:
    return float((damped @ solution - vector).norm() / vector.norm())


def test_more_samples_leave_less_noise_of_mini_batches(command, tmp_path):
    settings = ("damping=0.2", "scale=0.5", "recursion_depth=30")
    assert command("--method", "lissa", "--lissa", *settings)[0] == 0
    one = values(tmp_path)
    assert one["inverse_residual_lissa"] <= 1e-3
    assert command("--method", "lissa", "--lissa", *settings, "num_samples=9")[0] == 0
    nine = values(tmp_path)
    assert nine["inverse_residual_lissa"] == one["inverse_residual_lissa"]
    assert (
        nine["inverse_residual_lissa_batches"] < 0.6 * one["inverse_residual_lissa_batches"]
    )  # a third, but for chance


def test_settings_that_diverge_are_explained_and_nothing_is_written(command, tmp_path, matrix):
    status, error = command("--method", "lissa", "--lissa", "damping=0.01", "scale=0.1")
    assert status == 2
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert f"λmax = {largest:.4g}, damping 0.01 and scale 0.1" in error
    assert error.endswith(f"Take a scale above {largest / 1.99:.4g}.")
    assert error.count("\n") == 0
    assert not (tmp_path / "hessian.csv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lissa", "damping=0.1", "scale=3"], "--lissa must go with the method lissa, got lanczos. Add --method"),
        (
            ["--method", "lissa", "--compare", "lanczos", "exact", "--lissa", "num_samples=2"],
            "--lissa must go with the method lissa, got lanczos exact.",
        ),
        (["--compare", "lissa", "exact", "--lissa", "num_samples=2"], "without --compare, got --compare. Leave"),
        (["--method", "lissa", "--num-images", "20", "--lissa", "num_samples=2"], "got one batch. Leave num_samples"),
        (["--method", "lissa", "--lissa", "depth=2"], "No 'depth' in settings of LiSSA: "),
    ],
)
def test_settings_without_effect_are_refused_before_anything_is_computed(command, monkeypatch, words, message):
    monkeypatch.setattr("ssat_probe.curvature.room_for", lambda *_, **__: pytest.fail("something was computed"))
    status, error = command(*words)
    assert status == 2
    assert message in error


def test_a_comparison_takes_them_too(command, tmp_path, matrix):
    assert command("--compare", "lissa", "exact", "--lissa", "damping=0.1", "scale=2")[0] == 0
    found = values(tmp_path)
    assert (found["lissa:damping"], found["lissa:scale"]) == (pytest.approx(0.2), 2)
    assert found["exact:lambda_max"] == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]))


def test_an_unfinished_run_is_another_with_other_settings():
    subject = Subject.of(CHECKPOINT, Sample(num_images=7, device="cpu"), "train")
    keys = {hessian.Probe(method="lissa", lissa=lissa)._key(subject, []) for lissa in ((), ("num_samples=2",))}
    assert len(keys) == 2
