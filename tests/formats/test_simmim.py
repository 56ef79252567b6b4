"""SimMIM's pre-training file of a Swin Transformer."""

from collections.abc import Callable

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from ssat_probe.foreign import Foreign
from ssat_probe.formats import detect


def test_the_encoder_is_timms_and_the_decoder_is_dropped(
    lively: Callable[..., nn.Module], opened: Callable[..., Foreign], logits: Callable[[Foreign, Tensor], Tensor]
) -> None:
    model = lively(
        SwinTransformer(
            img_size=32, patch_size=2, embed_dim=6, depths=(1, 2), num_heads=(2, 3), window_size=4, num_classes=0
        )
    )
    state = {"encoder.mask_token": torch.zeros(1, 1, 6), "decoder.0.bias": torch.zeros(12)}
    state |= {"decoder.0.weight": torch.zeros(12, 12, 1, 1)}
    for name, value in model.state_dict().items():
        state[f"encoder.{name}".replace("layers.1.downsample", "layers.0.downsample")] = value
    state["encoder.layers.1.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    assert detect(state) == "simmim"
    foreign = opened({"model": state, "max_accuracy": 0.0, "epoch": 99}, img_size=(32,))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(logits(foreign, images), model(images))
    assert foreign.report.fraction == 1.0
    assert sorted(foreign.report.dropped) == [
        "decoder.0.bias", "decoder.0.weight", "encoder.layers.1.blocks.1.attn_mask", "encoder.mask_token",
    ]  # fmt: skip
    assert not foreign.has_decoder
