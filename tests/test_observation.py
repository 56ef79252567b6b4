from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ssat_probe import capture, observation
from ssat_probe.observation import Sum
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject

Paths = dict[str, Path]
SAMPLE = Sample(num_images=13, batch_size=5, device="cpu", dtype="float64")


def rows(seen: capture.Attention) -> dict[str, torch.Tensor | Sum]:
    weights = seen.rows.softmax(-1)
    return {"largest": weights.amax(-1), "received": Sum(weights.sum(2))}


def finish(values: observation.Values) -> tuple[observation.Values, observation.Values]:
    return {"largest": values["largest"].mean(-1), "most": values["received"].amax(-1)}, {}


@pytest.mark.parametrize(("most_weights", "most_rows"), [(1, 1), (400, 100), (10**9, 1), (10**9, 10**9)])
def test_chunks_and_batches_do_not_enter(
    checkpoints: Paths, monkeypatch: pytest.MonkeyPatch, most_weights: int, most_rows: int
) -> None:
    subject = Subject.of(checkpoints["ssat"], SAMPLE)
    expected = observation.of_attention(subject, rows, finish)
    monkeypatch.setattr(observation, "MOST_WEIGHTS", most_weights)
    monkeypatch.setattr(observation, "MOST_ROWS", most_rows)
    found = observation.of_attention(replace(subject, sample=replace(SAMPLE, batch_size=4)), rows, finish)
    assert found.num_images == 13
    for block, one in found.statistics.items():
        for name in ("largest", "most"):
            torch.testing.assert_close(one.mean(name), expected.statistics[block].mean(name), rtol=0, atol=1e-12)
            torch.testing.assert_close(one.sd(name), expected.statistics[block].sd(name), rtol=0, atol=1e-12)
    assert sorted(found.errors) == list(range(6))


def test_sums_over_chunks_are_those_over_all_queries(checkpoints: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observation, "MOST_WEIGHTS", 1)
    subject = Subject.of(checkpoints["ssat"], replace(SAMPLE, num_images=3))
    seen = observation.of_attention(subject, rows, lambda values: ({"sum": values["received"].sum(-1)}, {}), [4])
    assert list(seen.statistics) == [4]
    torch.testing.assert_close(seen.statistics[4].mean("sum"), torch.full((4,), 17.0).double())


def test_the_fraction_of_queries_without_a_value_is_kept(checkpoints: Paths) -> None:
    def some(seen: capture.Attention) -> dict[str, torch.Tensor]:
        values = seen.rows.softmax(-1).amax(-1)
        values[:, :, 0] = torch.nan
        values[:, 1] = torch.nan
        return {"largest": values}

    seen = observation.of_attention(Subject.of(checkpoints["ssat"], SAMPLE), some)
    found = seen.statistics[0]
    assert found.spread("largest", 0)["largest_undefined"] == pytest.approx(1 / 17)
    assert found.spread("largest", 1)["largest_undefined"] == 1


def test_only_the_first_batch_is_checked_and_no_gradient_is_kept(checkpoints: Paths) -> None:
    seen: list[bool] = []

    def look(one: capture.Attention) -> dict[str, torch.Tensor]:
        seen.append(one.rows.requires_grad)
        return {"x": one.rows.amax(-1)}

    found = observation.of_attention(Subject.of(checkpoints["ssat"], SAMPLE), look)
    assert not any(seen)
    assert all(error < 1e-12 for error in found.errors.values())


@pytest.mark.parametrize(
    ("change", "is_comparable"),
    [
        (lambda one: one, True),
        (lambda one: replace(one, images="others"), False),
        (lambda one: replace(one, setting="224x224 px, 14x14 patches, 000000"), False),
        (lambda one: replace(one, statistics={0: None}), False),
    ],
)
def test_only_like_is_compared_with_like(
    checkpoints: Paths, change: Callable[..., observation.Observation], is_comparable: bool
) -> None:
    first, second = (
        observation.of_features(Subject.of(checkpoints[name], SAMPLE), lambda x: {"mean": x.mean((1, 2))})
        for name in ("scratch", "ssat")
    )
    assert first.comparable(first) is None
    assert second.comparable(None) is None
    assert (change(second).comparable(first) is first) == is_comparable
