"""What is exported is read by timm, by the official names, and by ourselves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint as timm_load
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ssat_probe.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, state_of
from ssat_probe.export import export
from ssat_probe.foreign import Foreign, open_weights
from ssat_probe.network import build_decoder, build_encoder
from ssat_probe.source import Source

Paths = dict[str, Path]


def timm_twin() -> VisionTransformer:
    """timm's model of our vit_nano on digits."""
    return VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=6, num_heads=4, mlp_ratio=2
    ).eval()


@pytest.fixture
def images(generator: Callable[[str], torch.Generator]) -> Tensor:
    return torch.randn(5, 1, 8, 8, generator=generator("images"))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("method", ["scratch", "ssat"])
def test_timm_reads_it_and_computes_our_logits(
    checkpoints: Paths, tmp_path: Path, images: Tensor, method: str, ending: str
) -> None:
    written = export(checkpoints[method], "timm", tmp_path / f"a.{ending}")
    model = timm_twin()
    timm_load(model, str(written), strict=True)
    with torch.no_grad():
        ours = load_checkpoint(checkpoints[method]).encoder().eval()(images)
        torch.testing.assert_close(model(images), ours, rtol=1e-5, atol=1e-6)


def test_mae_files_come_back_as_the_same_encoder_and_decoder(
    checkpoints: Paths, tmp_path: Path, images: Tensor
) -> None:
    ours = load_checkpoint(checkpoints["ssat"])
    written = export(checkpoints["ssat"], "mae", tmp_path / "a.pth")
    state = torch.load(written, weights_only=True)["model"]
    assert {"decoder_embed.weight", "decoder_blocks.1.mlp.fc2.bias", "decoder_pos_embed", "mask_token"} <= state.keys()
    assert len(state) == len(ours.state)
    assert not any(name.startswith("decoder.") for name in state)
    back = open_weights(written, Source(heads=4, mean=(0.5,), std=(0.5,)))
    assert isinstance(back, Foreign)
    assert back.state.keys() == ours.state.keys()
    assert all(torch.equal(back.state[name], value) for name, value in ours.state.items())
    with torch.no_grad():
        assert torch.equal(back.encoder().eval()(images), ours.encoder().eval()(images))


def test_safetensors_come_back_as_the_very_checkpoint(checkpoints: Paths, tmp_path: Path) -> None:
    ours = load_checkpoint(checkpoints["ssl_ft"])
    written = export(checkpoints["ssl_ft"], "safetensors", tmp_path / "a.safetensors")
    back = open_weights(written)
    assert isinstance(back, Checkpoint)
    assert (back.recipe, back.facts, back.stage, back.epoch) == (ours.recipe, ours.facts, ours.stage, ours.epoch)
    assert back.hash == ours.hash


def test_a_changed_weight_in_safetensors_is_found_out(checkpoints: Paths, tmp_path: Path) -> None:
    written = export(checkpoints["ssat"], "safetensors", tmp_path / "a.safetensors")
    with safe_open(written, framework="pt") as file:
        facts = file.metadata()
    state = load_file(written)
    state["norm.bias"][3] += 1
    save_file(state, written, facts)
    with pytest.raises(
        ValueError, match=r"a\.safetensors must be a checkpoint, got \d+ bytes that cannot be read as one"
    ):
        open_weights(written)
    save_file(state, written, {"ssat-probe": json.dumps({"format": "ssat-probe/1"})})
    with pytest.raises(ValueError, match=r"a\.safetensors must be a checkpoint written by ssat-probe"):
        open_weights(written)


def test_mistakes_are_named(checkpoints: Paths, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scratch\.pt must hold a decoder for --to mae, got none; use --to timm"):
        export(checkpoints["scratch"], "mae", tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"No 'tim' in what export writes: timm, mae, safetensors"):
        export(checkpoints["scratch"], "tim", tmp_path / "a.pth")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"out must be another file than the checkpoint, got .*scratch\.pt"):
        export(checkpoints["scratch"], "timm", checkpoints["scratch"])
    with pytest.raises(ValueError, match=r"out must end as \.safetensors does for --to safetensors, got .*a\.pth"):
        export(checkpoints["scratch"], "safetensors", tmp_path / "a.pth")


def test_swin_is_read_by_timm_and_cvt_is_not_given_names_that_nobody_has(
    make_recipe: Callable[..., tuple], tmp_path: Path, images: Tensor
) -> None:
    for model in ("swin_nano", "cvt_nano"):
        recipe, facts = make_recipe(model=model, method="ssat")
        torch.manual_seed(0)
        encoder, decoder = build_encoder(recipe, facts), build_decoder(recipe, facts)
        save_checkpoint(Checkpoint(tmp_path / f"{model}.pt", recipe, facts, "train", 1, state_of(encoder, decoder)))
    written = export(tmp_path / "swin_nano.pt", "timm")
    timms = SwinTransformer(
        img_size=8, patch_size=1, in_chans=1, num_classes=10, embed_dim=12, depths=(2, 2), num_heads=(2, 4),
        window_size=2,
    ).eval()  # fmt: skip
    timm_load(timms, str(written), strict=True)
    with torch.no_grad():
        ours = load_checkpoint(tmp_path / "swin_nano.pt").encoder().eval()(images)
        torch.testing.assert_close(timms(images), ours, rtol=1e-5, atol=1e-6)
    for name, to, sentence in (
        ("swin_nano", "mae", r"must hold a model that mae has, got swin_nano; .* use --to safetensors or --to timm"),
        ("cvt_nano", "mae", r"must hold a model that mae has, got cvt_nano; .* whose names are Microsoft's"),
        ("cvt_nano", "timm", r"must hold a model that timm has, got cvt_nano; timm has no CvT: use --to safetensors"),
    ):
        with pytest.raises(ValueError, match=sentence):
            export(tmp_path / f"{name}.pt", to)  # type: ignore[arg-type]
    for name in ("swin_nano", "cvt_nano"):
        back = open_weights(export(tmp_path / f"{name}.pt", "safetensors"))
        assert back.hash == load_checkpoint(tmp_path / f"{name}.pt").hash
    with pytest.raises(ValueError, match=r"export writes checkpoints of ssat-probe train, got timm:vit_tiny"):
        export("timm:vit_tiny_patch16_224", "safetensors")
