"""Files that timm's own models were saved to: the loaded model gives timm's logits."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from ssat_probe.architecture import timm_model
from ssat_probe.foreign import Foreign, open_weights
from ssat_probe.formats import detect
from ssat_probe.source import Source

Lively = Callable[..., nn.Module]
Open = Callable[..., Foreign]
Logits = Callable[[Foreign, Tensor], Tensor]

VARIANTS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "fine-tuned MAE": {"global_pool": "avg"},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "registers with positions": {"reg_tokens": 3},
    "DINOv2": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.3, "num_classes": 0},
    "norm in front": {"pre_norm": True},
    "normed queries and keys": {"qk_norm": True},
    "no bias": {"qkv_bias": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_timms_own(lively: Lively, opened: Open, logits: Logits, images: Tensor, name: str) -> None:
    model = lively(**VARIANTS[name])
    foreign = opened(model.state_dict())
    assert torch.equal(logits(foreign, images), model(images))
    assert (foreign.report.layout, foreign.report.fraction) == ("timm", 1.0)
    assert set(foreign.report.loaded) == set(model.state_dict())
    assert foreign.encoder().num_prefix_tokens == model.num_prefix_tokens


FAMILIES = {
    "vit_tiny_patch16_224": (64, 64),
    "deit_tiny_distilled_patch16_224": (32, 64),
    "vit_small_patch14_reg4_dinov2": (56, 56),
    "vit_pwee_patch16_reg1_gap_256": (64, 64),
    "swin_tiny_patch4_window7_224": (64, 96),
    "swinv2_tiny_window8_256": (64, 64),
    "cait_xxs24_224": (64, 64),
    "pvt_v2_b0": (64, 64),
    "mvitv2_tiny": (64, 64),
}
"Every family of timm's that is promised, by a name in its registry."


@pytest.mark.parametrize("name", FAMILIES)
def test_files_of_named_models_give_timms_logits(
    lively: Lively, tmp_path: Path, logits: Logits, generator: Callable[[str], torch.Generator], name: str
) -> None:
    size = FAMILIES[name]
    torch.manual_seed(0)
    model = lively(timm_model(name, Source(img_size=size), 5))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    foreign = open_weights(tmp_path / "a.safetensors", Source(model=f"timm:{name}", img_size=size))
    assert isinstance(foreign, Foreign)
    assert (foreign.report.fraction, foreign.report.missing, foreign.report.unexpected) == (1.0, (), ())
    images = torch.randn(2, 3, *size, generator=generator("family"))
    with torch.no_grad():
        expected = model(images)
    assert expected.std() > 0.1
    assert torch.equal(logits(foreign, images), expected)


def test_distilled_models_have_two_tokens_and_two_heads(
    lively: Lively, opened: Open, logits: Logits, images: Tensor
) -> None:
    model = lively(
        VisionTransformerDistilled(
            img_size=20, patch_size=5, embed_dim=128, depth=3, num_heads=2, mlp_ratio=1.5, num_classes=7
        )
    )
    foreign = opened(model.state_dict())
    assert torch.equal(logits(foreign, images), model(images))
    assert foreign.encoder().num_prefix_tokens == 2


@pytest.mark.parametrize(
    ("entry", "wrap"),
    [
        ("model", lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}),
        ("state_dict", lambda state: {"state_dict": {f"module.{n}": v for n, v in state.items()}, "epoch": 3}),
        ("state_dict", lambda state: {"state_dict": {f"model._orig_mod.{n}": v for n, v in state.items()}}),
        ("model_ema", lambda state: {"model": {n: v * 0 for n, v in state.items()}, "model_ema": state}),
        ("state_dict_ema", lambda state: {"state_dict": {n: v * 0 for n, v in state.items()}, "state_dict_ema": state}),
        ("", lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{n}": v for n, v in state.items()}),
    ],
)
def test_wrappers_and_their_prefixes_come_off(
    lively: Lively, opened: Open, logits: Logits, images: Tensor, entry: str, wrap: Callable
) -> None:
    model = lively()
    foreign = opened(wrap(model.state_dict()))
    assert foreign.report.entry == entry
    assert torch.equal(logits(foreign, images), model(images))


def test_nothing_is_matched_by_order(lively: Lively, opened: Open, logits: Logits, images: Tensor) -> None:
    model = lively()
    state = dict(reversed(model.state_dict().items()))
    assert torch.equal(logits(opened(state), images), model(images))


def test_the_mask_token_of_dinov2_is_dropped_with_its_reason(lively: Lively, opened: Open) -> None:
    foreign = opened(lively(num_classes=0).state_dict() | {"mask_token": torch.zeros(1, 128)})
    assert foreign.report.dropped == {"mask_token": "used by masked pre-training alone"}


def test_only_these_names_are_of_this_layout(lively: Lively) -> None:
    names = set(lively().state_dict())
    assert detect(names) == "timm"
    assert detect(names - {"patch_embed.proj.weight"}) == ""
    assert detect({f"encoder.{name}" for name in names}) == ""
