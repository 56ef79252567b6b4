import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ssat_probe import geometry
from ssat_probe.models.vit import Model


def test_ours_and_timms_models_say_where_their_patches_lie():
    ours = Model(img_size=(6, 10), patch_size=(3, 2), channels=1, num_classes=2, dim=8, depth=1, heads=2)
    timms = VisionTransformer(img_size=(6, 10), patch_size=(3, 2), in_chans=1, embed_dim=8, depth=1, num_heads=2)
    for model in (ours, timms):
        assert geometry.grid(model) == (2, 5)
        assert geometry.patch_size(model) == (3, 2)


@pytest.mark.parametrize("question", [geometry.grid, geometry.patch_size])
def test_a_model_that_does_not_say_is_refused(question):
    with pytest.raises(ValueError, match=r"The model must say .* got a Linear with None\."):
        question(nn.Linear(2, 3))


def test_distances_are_euclidean_in_pixels_and_in_raster_order():
    found = geometry.distances((3, 5), (2, 7))
    assert found.shape == (15, 15)
    for q in range(15):
        for k in range(15):
            expected = ((2 * (q // 5 - k // 5)) ** 2 + (7 * (q % 5 - k % 5)) ** 2) ** 0.5
            assert found[q, k] == pytest.approx(expected)


def test_uniform_attention_on_14_by_14_patches_of_16_pixels_reaches_116_pixels():
    # The mean of the closed form 16 * sqrt(i² + j²) over all pairs of patches.
    assert geometry.distances((14, 14), (16, 16)).mean().item() == pytest.approx(116.492, abs=5e-4)
    assert torch.equal(geometry.distances((1, 1), (16, 16)), torch.zeros(1, 1).double())
