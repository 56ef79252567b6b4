"""Global random state and gradient mode around blocks."""

import random

import numpy as np
import pytest
import torch

from ssat_probe.measures.isolation import random_state_kept, undisturbed


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), float(torch.rand(()))


@pytest.mark.parametrize("block", [random_state_kept, undisturbed])
def test_all_global_generators_are_put_back(block):
    drawn = []
    for _ in range(2):
        with block():
            drawn.append(draw())
    assert drawn[0] == drawn[1] == draw()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_inside_whatever_they_are_outside(mode):
    with mode(), undisturbed():
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert torch.ones(1, requires_grad=True).square().requires_grad
