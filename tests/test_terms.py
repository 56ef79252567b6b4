"""Terms of the loss: each by itself, the same as the subject's own, whatever the batch size."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ssat_probe.sample import Sample
from ssat_probe.subject import Subject
from ssat_probe.terms import NAMES, Terms, error_of, value_of

Paths = dict[str, Path]


def subject(path: Path, batch_size: int = 11) -> Subject:
    return Subject.of(path, Sample(num_images=11, batch_size=batch_size, device="cpu", dtype="float64"), "train")


def test_terms_are_those_of_the_subject(checkpoints: Paths) -> None:
    one = subject(checkpoints["ssat"])
    (batch,) = one.batches()
    found = Terms(one, one.parameters())()[None]
    for term in ("cross_entropy", "reconstruction", "joint"):
        assert value_of(found, term)[0] == pytest.approx(float(one.loss(batch, term).detach()))
    right = (one.model(batch.images).argmax(1) == batch.labels).double().mean()
    assert value_of(found, "accuracy")[0] == float(right)


def test_l2_is_half_the_decay_times_the_squares_of_matrices_alone(checkpoints: Paths) -> None:
    one = subject(checkpoints["scratch"])
    squares = sum(float((p.detach() ** 2).sum()) for p in one.parameters().values() if p.ndim > 1)
    assert value_of(Terms(one, one.parameters())()[None], "l2")[0] == pytest.approx(0.5 * 0.05 * squares)


def test_without_a_decoder_its_terms_are_not_there(checkpoints: Paths) -> None:
    one = subject(checkpoints["scratch"])
    terms = Terms(one, one.parameters())
    assert terms.present == ("cross_entropy", "l2", "accuracy")
    found = terms()[None]
    assert [np.isnan(value_of(found, name)[0]) for name in NAMES] == [False, True, True, False, False]


def test_no_batch_size_enters_also_where_images_are_augmented(checkpoints: Paths) -> None:
    for is_augmented in (False, True):
        found = [
            Terms(one, one.parameters(), is_augmented)() for one in (subject(checkpoints["ssat"], n) for n in (2, 11))
        ]
        np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    one = subject(checkpoints["ssat"])
    clean, augmented, again = (Terms(one, one.parameters(), kind)() for kind in (False, True, True))
    assert np.array_equal(augmented, again)
    assert clean[0] != augmented[0]


def test_standard_errors_are_over_images(checkpoints: Paths) -> None:
    one = subject(checkpoints["ssat"])
    (batch,) = one.batches()
    losses = torch.nn.functional.cross_entropy(one.model(batch.images), batch.labels, reduction="none").detach()
    found = Terms(one, one.parameters())()[None]
    assert error_of(found, "cross_entropy")[0] == pytest.approx(float(losses.std()) / 11**0.5)
    assert np.isnan(error_of(found, "l2")[0])


def test_a_broken_model_has_no_accuracy(checkpoints: Paths) -> None:
    one = subject(checkpoints["ssat"])
    terms = Terms(one, one.parameters())
    with torch.no_grad():
        one.model.head.bias[0] = float("nan")
    found = terms()[None]
    assert np.isnan(value_of(found, "cross_entropy")[0])
    assert np.isnan(value_of(found, "accuracy")[0])
