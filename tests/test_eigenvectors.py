"""Eigenvectors on disk: a Hessian run keeps them, a landscape follows them."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from ssat_probe.curvature import operators
from ssat_probe.eigenvectors import kept
from ssat_probe.probes import hessian, landscape
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject

Paths = dict[str, Path]
NAMES = ("top", "top2", "bottom", "bottom2")


def subject(path: Path, sample_seed: int = 0) -> Subject:
    sample = Sample(num_images=13, batch_size=13, device="cpu", dtype="float64", sample_seed=sample_seed)
    return Subject.of(path, sample, "train")


@pytest.fixture(scope="module")
def folder(checkpoints: Paths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("eigenvectors")
    hessian.Probe(steps=25, vectors=made).measure(subject(checkpoints["ssat"]))
    return made


def test_what_a_hessian_run_kept_are_eigenvectors_within_their_residuals(checkpoints: Paths, folder: Path) -> None:
    one = subject(checkpoints["ssat"])
    operator, _ = operators(one, one.parameters())
    found = kept(folder, one, "cross_entropy", NAMES)
    values = [found[name].value for name in ("bottom", "bottom2", "top2", "top")]
    assert values == sorted(values)
    for name in NAMES:
        vector = found[name].vector
        left = float((operator.product(vector) - found[name].value * vector).norm())
        assert left == pytest.approx(found[name].residual, rel=1e-3, abs=1e-9)
        assert float(vector.norm()) == pytest.approx(1)
    assert torch.stack([found[name].vector for name in NAMES]) @ found["top"].vector == pytest.approx(
        torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), abs=1e-9
    )


def test_the_table_of_a_hessian_run_is_the_same_when_it_keeps_them(
    checkpoints: Paths, folder: Path, tmp_path: Path
) -> None:
    one = subject(checkpoints["ssat"])
    plain, keeping = (hessian.Probe(steps=6, vectors=place).measure(one) for place in (None, tmp_path))
    pd.testing.assert_frame_equal(plain, keeping)


def test_a_landscape_follows_kept_eigenvectors_as_it_does_its_own(checkpoints: Paths, folder: Path) -> None:
    one = subject(checkpoints["ssat"])
    options = {"lines": NAMES, "plane": ("top", "bottom2"), "points": 3, "steps": 25, "num_random": 1}
    own, stored = (
        landscape.Probe(**options, eigenvectors=place).measure(one)  # type: ignore[arg-type]
        for place in (None, folder)
    )
    pd.testing.assert_frame_equal(own, stored, rtol=1e-9)
    assert set(stored.loc[stored["quantity"] == "line", "direction"]) == set(NAMES)


def test_missing_eigenvectors_say_how_to_make_them(checkpoints: Paths, folder: Path, tmp_path: Path) -> None:
    words = (
        r"must hold the eigenvectors bottom of .*ssat\.pt for the loss cross_entropy on these 13 images, got none; "
        r"make them with ssat-probe hessian --ckpt .*ssat\.pt --loss cross_entropy --num-images 13 --sample-seed 0 "
    )
    probe = landscape.Probe(lines=("bottom",), plane=(), points=3, eigenvectors=tmp_path)
    with pytest.raises(ValueError, match=words):
        probe.measure(subject(checkpoints["ssat"]))
    for other in (subject(checkpoints["scratch"]), subject(checkpoints["ssat"], sample_seed=1)):
        with pytest.raises(ValueError, match="must hold the eigenvectors top"):
            kept(folder, other, "cross_entropy", ["top"])
    with pytest.raises(ValueError, match="for the loss joint"):
        kept(folder, subject(checkpoints["ssat"]), "joint", ["top"])


def test_vectors_are_of_the_whole_hessian_by_lanczos_and_of_clean_images(tmp_path: Path) -> None:
    for options in ({"method": "exact"}, {"matrix": "gauss_newton"}, {"params": ("head.*",)}, {"steps": 3}):
        with pytest.raises(ValueError, match="keeps eigenvectors of the whole Hessian"):
            hessian.Probe(vectors=tmp_path, **options).measure(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="are of clean images, got --is-augmented"):
        landscape.Probe(eigenvectors=tmp_path, is_augmented=True).measure(None)  # type: ignore[arg-type]
