"""Planes through checkpoints: exact at three, honest about what more of them have off the plane."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ssat_probe import relation
from ssat_probe.checkpoint import load_checkpoint, save_checkpoint
from ssat_probe.relations.plane import Relation
from ssat_probe.sample import Sample

Paths = dict[str, Path]
SAMPLE = Sample(num_images=7, batch_size=7, device="cpu", dtype="float64")


def losses(table: pd.DataFrame, quantity: str) -> np.ndarray:
    rows = table[(table["quantity"] == quantity) & (table["term"] == "cross_entropy")]
    return rows["value"].to_numpy()


def test_three_checkpoints_lie_on_their_plane(checkpoints: Paths) -> None:
    table, _ = relation.measure_all(Relation(points=3), list(checkpoints.values()), SAMPLE)
    np.testing.assert_allclose(losses(table, "checkpoint"), losses(table, "projection"), rtol=1e-9)
    assert len(losses(table, "surface")) == 9
    assert (table.loc[table["quantity"] == "residual", "value"] == 0).all()


def test_more_checkpoints_are_projected_and_their_distance_is_told(checkpoints: Paths, tmp_path: Path) -> None:
    import dataclasses

    import torch

    first = load_checkpoint(checkpoints["ssat"])
    paths = []
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        state = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in first.state.items()}
        state |= {k: v for k, v in first.state.items() if "pos_embed" in k}
        path = tmp_path / f"{number}.pt"
        paths.append(save_checkpoint(dataclasses.replace(first, path=path, epoch=number, state=state)))
    table, _ = relation.measure_all(Relation(points=3, margin=0.1), paths, SAMPLE)
    assert (table.loc[table["quantity"] == "residual", "value"] > 0.1).all()
    assert (losses(table, "checkpoint") != losses(table, "projection")).all()
    shares = table[table["quantity"].str.startswith("explained")]["value"]
    assert 0 < shares.sum() < 1
    figure = Relation().draw(table)
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"SSAT seed 0 epoch 0 to 3"}
    titles = ["cross-entropy [nat]", "reconstruction [pixel²]", "accuracy"]
    assert [ax.get_title(loc="left") for ax in figure.axes] == titles
    marked = table[(table["quantity"] == "checkpoint") & (table["term"] == "cross_entropy")]
    for ax in figure.axes:
        assert ax.get_aspect() == 1  # distances are Euclidean in any direction
        end, run = ax.get_lines()
        assert list(run.get_xdata()) == marked["x"].tolist()
        assert list(end.get_ydata()) == marked["y"].tolist()[-1:]
        assert end.get_markersize() > run.get_markersize()


def test_options_that_cannot_be_used_say_so() -> None:
    with pytest.raises(ValueError, match=r"points must be at least 3 and margin at least 0, got 2 and 0\.25"):
        Relation(points=2).measure([], [])
    with pytest.raises(ValueError, match="got 21 and -1"):
        Relation(margin=-1.0).measure([], [])
