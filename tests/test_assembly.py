"""Every tensor is accounted for; a part is refused unless it was allowed."""

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import nn

from ssat_probe.assembly import fill, filled_decoder, resampled_positions
from ssat_probe.formats import Converted
from ssat_probe.models import vit
from ssat_probe.source import Source


def small(**options: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **({"img_size": 64, "depth": 2, "num_classes": 7} | options))


def filled(model: nn.Module, state: dict, **fields: object) -> object:
    return fill(model, Converted(state), "timm", "model", Source(**fields))  # type: ignore[arg-type]


def test_a_whole_state_fills_the_model() -> None:
    model, source = small(), small()
    report = filled(model, source.state_dict())
    assert (report.fraction, report.missing, report.unexpected, report.resized) == (1.0, (), (), {})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))


def test_a_missing_tensor_is_refused_or_counted() -> None:
    model, state = small(), small().state_dict()
    lost = state.pop("blocks.1.mlp.fc1.weight")
    before = model.blocks[1].mlp.fc1.weight.clone()
    with pytest.raises(
        ValueError, match=r"got 8\d\.\d% of the encoder .* missing: 1 \(blocks\.1\.mlp\.fc1\.weight\); une"
    ):
        filled(model, state)
    report = filled(model, state, allow_partial=True)
    encoder = sum(value.numel() for name, value in small().state_dict().items() if not name.startswith("head."))
    assert report.fraction == pytest.approx(1 - lost.numel() / encoder, rel=1e-12)
    assert report.missing == ("blocks.1.mlp.fc1.weight",)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, before)


def test_more_blocks_than_the_model_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 100\.0% of the encoder .* unexpected: 12 \(blocks\.2\."):
        filled(small(), small(depth=3).state_dict())


def test_a_shape_that_does_not_fit_is_named() -> None:
    state = small().state_dict() | {"norm.weight": torch.zeros(191)}
    with pytest.raises(ValueError, match=r"missing: 1 \(norm\.weight of shape \(191,\) for \(192,\)\); unexpected: 1"):
        filled(small(), state)


def test_positions_and_patches_are_resampled_as_timm_does_when_asked() -> None:
    state = small().state_dict()
    model = small(img_size=(48, 40), patch_size=8)
    with pytest.raises(ValueError, match=r"must have shape .* for this image and patch size, got .* give --resize"):
        filled(model, state)
    report = filled(model, state, resize=True)
    assert report.resized == {
        "pos_embed": "(1, 17, 192) to (1, 31, 192)",
        "patch_embed.proj.weight": "(192, 3, 16, 16) to (192, 3, 8, 8)",
    }
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(state["pos_embed"], [6, 5], [4, 4]))
    assert torch.equal(model.patch_embed.proj.weight, resample_patch_embed(state["patch_embed.proj.weight"], [8, 8]))


def test_positions_that_are_no_square_stay_and_are_refused() -> None:
    value = torch.zeros(1, 12, 192)
    assert resampled_positions(value, (3, 3), 1) is value
    with pytest.raises(ValueError, match=r"missing: 1 \(pos_embed of shape \(1, 12, 192\) for \(1, 17, 192\)\)"):
        filled(small(), small().state_dict() | {"pos_embed": value}, resize=True)


def test_no_decoder_without_its_weights() -> None:
    assert filled_decoder(Converted({}), small(), Source()) == (None, {})


def test_a_decoder_with_absurd_sizes_is_refused_before_there_is_room() -> None:
    model = vit.Model(img_size=(8, 8), patch_size=(4, 4), channels=1, num_classes=2, dim=16, depth=1, heads=2)
    wide = {"embed.weight": torch.zeros(2**16, 1)} | {f"blocks.{i}.norm1.weight": torch.zeros(1) for i in range(9)}
    with pytest.raises(ValueError, match=r"The decoder must hold about as many values .* for a model of 463,"):
        filled_decoder(Converted({}, wide), model, Source())
    deep = {"embed.weight": torch.zeros(4, 16)} | {f"blocks.{i}.norm1.weight": torch.zeros(1) for i in range(257)}
    with pytest.raises(ValueError, match=r"The decoder must have at most 256 blocks, got 257"):
        filled_decoder(Converted({}, deep), model, Source())
