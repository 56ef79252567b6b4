"""The landscape probe: what it refuses, what its figure shows."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ssat_probe import probe
from ssat_probe.probes.landscape import Probe
from ssat_probe.sample import Sample

Paths = dict[str, Path]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plane": ("top",)}, "two different directions or none, got 'top'"),
        ({"plane": ("top", "top")}, "two different directions or none, got 'top top'"),
        ({"points": 4}, "points must be an odd number of at least 3, got 4"),
        ({"num_random": 0}, "num_random must be at least 1 and steps at least 2, got 0 and 40"),
        ({"extent": 0.0}, "extent must be a number above 0, got 0.0"),
        ({"lines": ("tpo",)}, "No 'tpo' in directions: .* Did you mean 'top'"),
        ({"normalisation": "filtre"}, "No 'filtre' in normalisations"),
        ({"vectors": "no"}, "No 'no' in ways to treat vectors"),
        ({"loss": "l2"}, "No 'l2' in losses"),
        ({"jobs": 0}, "jobs and num_batches must be at least 1, got 0 and 8"),
    ],
)
def test_options_that_cannot_be_used_say_so(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Probe(**options).measure(None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def table(checkpoints: Paths) -> pd.DataFrame:
    sample = Sample(num_images=13, batch_size=13, device="cpu")
    chosen = Probe(points=5, num_random=2, steps=6, plane=("top", "bottom"))
    return probe.measure_all(chosen, list(checkpoints.values()), sample)[0]


def test_the_summary_names_the_loss_and_the_worst_check(table: pd.DataFrame) -> None:
    shown = Probe().summary(table)
    assert {"cross_entropy", "sharpness_worst", "convex_share", "largest check error"} <= set(shown)
    assert (shown["largest check error"] < 0.05).all()
