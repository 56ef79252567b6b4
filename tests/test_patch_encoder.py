"""What every encoder with an embedding of its own for each patch has in common."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ssat_probe.models import swin, timm_vit, vit
from ssat_probe.patch_encoder import PatchEncoder
from ssat_probe.patches import Features, random_mask

SIZES: dict[str, Any] = {"img_size": (12, 18), "patch_size": (2, 3), "channels": 2, "num_classes": 5}
SHAPE: dict[str, Any] = {"dim": 24, "depth": 2, "heads": 3}
MAKE: dict[str, Callable[[], Any]] = {
    "vit": lambda: vit.Model(**SIZES, **SHAPE),
    "vit with mask tokens": lambda: vit.Model(**SIZES, **SHAPE, keeps_hidden=True),
    "swin": lambda: swin.Model(**SIZES, dim=12, depths=(2, 2), heads=(2, 4), window=3),
    "timm": lambda: timm_vit.Model(name="test_vit", **SIZES),
    "timm with mask tokens": lambda: timm_vit.Model(name="test_vit", **SIZES, keeps_hidden=True),
}


@pytest.fixture(params=MAKE)
def encoder(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    return MAKE[request.param]().double().eval()


@pytest.fixture
def batch(encoder: Any, generator: Callable[[str], torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and a mask."""
    images = torch.randn(5, 2, 12, 18, generator=generator("images"), dtype=torch.float64)
    return images, random_mask(torch.rand(5, encoder.num_tokens, generator=generator("mask")), 0.5)


def test_a_full_and_a_masked_pass_together_embed_once_and_are_what_they_are_apart(encoder: Any, batch: tuple) -> None:
    images, mask = batch
    embeddings: list[int] = []
    encoder.patch_embed.register_forward_hook(lambda *_: embeddings.append(1))
    both = encoder.encode_both(images, mask)
    assert len(embeddings) == 1
    for one, other in zip(both, (encoder.encode(images), encoder.encode(images, mask)), strict=True):
        assert one.grid == other.grid
        for part, expected in (
            (one.tokens, other.tokens), (one.class_token, other.class_token), (one.visible_ids, other.visible_ids)
        ):  # fmt: skip
            assert (part is None) == (expected is None)
            assert part is None or torch.equal(part, expected)


def test_logits_are_those_of_a_full_pass(encoder: Any, batch: tuple) -> None:
    images, mask = batch
    assert torch.equal(encoder(images), encoder.logits_of(encoder.encode(images)))
    assert encoder(images).shape == (5, 5)
    assert not torch.equal(encoder(images), encoder.logits_of(encoder.encode(images, mask)))


def test_an_architecture_says_itself_what_becomes_of_embedded_patches_and_how_it_classifies() -> None:
    tokens = torch.zeros(1, 2, 3)
    with pytest.raises(NotImplementedError):
        PatchEncoder().encoded(tokens, None)
    with pytest.raises(NotImplementedError):
        PatchEncoder().logits_of(Features(tokens, None, (1, 2), None))
