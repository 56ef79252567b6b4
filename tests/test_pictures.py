"""Pictures along a training: the same images and masks each time, and what the decoder makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssat_probe.checkpoint import load_checkpoint
from ssat_probe.data import open_dataset
from ssat_probe.images import denormalise, normalise, split
from ssat_probe.losses import reconstructed
from ssat_probe.patches import random_mask
from ssat_probe.recipe import Recipe
from ssat_probe.training import train


def tiny(method: str = "ssat", **fields: Any) -> Recipe:
    return Recipe(**{"method": method, "subset": 40, "batch_size": 8, "epochs": 3, "warmup_epochs": 0, **fields})


def picture(path: Path) -> np.ndarray:
    """Eight rows of three pictures of 8 x 8, each pixel drawn eight times each way, with gaps of four pixels."""
    drawn = np.asarray(Image.open(path), dtype=np.float64) / 255
    assert drawn.shape == (8 * 68 + 4, 3 * 68 + 4, 3)
    assert (drawn[..., 1:] == drawn[..., :1]).all()
    cells = [[drawn[68 * i + 4 : 68 * (i + 1), 68 * j + 4 : 68 * (j + 1), 0] for j in range(3)] for i in range(8)]
    assert all((cell == cell[::8, ::8].repeat(8, 0).repeat(8, 1)).all() for row in cells for cell in row)
    gaps = np.ones(drawn.shape[:2], dtype=bool)
    for i in range(8):
        for j in range(3):
            gaps[68 * i + 4 : 68 * (i + 1), 68 * j + 4 : 68 * (j + 1)] = False
    assert (drawn[gaps] == 1).all()
    return np.block([[cell[::8, ::8] for cell in row] for row in cells])


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_picture_is_the_image_what_is_visible_and_the_prediction(tmp_path: Path, *, norm_pix: bool) -> None:
    recipe = tiny(norm_pix=norm_pix, drop_path=0.5)
    drawn = train(recipe, tmp_path / "drawn", device="cpu", pictures_every=2, snapshots=True)
    assert drawn.hash == train(recipe, tmp_path / "plain", device="cpu").hash
    folder = drawn.path.parent
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["train-00002.png", "train-00003.png"]
    rows = 8 * 8
    found = {epoch: picture(folder / "pictures" / f"train-{epoch:05d}.png") for epoch in (2, 3)}
    assert found[3].shape == (rows, 3 * 8)
    dataset = open_dataset("digits")
    pixels = split(dataset, "val").read(range(8))
    assert found[3][:, :8] == pytest.approx(pixels.numpy().reshape(rows, 8) / 255)
    hidden = found[3][:, 8:16] != found[3][:, :8]
    assert np.unique(found[3][:, 8:16][hidden]) == pytest.approx([128 / 255])
    assert np.array_equal(found[2][:, :16], found[3][:, :16])  # the same masks
    for epoch in (2, 3):
        kept = load_checkpoint(folder / "snapshots" / f"train-{epoch:05d}.pt")
        noise = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            predicted = reconstructed(
                kept.encoder().eval(), kept.decoder().eval(), normalise(pixels, kept.facts), random_mask(noise, 0.75),
                norm_pix,
            )  # fmt: skip
        expected = denormalise(predicted, kept.facts).clamp(0, 1).numpy().reshape(rows, 8)
        assert found[epoch][:, 16:] == pytest.approx(expected, abs=0.51 / 255)
    assert not np.array_equal(found[2][:, 16:], found[3][:, 16:])


def test_a_decoder_that_is_not_trained_any_more_is_not_drawn(tmp_path: Path) -> None:
    run = train(tiny("ssl_ft", pretrain_epochs=2, epochs=1), tmp_path, device="cpu", pictures_every=1)
    names = sorted(path.name for path in (run.path.parent / "pictures").iterdir())
    assert names == ["pretrain-00001.png", "pretrain-00002.png"]


@pytest.mark.parametrize(
    ("fields", "every"), [({"method": "scratch"}, 2), ({"task": "dino"}, 2), ({"lambda_weight": 1.0}, 1), ({}, -1)]
)
def test_where_nothing_is_reconstructed_there_is_nothing_to_draw(
    tmp_path: Path, fields: dict[str, Any], every: int
) -> None:
    with pytest.raises(
        ValueError, match=rf"pictures_every must be 0 where nothing is reconstructed, .* got {every} for"
    ):
        train(tiny(**fields), tmp_path, device="cpu", pictures_every=every)
