"""Blocks that leave the random state as they found it, and do not mind whether gradients are switched on outside."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever draws random numbers inside the block, the global generators stand afterwards where they stood."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def undisturbed() -> Iterator[None]:
    """The same with gradients switched on."""
    with torch.inference_mode(False), torch.enable_grad(), random_state_kept():
        yield
