"""Weights to begin with: ours and foreign ones, of the same size or another, and those that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssat_probe.export import export
from ssat_probe.initial import FRESH, begin_from
from ssat_probe.network import build_encoder

Make = Callable[..., tuple]


def test_the_body_is_taken_and_the_head_stays(make_recipe: Make, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    given = torch.load(checkpoints["ssat"], weights_only=True)["model"]
    encoder = build_encoder(*make_recipe(seed=5))
    head = encoder.head.weight.clone()
    report = begin_from(encoder, str(checkpoints["ssat"]), tmp_path / "init.json")
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, head if name == "head.weight" else given[name] if "head" not in name else value)
    assert report.fraction == 1
    assert report.dropped == {"head.weight": FRESH, "head.bias": FRESH}
    assert json.loads((tmp_path / "init.json").read_text())["path"] == str(checkpoints["ssat"])


def test_another_number_of_classes_is_no_matter(
    make_recipe: Make, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    encoder = build_encoder(*make_recipe(num_classes=3))
    assert begin_from(encoder, str(checkpoints["scratch"]), tmp_path / "init.json").fraction == 1
    assert encoder.head.out_features == 3


@pytest.mark.parametrize("kind", ["timm", "mae"])
def test_files_of_other_tools_fill_it_too(
    make_recipe: Make, checkpoints: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    path = export(checkpoints["ssat"], kind, tmp_path / f"{kind}.pth")
    encoder, ours = build_encoder(*make_recipe(seed=5)), build_encoder(*make_recipe(seed=5))
    begin_from(encoder, str(path), tmp_path / "a.json")
    begin_from(ours, str(checkpoints["ssat"]), tmp_path / "b.json")
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], value, rtol=0, atol=0)


def test_positions_and_patches_of_another_size_are_resampled(
    make_recipe: Make, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    encoder = build_encoder(*make_recipe((16, 16), patch_size=4))
    report = begin_from(encoder, str(checkpoints["scratch"]), tmp_path / "init.json")
    assert report.resized == {"patch_embed.proj.weight": "(32, 1, 2, 2) to (32, 1, 4, 4)"}
    wider = build_encoder(*make_recipe((16, 16), patch_size=2))
    report = begin_from(wider, str(checkpoints["scratch"]), tmp_path / "init.json")
    assert report.resized == {"pos_embed": "(1, 17, 32) to (1, 65, 32)"}


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("vit_pico", r"must fill the encoder, got weights that leave \d+ of its tensors .* and have \d+ too many \("),
        ("swin_nano", r"must fill the encoder, got weights that leave \d+ of its tensors"),
    ],
)
def test_weights_of_another_model_are_refused(
    make_recipe: Make, checkpoints: dict[str, Path], tmp_path: Path, model: str, sentence: str
) -> None:
    encoder = build_encoder(*make_recipe(model=model, method="scratch"))
    with pytest.raises(ValueError, match=sentence):
        begin_from(encoder, str(checkpoints["scratch"]), tmp_path / "init.json")
    assert not (tmp_path / "init.json").exists()
