import numpy as np
import torch

from ssat_probe.measures.histogram import EDGES, histogram

SHAPE = (2, 3, 5, 7)
AT_ZERO = EDGES.index(-0.125)


def test_against_numpy(generator):
    logs = (3 * torch.randn(*SHAPE, generator=generator("weights"), dtype=torch.float64)).log_softmax(-1)
    share, mass = histogram(logs)
    for image, ours, held in zip(logs.numpy(), share, mass, strict=True):
        places = np.clip(np.log10(np.exp(image) * 7).ravel(), -4.124, 4.124)
        np.testing.assert_allclose(ours, np.histogram(places, EDGES)[0] / places.size)
        weights = np.exp(image).ravel()
        np.testing.assert_allclose(held, np.histogram(places, EDGES, weights=weights)[0] / weights.sum())


def test_uniform_attention_lies_in_one_bin_whatever_the_number_of_keys():
    for keys in (7, 196):
        share, mass = histogram(torch.zeros(1, 1, 2, keys).log_softmax(-1))
        assert share[0, AT_ZERO].item() == mass[0, AT_ZERO].item() == 1


def test_masked_keys_are_left_out():
    logs = torch.tensor([0.5, 0.5, 0.0]).log()[None, None, None]
    share, _ = histogram(logs.double())
    assert share[0, AT_ZERO].item() == 1


def test_one_hot_attention_has_its_mass_above_uniform_and_its_weights_below():
    logs = torch.tensor([[0.0, -50, -50, -50]]).log_softmax(-1)[None, None]
    share, mass = histogram(logs)
    assert share[0, 0].item() == 0.75  # beyond the lowest edge
    assert mass[0, EDGES.index(0.375)].item() == 1  # log10(4) = 0.6
