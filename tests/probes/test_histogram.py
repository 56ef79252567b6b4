from pathlib import Path

import numpy as np
import pandas as pd

from ssat_probe import probe
from ssat_probe.probes.histogram import Probe
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject

Paths = dict[str, Path]
SAMPLE = Sample(num_images=7, batch_size=3, device="cpu", dtype="float64")


def test_shares_and_masses_sum_to_1_in_every_block(checkpoints: Paths) -> None:
    table = Probe().measure(Subject.of(checkpoints["ssat"], SAMPLE))
    sums = table.groupby("block")[["share", "mass"]].sum()
    assert len(sums) == 6
    np.testing.assert_allclose(sums, 1)
    assert (table["share_low"] <= table["share"]).all()
    assert (table["share"] <= table["share_high"]).all()


def test_sharp_attention_has_heavier_tails(checkpoints: Paths) -> None:
    subject = Subject.of(checkpoints["ssat"], SAMPLE)
    tails = []
    for factor in (1, 8):
        for block in subject.model.blocks:
            block.attn.qkv.weight.data[:64].mul_(factor)
        table = Probe().measure(subject)
        tails.append(table["share"][table["log_weight"] < -1].sum())
    assert tails[1] > tails[0] + 0.1


def test_figure_has_at_most_six_blocks_from_first_to_last(checkpoints: Paths) -> None:
    table, _ = probe.measure_all(Probe(untrained_twin=False), [checkpoints["ssat"]], SAMPLE)
    deep = pd.concat([table[table["block"] == 0].assign(block=block) for block in range(24)])
    titles = [ax.get_title(loc="left") for ax in Probe().draw(deep).axes]
    assert titles == [f"Block {block}" for block in (0, 5, 9, 14, 18, 23)]
    assert len(Probe().draw(table[table["block"] < 4]).axes) == 4
    assert len(Probe().summary(table)) == 6
