"""One step: what it draws depends on seed, step and process alone."""

import itertools

import torch

from ssat_probe.recipe import Recipe
from ssat_probe.update import _seed_of, _seeded


def test_seeds_of_steps_and_processes_differ_and_do_not_change() -> None:
    keys = list(itertools.product((0, 1), (0, 1, 2), (0, 1)))
    seeds = [_seed_of(Recipe(seed=seed), step, process) for seed, step, process in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [_seed_of(Recipe(seed=seed), step, process) for seed, step, process in keys]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_a_network_draws_itself_is_seeded_and_the_global_generator_goes_on() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = torch.rand(2)
    drawn = []
    for _ in range(2):
        with _seeded(7, torch.device("cpu")):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)
