"""The probe of blocks on a real checkpoint, against operators of their own; table, figure, refusals."""

import io
from pathlib import Path

import pandas as pd
import pytest

from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.lanczos import lanczos, ritz
from ssat_probe.probes import blocks
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject


@pytest.fixture(scope="module")
def subject(checkpoints: dict[str, Path]) -> Subject:
    return Subject.of(checkpoints["ssat"], Sample(num_images=11, batch_size=7, device="cpu", dtype="float64"), "train")


@pytest.fixture(scope="module")
def table(subject: Subject) -> pd.DataFrame:
    return blocks.Probe(steps=8).measure(subject)


def test_every_part_of_the_model_has_its_ends(table, subject):
    parts = table[table["place"] >= 0].drop_duplicates("block")["block"].tolist()
    depth = len(subject.model.blocks)
    assert parts == ["embedding", *(f"blocks.{i}" for i in range(depth)), "norm", "head"]
    for label in ("blocks.1", "head"):
        own = {name: one for name, one in subject.parameters().items() if name.startswith(label + ".")}
        operator = HessianOperator(
            own, lambda b: subject.loss(b), [(batch, len(batch.images)) for batch in subject.batches()]
        )
        values = ritz(lanczos(operator.product, operator.size, 8)).values
        rows = table[table["block"] == label].set_index("quantity")["value"]
        assert rows["lambda_max"] == pytest.approx(values[-1], rel=1e-8)
        assert rows["lambda_min"] == pytest.approx(values[0], rel=1e-6, abs=1e-9)
        assert rows["num_parameters"] == operator.size
    whole = table[table["block"] == "all"].set_index("quantity")["value"]
    assert whole["num_images"] == 11
    assert whole["check_symmetry"] < 1e-10


def test_reconstruction_has_the_decoder_as_parts(subject):
    found = blocks.Probe(loss="reconstruction", steps=2).measure(subject)
    assert "decoder" in {name.partition(".")[0] for name in found["block"]}


def test_the_figure_has_a_tick_per_part(table):
    identity = {"checkpoint": "a", "model": "vit_nano", "method": "ssat", "data": "digits", "seed": 0, "epoch": 1}
    saved = pd.read_csv(io.StringIO(table.assign(**identity).to_csv(index=False)))
    figure = blocks.Probe().draw(saved)
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks[:2] == ["embedding", "0"]
    assert ticks[-1] == "head"
    summary = blocks.Probe().summary(saved)
    assert len(summary) == len(ticks)
    assert list(summary)[:3] == ["checkpoint", "block", "num_parameters"]


def test_options_out_of_range(subject):
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        blocks.Probe(steps=1).measure(subject)
    with pytest.raises(ValueError, match="Did you mean 'joint'"):
        blocks.Probe(loss="jonit").measure(subject)
