"""The state of a run on disk; that resuming is bit-exact is proven in test_training."""

import dataclasses

import pytest
import torch

from ssat_probe.recipe import Recipe
from ssat_probe.run import State, refuse_other, snapshot_epochs


def test_state_survives_its_trip_through_plain_data() -> None:
    state = State(stage=1, epoch=2, step=3, sums={"loss": 0.1}, rows=[{"epoch": 1}], cost={"train": {"images": 5.0}})
    assert State(**dataclasses.asdict(state)) == state
    assert not any(isinstance(value, torch.Tensor) for value in dataclasses.asdict(state).values())


def test_the_first_field_that_differs_is_named(tmp_path: object) -> None:
    there = Recipe(lambda_weight=0.5)
    refuse_other(there, Recipe(lambda_weight=0.5), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got one with lambda_weight 0\.5 instead of 0\.1; choose another folder"):
        refuse_other(there, Recipe(lambda_weight=0.1), tmp_path)  # type: ignore[arg-type]


def test_snapshots_are_closest_at_the_beginning_and_hold_both_ends() -> None:
    assert snapshot_epochs(1) == [0, 1]
    assert snapshot_epochs(20) == [0, 1, 2, 3, 4, 6, 8, 11, 16, 20]
    assert len(snapshot_epochs(1000)) == 21
