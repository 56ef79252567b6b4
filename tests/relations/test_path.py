"""Paths: ends, barriers, the curve."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssat_probe import relation
from ssat_probe.measures.landscape import barrier
from ssat_probe.relations.path import Relation
from ssat_probe.sample import Sample

Paths = dict[str, Path]
SAMPLE = Sample(num_images=7, batch_size=4, device="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"points": 2}, "got 2, 0 and 0.003"),
        ({"bend_steps": -1}, "bend_steps at least 0"),
        ({"bend_rate": 0.0}, "bend_rate above 0"),
        ({"loss": "l2"}, "No 'l2' in losses"),
    ],
)
def test_options_that_cannot_be_used_say_so(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Relation(**options).measure([], [])


def test_every_pair_has_its_paths_with_exact_ends_and_their_barriers(checkpoints: Paths) -> None:
    paths = list(checkpoints.values())
    table, _ = relation.measure_all(Relation(points=5, bend_steps=3), paths, SAMPLE)
    assert table["pair"].unique().tolist() == ["scratch – SSL+FT", "scratch – SSAT", "SSL+FT – SSAT"]
    points = table[(table["quantity"] == "point") & (table["term"] == "cross_entropy")]
    for (pair, kind), rows in points.groupby(["pair", "kind"]):
        values = rows["value"].to_numpy()
        own = table[(table["pair"] == pair) & (table["kind"] == kind)]
        height = own[(own["quantity"] == "barrier") & (own["term"] == "cross_entropy")]["value"].iloc[0]
        assert height == barrier(np.linspace(0, 1, 5), values)
    ends = points[points["t"].isin((0, 1))].groupby(["pair", "t"])["value"].nunique()
    assert (ends == 1).all()  # both kinds begin and end at the very same losses
    lengths = table[table["quantity"] == "length"].pivot(index="pair", columns="kind", values="value")
    assert (lengths["bezier"] >= lengths["straight"] - 1e-9).all()


def test_the_barrier_in_accuracy_is_what_is_lost(checkpoints: Paths) -> None:
    table, _ = relation.measure_all(Relation(points=5), list(checkpoints.values())[:2], SAMPLE)
    rows = table[table["term"] == "accuracy"]
    values = rows.loc[rows["quantity"] == "point", "value"].to_numpy()
    lost = (np.linspace(values[0], values[-1], 5) - values).max()
    assert rows.loc[rows["quantity"] == "barrier", "value"].iloc[0] == pytest.approx(lost)
