"""The embedded digits."""

import re

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ssat_probe.data.digits import Dataset
from ssat_probe.images import split


def test_the_stated_facts_are_those_of_the_images() -> None:
    data = Dataset()
    train, facts = data.images("train"), data.facts
    pixels = train.read(range(len(train))).double() / 255
    assert facts.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-6)
    assert facts.std[0] == pytest.approx(pixels.std(correction=0).item(), abs=1e-6)
    assert (facts.channels, *facts.img_size) == tuple(pixels.shape[1:]) == (1, 8, 8)
    assert set(train.labels) == set(range(facts.num_classes))


def test_the_splits_divide_the_digits_of_scikit_learn() -> None:
    train, test = (Dataset().images(name) for name in ("train", "test"))
    assert (len(train), len(test)) == (1300, 497)
    rows = torch.cat([images.read(range(len(images))) for images in (train, test)]).flatten(1).numpy()
    original = load_digits()
    expected = np.round(original.data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, rows)) == sorted(map(bytes, expected))
    assert rows.max() == 255
    shares = np.bincount(test.labels) / np.bincount(original.target)
    assert np.abs(shares - 497 / 1797).max() < 1 / 174


def test_the_split_never_changes() -> None:
    """Committed checkpoints were trained on it; the hashes are those of the first version."""
    assert Dataset().images("train").fingerprint().startswith("53416c11d326243a")
    assert len(split(Dataset(), "train")) == 1170
    assert len(split(Dataset(), "val")) == 130


def test_another_size_is_made_when_asked_for() -> None:
    data = Dataset(img_size=(16, 12))
    assert data.facts.img_size == (16, 12)
    assert data.images("test").read([0, 3]).shape == (2, 1, 16, 12)


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match=re.escape("No 'val' in splits of digits: train, test.")):
        Dataset().images("val")
