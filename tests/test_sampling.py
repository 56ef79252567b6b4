"""Which images: counts per class against hand-made ones, and the bounds for any labels."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssat_probe.sampling import holdout, stratified_subset

LABELS = np.repeat([0, 1, 2], [50, 30, 20])

label_lists = st.lists(st.integers(0, 6), min_size=1, max_size=97).map(np.array)


def counts(ids: np.ndarray) -> list[int]:
    return np.bincount(LABELS[ids], minlength=3).tolist()


def test_no_subset_is_everything() -> None:
    np.testing.assert_array_equal(stratified_subset(LABELS, None, seed=0), np.arange(100))


@pytest.mark.parametrize(
    ("subset", "expected"),
    [(10, [5, 3, 2]), (0.1, [5, 3, 2]), (100, [50, 30, 20]), (3, [1, 1, 1]), (1, [1, 0, 0]), (11, [6, 3, 2])],
)
def test_classes_are_in_proportion(subset: float, expected: list[int]) -> None:
    ids = stratified_subset(LABELS, subset, seed=0)
    assert counts(ids) == expected
    assert (np.diff(ids) > 0).all()


def test_a_rare_class_keeps_one_image() -> None:
    labels = np.repeat([0, 1], [97, 2])
    assert np.bincount(labels[stratified_subset(labels, 10, seed=0)]).tolist() == [9, 1]


def test_the_seed_alone_decides_which_images() -> None:
    first, again, other = (stratified_subset(LABELS, 23, seed) for seed in (5, 5, 7))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
    assert counts(first) == counts(other)


def test_a_larger_subset_repeats_the_smaller_one() -> None:
    assert set(stratified_subset(LABELS, 20, seed=3)) <= set(stratified_subset(LABELS, 40, seed=3))


def test_global_randomness_is_neither_used_nor_touched() -> None:
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    stratified_subset(LABELS, 11, seed=0)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("subset", [0, -3, 101, 0.0, 1.0, 1.5, -0.2, float("nan"), True])
def test_a_subset_outside_its_range_is_an_error(subset: object) -> None:
    sentence = f"count from 1 to the 100 images there are, or a share between 0 and 1, got {subset!r}; choose one"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        stratified_subset(LABELS, subset, seed=0)


@given(label_lists, st.data())
@settings(deadline=None, max_examples=60)
def test_any_subset_has_its_size_and_every_class_its_share(labels: np.ndarray, data: st.DataObject) -> None:
    total = data.draw(st.integers(1, len(labels)))
    ids = stratified_subset(labels, total, seed=11)
    assert len(np.unique(ids)) == total
    classes, sizes = np.unique(labels, return_counts=True)
    got = np.array([(labels[ids] == name).sum() for name in classes])
    if total >= len(classes):
        assert (got >= 1).all()
    quota = total * sizes / len(labels)
    if (quota >= 1).all() or total < len(classes):
        assert (np.abs(got - quota) < 1 + 1e-9).all()


@given(label_lists, st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=60)
def test_any_holdout_divides_the_images_and_leaves_every_class_some(labels: np.ndarray, fraction: float) -> None:
    if len(np.unique(labels)) == len(labels):
        return
    kept, held_out = holdout(labels, fraction, seed=13)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(len(labels)))
    assert set(labels[kept]) == set(labels)
    assert len(held_out) >= 1


def test_holdout_of_a_tenth_holds_out_a_tenth_of_each_class() -> None:
    kept, held_out = holdout(LABELS, 0.1, seed=0)
    assert counts(held_out) == [5, 3, 2]
    assert counts(kept) == [45, 27, 18]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.5, float("nan")])
def test_a_holdout_outside_its_range_is_an_error(fraction: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"must be between 0 and 1, got {fraction!r}; 0.1 is the usual one")):
        holdout(LABELS, fraction, seed=0)


def test_holdout_from_single_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="second image to hold out, got 3 images in 3 classes; add images"):
        holdout(np.arange(3), 0.5, seed=0)
