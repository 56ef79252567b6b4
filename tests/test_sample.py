import dataclasses
from typing import Any

import pytest

from ssat_probe.sample import Sample


def test_a_sample_has_defaults_and_cannot_be_changed() -> None:
    sample = Sample()
    assert (sample.num_images, sample.batch_size, sample.dtype) == (512, 128, "float32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.num_images = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("num_images", -1, 0),
        ("num_images", 2.5, 0),
        ("num_images", True, 0),
        ("sample_seed", -1, 0),
        ("batch_size", 0, 1),
        ("batch_size", "many", 1),
    ],
)
def test_a_number_out_of_range_is_named_with_its_value(name: str, value: Any, least: int) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be a whole number of at least {least}, got {value!r}\.$"):
        Sample(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("split", "tset", r"No 'tset' in splits: .* Did you mean 'test'\?"), ("split", 3, "No '3' in splits: train, val"),
     ("dtype", "float16", "No 'float16' in dtypes: float32, float64")],
)  # fmt: skip
def test_a_choice_that_there_is_not_is_named(name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sample(**{name: value})


def test_zero_images_mean_all() -> None:
    assert Sample(num_images=0).num_images == 0
