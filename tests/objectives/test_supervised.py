from collections.abc import Callable

import numpy as np
import pytest
import torch

from ssat_probe.mixing import mix
from ssat_probe.network import build_decoder, build_encoder
from ssat_probe.objectives.supervised import Objective

Make = Callable[..., tuple]
BATCH, CLASSES = 5, 7


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_label_smoothing_by_hand(
    make_recipe: Make, generator: Callable[[str], torch.Generator], smoothing: float
) -> None:
    recipe, facts = make_recipe(num_classes=CLASSES, label_smoothing=smoothing)
    encoder = build_encoder(recipe, facts).double()
    images = torch.randn(BATCH, 1, 8, 8, generator=generator("images"), dtype=torch.float64)
    labels = torch.tensor([6, 0, 3, 3, 1])
    losses = Objective(recipe, encoder)(images, labels, torch.rand(BATCH, 16))
    logits = encoder(images).detach().numpy()
    log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = np.full((BATCH, CLASSES), smoothing / CLASSES)
    target[np.arange(BATCH), labels.numpy()] += 1 - smoothing
    assert float(losses.total.detach()) == pytest.approx(-(target * log).sum(axis=1).mean(), rel=1e-12)
    assert losses.cross_entropy == losses.total
    assert losses.reconstruction is None
    np.testing.assert_array_equal(losses.logits, logits)


def test_there_is_no_decoder_in_the_objective(make_recipe: Make) -> None:
    recipe, facts = make_recipe(method="scratch")
    encoder, decoder = build_encoder(recipe, facts), build_decoder(recipe, facts)
    objective = Objective(recipe, encoder, decoder)
    assert {id(p) for p in objective.parameters()} == {id(p) for p in encoder.parameters()}
    objective(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), torch.rand(2, 16)).total.backward()
    assert all(parameter.grad is None for parameter in decoder.parameters())
    assert all(parameter.grad is not None for parameter in encoder.parameters() if parameter.requires_grad)


def test_a_mixed_batch_is_judged_by_both_classes(
    make_recipe: Make, generator: Callable[[str], torch.Generator]
) -> None:
    recipe, facts = make_recipe(num_classes=CLASSES, label_smoothing=0.1, mixup=0.8)
    encoder = build_encoder(recipe, facts).double()
    images = torch.randn(BATCH, 1, 8, 8, generator=generator("images"), dtype=torch.float64)
    labels = torch.tensor([6, 0, 3, 3, 1])
    objective = Objective(recipe, encoder)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        losses = objective(images, labels, torch.rand(BATCH, 16))
        torch.manual_seed(5)
        torch.rand(BATCH, 16)
        mixed, others, share = mix(images, labels, mixup=0.8, cutmix=0.0)
    one_hot = torch.eye(CLASSES, dtype=torch.float64)
    weights = 0.9 * (share * one_hot[labels] + (1 - share) * one_hot[others]) + 0.1 / CLASSES
    expected = -(weights * encoder(mixed).log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(losses.total, expected)
    assert losses.logits is None
    plain = Objective(make_recipe(num_classes=CLASSES, label_smoothing=0.1)[0], encoder)
    assert (
        objective.eval()(images, labels, torch.rand(BATCH, 16)).total
        == plain(images, labels, torch.rand(BATCH, 16)).total
    )
