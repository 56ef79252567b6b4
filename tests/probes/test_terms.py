"""Spectra of the terms of a loss: sums of operators, a quadratic in closed form, a real checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from ssat_probe.curvature import in_float64, operators, shared_parameters
from ssat_probe.measures.dense import dense
from ssat_probe.probes import terms
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject

WEIGHT = 0.3


@pytest.fixture(scope="module")
def subject(checkpoints: dict[str, Path]) -> Subject:
    return in_float64(Subject.of(checkpoints["ssat"], Sample(num_images=11, batch_size=4, device="cpu"), "train"))


class TestSharedParameters:
    def test_they_are_the_encoder_without_head_and_decoder(self, subject):
        names = list(shared_parameters(subject))
        assert names == [name for name in subject.parameters() if not name.startswith("head.")]
        assert {"norm.weight", "blocks.0.attn.qkv.weight"} <= set(names)

    def test_without_a_decoder_they_are_all_that_the_cross_entropy_uses(self, checkpoints):
        subject = Subject.of(checkpoints["scratch"], Sample(num_images=4, device="cpu"), "train")
        assert list(shared_parameters(subject)) == list(subject.parameters())


def test_the_joint_operator_is_the_weighted_sum_to_rounding(subject):
    shared = shared_parameters(subject)
    found = {term: operators(subject, shared, term)[0] for term in terms.LABELS}
    weight = subject.checkpoint.recipe.lambda_weight
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        along = torch.randn(found["joint"].size, generator=generator, dtype=torch.float64)
        parts = {term: operator.product(along) for term, operator in found.items()}
        expected = weight * parts["cross_entropy"] + (1 - weight) * parts["reconstruction"]
        assert float((parts["joint"] - expected).norm() / expected.norm()) < 1e-13


@dataclass
class Quadratics:
    """Two quadratic terms of the same four weights; a third of each has weights of its own."""

    decoder: nn.Module | None
    theta: nn.Parameter
    head: nn.Parameter

    def batches(self) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(images=torch.zeros(3))

    def parameters(self, term: str = "cross_entropy") -> dict[str, nn.Parameter]:
        return {"theta": self.theta, "head": self.head}

    def loss(self, batch: object, term: str) -> Tensor:
        curvature = {
            "cross_entropy": torch.tensor([9.0, 4.0, 1.0, -2.0]).double(),
            "reconstruction": torch.tensor([1.0, 50.0, 60.0, -4.0]).double(),
        }
        if term == "joint":
            return WEIGHT * self.loss(batch, "cross_entropy") + (1 - WEIGHT) * self.loss(batch, "reconstruction")
        own = self.head.square().sum() if term == "cross_entropy" else 0.0
        return (curvature[term] * self.theta.square()).sum() / 2 + own

    @property
    def checkpoint(self) -> SimpleNamespace:
        return SimpleNamespace(recipe=SimpleNamespace(lambda_ends=(WEIGHT, WEIGHT)))


@pytest.fixture(scope="module")
def quadratic() -> pd.DataFrame:
    subject = Quadratics(nn.Identity(), nn.Parameter(torch.ones(4).double()), nn.Parameter(torch.ones(2).double()))
    return terms.Probe(steps=4, top=2).measure(subject)


def value(table: pd.DataFrame, term: str, quantity: str, other: str = "") -> float:
    rows = table[(table["term"] == term) & (table["other"] == other) & (table["quantity"] == quantity)]
    return float(rows["value"].iloc[0])


class TestClosedForm:
    def test_ends_and_energy_of_each_term(self, quadratic):
        assert value(quadratic, "cross_entropy", "num_parameters") == 4
        joint = WEIGHT * np.array([9, 4, 1, -2]) + (1 - WEIGHT) * np.array([1, 50, 60, -4])
        for term, values in {"cross_entropy": [9, 4, 1, -2], "reconstruction": [1, 50, 60, -4], "joint": joint}.items():
            assert value(quadratic, term, "lambda_max") == pytest.approx(max(values))
            assert value(quadratic, term, "lambda_min") == pytest.approx(min(values))
            assert value(quadratic, term, "negative_energy") == pytest.approx(-min(values) / np.abs(values).sum())

    def test_overlaps_count_the_shared_directions(self, quadratic):
        # top two: {0, 1}, {1, 2} and {1, 2}
        assert value(quadratic, "cross_entropy", "overlap", "reconstruction") == pytest.approx(0.5)
        assert value(quadratic, "cross_entropy", "overlap", "joint") == pytest.approx(0.5)
        assert value(quadratic, "reconstruction", "overlap", "joint") == pytest.approx(1)
        assert value(quadratic, "reconstruction", "chance", "joint") == pytest.approx(2 / 4)
        cosines = quadratic[(quadratic["quantity"] == "cosine") & (quadratic["other"] == "reconstruction")]["value"]
        np.testing.assert_allclose(cosines, [1, 0], atol=1e-7)

    def test_share_of_the_cross_entropy_in_the_joint_directions(self, quadratic):
        shares = quadratic[quadratic["quantity"] == "cross_entropy_share"]["value"]
        expected = [WEIGHT * 1 / (WEIGHT * 1 + (1 - WEIGHT) * 60), WEIGHT * 4 / (WEIGHT * 4 + (1 - WEIGHT) * 50)]
        np.testing.assert_allclose(shares, expected)


def test_on_a_checkpoint_the_overlap_is_that_of_the_dense_hessians(subject):
    class Head(Subject):
        def parameters(self, term: str = "cross_entropy") -> dict[str, nn.Parameter]:
            everything = super().parameters(term)
            return {name: everything[name] for name in ("norm.weight",)}

    part = Head(**vars(subject))
    table = terms.Probe(steps=60, top=3).measure(part)
    spaces = []
    for term in ("cross_entropy", "joint"):
        operator, _ = operators(part, shared_parameters(part), term)
        spaces.append(torch.linalg.eigh(dense(operator))[1][:, -3:])
    expected = float((spaces[0].T @ spaces[1]).square().sum()) / 3
    assert value(table, "cross_entropy", "overlap", "joint") == pytest.approx(expected, rel=1e-6)
    sure = table[table["quantity"] == "overlap"]["converged"]
    assert (sure == 1).all()


def test_a_checkpoint_without_a_decoder_has_one_term(checkpoints):
    subject = Subject.of(checkpoints["scratch"], Sample(num_images=4, device="cpu", dtype="float64"), "train")
    table = terms.Probe(steps=3).measure(subject)
    assert set(table["term"]) == {"cross_entropy"}
    assert not (table["quantity"] == "overlap").any()


def test_options_out_of_range():
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        terms.Probe(top=0).measure(None)
