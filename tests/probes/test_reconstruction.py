"""Pictures of reconstructions against the error that the loss has, and against the images themselves."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ssat_probe.images import denormalise
from ssat_probe.probes.reconstruction import Probe
from ssat_probe.recipe import Recipe
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject
from ssat_probe.training import train


def subject_of(path: Path) -> Subject:
    return Subject.of(path, Sample(num_images=7, batch_size=3, device="cpu", dtype="float64"), "test")


def square(table: pd.DataFrame, image: int, kind: str, column: str = "value") -> np.ndarray:
    rows = table[(table["image"] == image) & (table["kind"] == kind) & (table["channel"] == 0)]
    return rows.pivot_table(index="row", columns="column", values=column).to_numpy()


def test_pictures_are_the_image_what_is_visible_and_the_prediction(checkpoints: dict[str, Path]) -> None:
    subject = subject_of(checkpoints["ssat"])
    table = Probe(images=(4, 0)).measure(subject)
    assert table["image"].unique().tolist() == [4, 0]
    (batch,) = _whole(subject)
    pixels = denormalise(batch.images, subject.checkpoint.facts)[:, 0].numpy()
    for image in (4, 0):
        original, visible, predicted = (square(table, image, kind) for kind in ("original", "visible", "predicted"))
        hidden = square(table, image, "original", "hidden") == 1
        assert hidden.mean() == 0.75
        assert original == pytest.approx(pixels[image], abs=1e-12)
        assert visible == pytest.approx(np.where(hidden, 0.5, pixels[image]), abs=1e-12)
        assert predicted[~hidden] == pytest.approx(pixels[image][~hidden], abs=1e-12)
        assert not np.allclose(predicted[hidden], pixels[image][hidden], atol=1e-3)


def _whole(subject: Subject) -> list:
    parts = list(subject.batches())
    fields = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "ids"))
    return [type(parts[0])(*fields)]


@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_prediction_has_the_error_of_the_loss(tmp_path: Path, *, norm_pix: bool) -> None:
    recipe = Recipe(subset=40, epochs=1, batch_size=8, warmup_epochs=0, norm_pix=norm_pix)
    subject = subject_of(train(recipe, tmp_path, device="cpu").path)
    facts = subject.checkpoint.facts
    table = _uncut(subject)
    (batch,) = _whole(subject)
    errors = subject.reconstruction_errors(batch).detach()
    for image in range(3):
        hidden = square(table, image, "original", "hidden") == 1
        true, got = (square(table, image, kind) for kind in ("original", "predicted"))
        squares = ((true - got) / facts.std[0]) ** 2
        if norm_pix:  # in units of each patch's own deviation
            patches = true.reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).reshape(16, 4) / facts.std[0]
            variance = (patches.var(axis=1, ddof=1) + 1e-6).reshape(4, 4).repeat(2, 0).repeat(2, 1)
            squares = squares / variance
        assert squares[hidden].mean() == pytest.approx(float(errors[image]), rel=1e-9)


def _uncut(subject: Subject) -> pd.DataFrame:
    original = torch.Tensor.clamp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clamp", lambda self, *limits, **named: (
            self if limits == (0, 1) else original(self, *limits, **named)
        ))  # fmt: skip
        return Probe().measure(subject)


def test_without_a_decoder_there_is_no_prediction(checkpoints: dict[str, Path]) -> None:
    table = Probe().measure(subject_of(checkpoints["scratch"]))
    assert table["kind"].unique().tolist() == ["original", "visible"]
    shown = Probe().summary(table.assign(checkpoint="a"))
    assert shown.iloc[0, 1:].isna().all()


def test_the_summary_is_the_mean_difference_of_colour_where_nothing_was_seen(checkpoints: dict[str, Path]) -> None:
    table = Probe(images=(2,)).measure(subject_of(checkpoints["ssat"]))
    hidden = square(table, 2, "original", "hidden") == 1
    expected = np.abs(square(table, 2, "original") - square(table, 2, "predicted"))[hidden].mean()
    assert Probe().summary(table.assign(checkpoint="a")).iloc[0, 1] == pytest.approx(expected)


@pytest.mark.parametrize(("num_epochs", "num_images", "drawn"), [(3, 3, 6), (8, 2, 8), (11, 2, 8), (2, 3, 6)])
def test_a_figure_shows_the_first_and_the_last_of_many_checkpoints_and_says_what_it_leaves_out(
    checkpoints: dict[str, Path], num_epochs: int, num_images: int, drawn: int
) -> None:
    table = Probe(images=tuple(range(num_images))).measure(subject_of(checkpoints["ssat"]))
    own = {"method": "ssat", "model": "vit", "data": "digits", "seed": 0, "setting": "4x4"}
    tables = [table.assign(**own, checkpoint=f"epoch {epoch}", epoch=epoch) for epoch in range(num_epochs)]
    figure = Probe().draw(pd.concat(tables, ignore_index=True))
    assert len(figure.axes) == 3 * drawn
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert [labels[0], labels[-1]] == ["epoch 0 (SSAT)", f"epoch {num_epochs - 1} (SSAT)"]
    note = legend.get_title().get_text()
    said = f"{min(8, num_epochs)} of {num_epochs} lines, {drawn // min(8, num_epochs)} of {num_images} images"
    assert (said in note.replace("\n", " ")) == (drawn < num_epochs * num_images)


def test_an_image_that_is_not_there_is_named(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="images must lie between 0 and 6, got 7; choose another"):
        Probe(images=(7,)).measure(subject_of(checkpoints["ssat"]))
