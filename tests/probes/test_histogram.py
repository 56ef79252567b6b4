from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ssat_probe import probe
from ssat_probe.measures.bootstrap import resample_counts
from ssat_probe.measures.histogram import EDGES
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


def shares(subject: Subject, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Share of the weights, and of their sum, by image and bin: numpy's histogram of timm's own unfused weights."""
    seen: list[torch.Tensor] = []
    attention = subject.model.blocks[block].attn
    attention.fused_attn = False
    with attention.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out)), torch.no_grad():
        subject.model(torch.cat([batch.images for batch in subject.batches()]))
    weights = seen[0][:, :, 1:, 1:].numpy()
    weights /= weights.sum(-1, keepdims=True)
    logs = np.log10(weights * weights.shape[-1])
    assert EDGES[0] < logs.min() < logs.max() < EDGES[-1]
    counts, masses = (
        np.stack([np.histogram(one.ravel(), EDGES, weights=w.ravel())[0] for one, w in zip(logs, by, strict=True)])
        for by in (np.ones_like(weights), weights)
    )
    return counts / counts.sum(1, keepdims=True), masses / masses.sum(1, keepdims=True)


def test_differences_to_the_first_checkpoint_are_paired_bin_by_bin(checkpoints: Paths) -> None:
    first, second = (Subject.of(checkpoints[name], SAMPLE) for name in ("scratch", "ssat"))
    before, after = Probe().between(iter([("scratch", first), ("ssat", second)]))
    assert before.filter(like="difference").isna().all(axis=None)
    rows = after[after["block"] == 3]
    counts = resample_counts(torch.arange(7)).numpy()
    counts = counts[:, counts.sum(0) > 0]
    for name, ours, theirs in zip(("share", "mass"), shares(second, 3), shares(first, 3), strict=True):
        apart = ours - theirs
        assert np.abs(apart).max() > 1e-3
        np.testing.assert_allclose(rows[name], ours.mean(0), atol=1e-12)
        np.testing.assert_allclose(rows[f"{name}_difference"], apart.mean(0), atol=1e-12)
        ends = np.quantile(counts.T @ apart / counts.sum(0)[:, None], [0.025, 0.975], axis=0)
        np.testing.assert_allclose(rows[f"{name}_difference_low"], ends[0], atol=1e-12)
        np.testing.assert_allclose(rows[f"{name}_difference_high"], ends[1], atol=1e-12)


def test_other_images_have_no_differences(checkpoints: Paths) -> None:
    first, second = (Subject.of(checkpoints["ssat"], Sample(num_images=n, batch_size=3, device="cpu")) for n in (7, 6))
    _, after = Probe().between(iter([("a", first), ("b", second)]))
    assert after.filter(like="difference").isna().all(axis=None)


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
