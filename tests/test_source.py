"""What the user says about foreign weights is checked at once."""

import pytest

from ssat_probe.source import Source


def test_one_number_is_both_sides() -> None:
    assert Source(img_size=(32,), patch_size=(3, 5)) == Source(img_size=(32, 32), patch_size=(3, 5))
    assert Source().img_size == ()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"img_size": (0,)}, r"img_size must be one or two positive whole numbers \(height width\), got \(0,\)"),
        ({"patch_size": (1, 2, 3)}, r"patch_size must be one or two .* got \(1, 2, 3\)"),
        ({"heads": -1}, "heads must be at least 0, got -1"),
        ({"model": "vit_tiny"}, "model must be timm:NAME for weights not trained here, got 'vit_tiny'"),
        ({"mean": (0.5,)}, r"mean and std must go together, got \(0.5,\) and \(\)"),
        ({"mean": (0.5,), "std": (0.0,)}, r"std must be above 0, got \(0.0,\)"),
    ],
)
def test_a_value_that_cannot_be_is_named(fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Source(**fields)
