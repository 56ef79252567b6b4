"""Swin files, timm's and in the official order: the loaded model gives timm's logits."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from ssat_probe.foreign import Foreign
from ssat_probe.formats import detect

Lively = Callable[..., nn.Module]
Open = Callable[..., Foreign]
Logits = Callable[[Foreign, Tensor], Tensor]

SMALL = {"img_size": 32, "patch_size": 2, "embed_dim": 6, "depths": (2, 1, 2), "num_heads": (2, 3, 4), "num_classes": 5}


def official(model: nn.Module) -> dict[str, Tensor]:
    """As the official code names it: merging ends a stage, the head is flat, and tables lie beside the weights."""
    state = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts).replace("head.fc.", "head.")] = value
    for stage in range(3):
        state[f"layers.{stage}.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    return state | {"layers.0.blocks.1.attn_mask": torch.zeros(16, 16, 16)}


@pytest.fixture
def swin(lively: Lively) -> SwinTransformer:
    return lively(SwinTransformer(**SMALL, window_size=4))  # type: ignore[arg-type, return-value]


@pytest.fixture
def large(generator: Callable[[str], torch.Generator]) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=generator("large"))


@pytest.mark.parametrize("is_official", [True, False])
def test_logits_are_timms_own(
    swin: SwinTransformer, opened: Open, logits: Logits, large: Tensor, is_official: bool
) -> None:
    state = official(swin) if is_official else swin.state_dict()
    assert detect(state) == "swin"
    foreign = opened({"model": dict(reversed(state.items()))}, img_size=(32,))
    assert torch.equal(logits(foreign, large), swin(large))
    assert (foreign.report.layout, foreign.report.fraction) == ("swin", 1.0)
    assert foreign.report.unexpected == foreign.report.missing == ()
    assert len(foreign.report.dropped) == (4 if is_official else 0)
    assert foreign.recipe.model == "Swin"


def test_tables_of_another_window_are_resampled_when_asked(swin: SwinTransformer, opened: Open) -> None:
    with pytest.raises(ValueError, match=r"give --resize to resample it"):
        opened(swin.state_dict(), img_size=(8,))
    foreign = opened(swin.state_dict(), img_size=(8,), resize=True)
    name = "layers.2.blocks.0.attn.relative_position_bias_table"
    assert foreign.report.resized[name] == "(49, 4) to (1, 4)"
    table = swin.state_dict()["layers.1.blocks.0.attn.relative_position_bias_table"]
    # The table of 7 x 7 steps of a window of 4, as an image of one channel per head: 3 x 3 steps of a window of 2.
    image = table.T.reshape(1, 3, 7, 7)
    expected = F.interpolate(image, size=(3, 3), mode="bicubic", align_corners=False).reshape(3, 9).T
    torch.testing.assert_close(foreign.state["layers.1.blocks.0.attn.relative_position_bias_table"], expected)


def test_version_2_needs_its_name(lively: Lively, opened: Open) -> None:
    model = lively(SwinTransformerV2(**SMALL, window_size=4))
    assert detect(model.state_dict()) == "swin"
    with pytest.raises(ValueError, match="name the model with --model timm:NAME, as SwinV2 needs"):
        opened(model.state_dict(), img_size=(32,))


def test_an_official_file_of_a_named_model(lively: Lively, opened: Open, logits: Logits) -> None:
    import timm

    model = lively(timm.create_model("swin_tiny_patch4_window7_224", num_classes=5))
    foreign = opened(official(model), model="timm:swin_tiny_patch4_window7_224")
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(logits(foreign, images), model(images))
