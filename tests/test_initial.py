"""Weights to begin with: ours and foreign ones, of the same size or another, and those that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torchvision.transforms.v2 import functional as TF

from ssat_probe.checkpoint import Checkpoint, save_checkpoint
from ssat_probe.export import export
from ssat_probe.initial import FRESH, UNMASKED, begin_from
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
    assert report.resized == {"pos_embed": "a grid of 4x4 to 8x8"}


@pytest.mark.parametrize(("old", "new"), [((2, 8), (4, 4)), ((4, 4), (2, 8)), ((4, 8), (8, 4)), ((2, 8), (4, 16))])
@pytest.mark.parametrize("model", ["vit_pico", "timm:test_vit"])
def test_positions_are_resampled_from_the_grid_that_they_are_of(
    make_recipe: Make, tmp_path: Path, model: str, old: tuple[int, int], new: tuple[int, int]
) -> None:
    recipes = [make_recipe((2 * rows, 2 * columns), model=model, patch_size=2) for rows, columns in (old, new)]
    given, encoder = (build_encoder(*one) for one in recipes)
    save_checkpoint(Checkpoint(tmp_path / "old.pt", *recipes[0], "train", 1, given.state_dict()))
    report = begin_from(encoder, str(tmp_path / "old.pt"), tmp_path / "init.json")
    assert report.resized == {"pos_embed": f"a grid of {old[0]}x{old[1]} to {new[0]}x{new[1]}"}
    num_prefix = given.pos_embed.shape[1] - old[0] * old[1]
    maps = given.pos_embed.detach()[0, num_prefix:].T.reshape(1, -1, *old)
    # torchvision's resize of a picture with as many channels as the positions are wide
    expected = TF.resize(maps, list(new), TF.InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(encoder.pos_embed[0, num_prefix:], expected[0].flatten(1).T, rtol=0, atol=1e-6)
    assert torch.equal(encoder.pos_embed[0, :num_prefix], given.pos_embed[0, :num_prefix])


def test_a_mask_token_is_left_out_where_there_is_no_place_for_it(make_recipe: Make, tmp_path: Path) -> None:
    recipe, facts = make_recipe(model="vit_pico", task="simmim")
    given = build_encoder(recipe, facts)
    save_checkpoint(Checkpoint(tmp_path / "simmim.pt", recipe, facts, "train", 1, given.state_dict()))
    encoder = build_encoder(*make_recipe(model="vit_pico", method="scratch"))
    report = begin_from(encoder, str(tmp_path / "simmim.pt"), tmp_path / "init.json")
    assert report.dropped["mask_token"] == UNMASKED
    assert torch.equal(encoder.blocks[1].mlp.fc2.weight, given.blocks[1].mlp.fc2.weight)


@pytest.mark.parametrize("model", ["vit_pico", "cvt_nano", "swin_nano", "timm:test_vit"])
def test_weights_for_colours_see_grey_images_as_equal_colours(
    make_recipe: Make, generator: Callable[[str], torch.Generator], tmp_path: Path, model: str
) -> None:
    recipe, facts = make_recipe((8, 8), 3, model=model, patch_size=1, method="scratch")
    given = build_encoder(recipe, facts).eval()
    save_checkpoint(Checkpoint(tmp_path / "rgb.pt", recipe, facts, "train", 1, given.state_dict()))
    encoder = build_encoder(*make_recipe((8, 8), 1, model=model, patch_size=1, method="scratch", seed=3)).eval()
    report = begin_from(encoder, str(tmp_path / "rgb.pt"), tmp_path / "init.json")
    assert list(report.resized.values()) == ["3 channels to their sum"]
    grey = torch.randn(2, 1, 8, 8, generator=generator("grey"))
    expected = given.encode(grey.expand(-1, 3, -1, -1)).tokens
    torch.testing.assert_close(encoder.encode(grey).tokens, expected, rtol=1e-4, atol=1e-5)


def test_a_file_of_timms_for_colours_begins_a_training_on_grey_images(make_recipe: Make, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "timm.pt")
    encoder = build_encoder(*make_recipe((32, 32), 1, model="timm:test_vit", patch_size=16, method="scratch"))
    report = begin_from(encoder, str(tmp_path / "timm.pt"), tmp_path / "init.json")
    assert report.resized == {
        "patch_embed.proj.weight": "3 channels to their sum", "pos_embed": "a grid of 10x10 to 2x2",
    }  # fmt: skip


def test_weights_that_cannot_have_the_models_heads_are_of_another_model(make_recipe: Make, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", embed_dim=64, num_heads=1).state_dict(), tmp_path / "timm.pt")
    encoder = build_encoder(*make_recipe((32, 32), 3, model="vit_pico", patch_size=16, method="scratch"))
    with pytest.raises(
        ValueError, match=r"whose width its 3 attention heads do not divide; choose the model that they"
    ):
        begin_from(encoder, str(tmp_path / "timm.pt"), tmp_path / "init.json")


def test_random_weights_of_timms_are_refused(make_recipe: Make, tmp_path: Path) -> None:
    encoder = build_encoder(*make_recipe((32, 32), 3, model="timm:test_vit", method="scratch"))
    with pytest.raises(
        ValueError, match=r"weights that were trained, got 'timm:test_vit', .* use timm:test_vit\?pretra"
    ):
        begin_from(encoder, "timm:test_vit", tmp_path / "init.json")
    assert not (tmp_path / "init.json").exists()


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
