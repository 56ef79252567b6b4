"""What describe says is what the model does."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from ssat_probe import capture
from ssat_probe.description import _attention, describe, forward_bytes, probes_that_apply
from ssat_probe.recipe import Recipe
from ssat_probe.registry import names
from ssat_probe.sample import Sample
from ssat_probe.source import Source
from ssat_probe.training import train

NAME = "vit_tiny_patch16_224"


def test_our_own_checkpoint(checkpoints: dict[str, Path]) -> None:
    text = "\n".join(describe(checkpoints["ssat"], Sample(device="cpu", batch_size=7)))
    assert "format: ssat-probe, train, epoch 1, ssat" in text
    assert "model: vit_nano (Model), " in text
    assert "tokens: grid 4 x 4 of patches 2 x 2; 1 before the patches (1 class)" in text
    assert "blocks 0 to 5: 4 heads, 17 queries x 17 keys, scores visible, fused softmax" in text
    for name in ("accuracy", "attention", "hessian", "variance"):
        assert f"  {name}: applies" in text
    assert all(f"\n  {name}: " in text for name in names("probes"))


def test_foreign_weights_say_what_became_of_each_tensor(tmp_path: Path) -> None:
    options = {"img_size": 32, "num_classes": 5, "reg_tokens": 3, "depth": 3}
    state = timm.create_model(NAME, **options).state_dict() | {"mask_token": torch.zeros(1, 192)}
    torch.save({"model": state}, tmp_path / "a.pth")
    lines = describe(tmp_path / "a.pth", Sample(), Source(img_size=(48,), resize=True))
    assert lines[1:3] == ["  format: timm, entry model", f"  loaded: {len(state) - 1} tensors, 100.0% of the encoder"]
    assert "  resized: 1 (pos_embed: (1, 8, 192) to (1, 13, 192))" in lines
    assert "  dropped: 1 (mask_token: used by masked pre-training alone)" in lines
    assert "  tokens: grid 3 x 3 of patches 16 x 16; 4 before the patches (1 class, 3 register)" in lines
    assert "  blocks 0 to 2: 3 heads, 13 queries x 13 keys, scores visible, fused softmax" in lines
    assert lines[-1] == "  probes: name images with --data to see which apply"


def test_a_probe_that_does_not_apply_says_why(tmp_path: Path) -> None:
    torch.save(timm.create_model(NAME, img_size=32, num_classes=5).state_dict(), tmp_path / "a.pth")
    verdicts = probes_that_apply(tmp_path / "a.pth", Sample(data="digits", device="cpu"), Source())
    assert verdicts["variance"] == verdicts["attention"] == "applies"
    assert verdicts["accuracy"].startswith("does not apply: The classes of ")
    assert verdicts["hessian"].startswith("does not apply: The classes of ")
    untrained = probes_that_apply(f"timm:{NAME}", Sample(data="digits", device="cpu"), Source(img_size=(32,)))
    assert (
        "must hold a model with a masked pass for this, got a VisionTransformer without" in untrained["reconstruction"]
    )
    assert {untrained[name] for name in ("accuracy", "attention", "hessian", "variance")} == {"applies"}


def test_memory_is_that_of_the_results_alive_at_once() -> None:
    chain = nn.Sequential(*[nn.Linear(97, 97) for _ in range(5)])
    assert forward_bytes(chain, torch.zeros(3, 97)) == 2 * 3 * 97 * 4  # the one before and the one being made
    assert forward_bytes(nn.Linear(97, 89), torch.zeros(3, 97)) == 3 * 89 * 4


def test_what_cannot_be_probed_is_still_described() -> None:
    lines = describe("timm:resnet18", Sample())
    assert any(line.startswith("  attention: The model must have transformer blocks") for line in lines)


def test_a_hierarchical_model_says_grid_and_windows_of_its_blocks() -> None:
    lines = describe("timm:swin_tiny_patch4_window7_224", Sample())
    blocks = [line.strip() for line in lines if line.startswith("  block")]
    assert blocks[0].startswith("block 0: grid 56 x 56, 64 windows of 7 x 7, 3 heads, 49 queries x 49 keys")
    assert "block 1: grid 56 x 56, 64 windows of 7 x 7 shifted by 3 x 3, 3 heads" in blocks[1]
    assert "blocks 10 to 11: grid 7 x 7, 24 heads, 49 queries x 49 keys" in blocks[-1]
    assert any("tokens: grid 56 x 56 of patches 4 x 4; 0 before the patches" in line for line in lines)


def test_keys_on_a_coarser_grid_and_weights_changed_after_softmax_are_said() -> None:
    lines = describe("timm:pvt_v2_b0", Sample(), Source(img_size=(64,)))
    assert any("blocks 0 to 1: grid 16 x 16, 1 head, 256 queries x 4 keys" in line for line in lines)
    lines = describe("timm:cait_xxs24_224", Sample(), Source(img_size=(32,)))
    assert any("blocks 0 to 23: 4 heads, 4 queries x 4 keys" in line and "unchecked" in line for line in lines)
    assert any("blocks 24 to 25: 4 heads, 1 queries x 5 keys" in line for line in lines)


def test_cvt_is_described_stage_by_stage_and_every_probe_applies_or_says_why(
    tmp_path: Path,
) -> None:
    recipe = Recipe(model="cvt_nano", method="scratch", subset=20, epochs=1, batch_size=10, warmup_epochs=0)
    path = train(recipe, tmp_path, device="cpu").path
    lines = describe(path, Sample(device="cpu"))
    assert "  tokens: grid 2 x 2 of patches 4 x 4; 1 before the patches in the last stage (1 class)" in lines
    assert "  block 0: grid 8 x 8, 1 head, 64 queries x 16 keys, scores visible, fused softmax" in lines
    assert "  block 1: grid 4 x 4, 2 heads, 16 queries x 4 keys, scores visible, fused softmax" in lines
    assert "  blocks 2 to 3: grid 2 x 2, 3 heads, 5 queries x 2 keys, scores visible, fused softmax" in lines
    refused = {line.split(":")[0].strip(): line for line in lines if "does not apply" in line}
    assert refused.keys() == {"fourier"}
    assert "a grid of at least 7 x 7 patches, got 4 x 4" in refused["fourier"]


FEATURES = "Probe its features instead, with variance, tokens, spectrum or similarity; `describe --data` says which"
UNSUPPORTED = {
    "nest_tiny": "its softmax has 5 axes (1, 3, 16, 196, 32), not batch, head, query and key",
    "hiera_tiny_224": "its softmax has 5 axes (1, 1, 49, 64, 96), not batch, head, query and key",
    "volo_d1_224": "its softmax has 5 axes (1, 6, 196, 9, 9), not batch, head, query and key",
    "tnt_s_legacy_patch16_224": "got 2 attention operations; the model ran more than once, or its blocks attend more",
    "xcit_nano_12_p16_224": "blocks.0 must attend over patches, got XCA, which attends over channels",
    "davit_tiny": "stages.0.blocks.0.1 must attend over patches, got ChannelAttention, which attends over channels",
    **{
        name: f"The model must say its grid of patches in 'grid' or 'patch_embed.grid_size', got a {kind} with None"
        for name, kind in {
            "levit_128s": "LevitDistilled", "visformer_tiny": "Visformer", "mobilevit_s": "ByobNet",
            "crossvit_tiny_240": "CrossVit", "gcvit_xxtiny": "GlobalContextVit", "maxvit_pico_rw_256": "MaxxVit",
        }.items()
    },
}  # fmt: skip
WITHOUT_FEATURES = {
    "tnt_s_legacy_patch16_224": "blocks.0 must have 'norm2' and 'mlp' after its attention, got a Block without",
    "levit_128s": "stages.0.blocks.0 must have 'norm2' and 'mlp' after its attention, got a LevitBlock without",
    "mobilevit_s": "must have a row for each of the 2 images, got 8 rows",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_family_whose_attention_has_no_known_places_says_why_and_what_to_do(name: str) -> None:
    lines = describe(f"timm:{name}", Sample())
    (why,) = (line for line in lines if UNSUPPORTED[name] in line)
    assert why.startswith(("  attention: ", "  places: "))
    assert FEATURES in why
    model = timm.create_model(name).eval()
    shapes: list[tuple[int, ...]] = []
    x = torch.zeros(2, *model.default_cfg["input_size"])

    def run() -> dict[capture.Site, tuple[int, int]]:
        with torch.no_grad(), capture.features(model, lambda _, tokens: shapes.append(tuple(tokens.shape))) as grids:
            model(x)
        return grids

    if name in WITHOUT_FEATURES:
        with pytest.raises(ValueError, match=re.escape(WITHOUT_FEATURES[name])):
            run()
    else:
        assert run() == {}  # so that no probe takes them for a map
        norms = [block.norm2 for block in capture.blocks(model) if hasattr(block, "norm2")]
        assert {shape[0] for shape in shapes} == {2}
        assert {shape[2] for shape in shapes} >= {len(norm.weight) for norm in norms}


def test_twins_says_the_groups_of_its_blocks() -> None:
    lines = describe("timm:twins_svt_small", Sample())
    start = "  block 2: grid 28 x 28, 16 windows of 7 x 7, 4 heads, 49 queries x 49 keys"
    assert any(line.startswith(start) for line in lines)
    assert any(line.startswith("  block 3: grid 28 x 28, 4 heads, 784 queries x 49 keys") for line in lines)


def test_attention_over_channels_has_no_places() -> None:
    lines = describe("timm:xcit_nano_12_p16_224", Sample(), Source(img_size=(64,)))
    assert any(line.startswith("  blocks 0 to 11: places unknown, 4 heads, 32 queries x 32 keys") for line in lines)
    assert "  images: 3 x 64 x 64, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)" in lines


def test_the_kind_of_attention_is_what_ran(make_family: Callable) -> None:
    for name, kind in {
        "our cvt": "fused softmax",
        "swinv2": "plain softmax",
        "torchvision": "MultiheadAttention",
    }.items():
        model, images = make_family(name)
        assert all(line.endswith(kind) for line in _attention(model, images[:1])), name
