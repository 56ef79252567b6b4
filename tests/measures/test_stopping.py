"""Rules that stop a Lanczos run."""

import numpy as np
import pytest
import torch

from ssat_probe.measures.lanczos import Krylov, lanczos, ritz
from ssat_probe.measures.stopping import EARLIEST, Until, is_reached, measured, run_length, until


def run(steps: int) -> Krylov:
    generator = np.random.default_rng(3)
    bulk = generator.choice([-1, 1], 440, p=[0.3, 0.7]) * 10 ** generator.uniform(-4, -1, 440)
    values = torch.tensor(np.concatenate([[40, 30, 24, 12, 5, -0.8, -0.5], bulk, np.zeros(53)]))
    return lanczos(lambda vector: values * vector, len(values), steps)


def test_residual_is_the_larger_of_both_ends():
    krylov = run(12)
    found = ritz(krylov)
    ends = [found.residuals[end] / abs(found.values[end]) for end in (0, -1)]
    assert measured("residual", krylov, 0.0) == max(ends)
    assert ends[0] > 100 * ends[1]  # the smallest comes late: the rule waits for it


def test_both_measures_fall_with_steps():
    for rule in ("bracket", "residual"):
        values = [measured(rule, run(steps), 0.0) for steps in (10, 12, 14)]
        assert values[0] > values[1] > values[2]


def test_noise_widens_the_bracket():
    krylov = run(12)
    assert measured("bracket", krylov, 1e-3) > measured("bracket", krylov, 0.0)


def test_all_rules_must_hold_and_none_holds_early():
    krylov = run(12)
    easy, hard = Until("residual", 1.0), Until("bracket", 1e-9)
    assert is_reached([easy], krylov, 0.0)
    assert not is_reached([easy, hard], krylov, 0.0)
    assert not is_reached([], krylov, 0.0)
    assert not is_reached([Until("residual", 1e9)], run(EARLIEST - 1), 0.0)


def test_rows_say_steps_and_what_was_reached():
    rows = run_length([run(12), run(10)], [Until("residual", 1e-3)], 0.0)
    assert [row["value"] for row in rows if row["quantity"] == "steps_used"] == [12, 10]
    reached = [row for row in rows if row["quantity"] == "until_residual"]
    assert [row["converged"] for row in reached] == [1.0, 0.0]
    assert [row["probe"] for row in reached] == [0, 1]
    assert all((row["value"] <= row["high"]) == bool(row["converged"]) for row in reached)


def test_words():
    assert until("bracket=0.01") == Until("bracket", 0.01)
    assert until("residual=1e-3") == Until("residual", 1e-3)
    with pytest.raises(ValueError, match="No 'brackets' in stopping rules: bracket, residual"):
        until("brackets=0.1")
    for text in ("bracket", "bracket=", "bracket=-1", "residual=small"):
        with pytest.raises(ValueError, match=f"as 'bracket=0.01' or 'residual=1e-3', got '{text}'"):
            until(text)
