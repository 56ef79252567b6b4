from pathlib import Path

import numpy as np
import pytest
import torch

from ssat_probe import probe
from ssat_probe.measures.bootstrap import resample_counts
from ssat_probe.probes.spectrum import Probe
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject

Paths = dict[str, Path]
SAMPLE = Sample(num_images=7, batch_size=3, device="cpu", dtype="float64")


def outputs(subject: Subject, block: int) -> np.ndarray:
    """Patch tokens after a block, by a hook of our own."""
    seen: list[torch.Tensor] = []
    handle = subject.model.blocks[block].register_forward_hook(lambda _, args, out: seen.append(out[:, 1:]))
    with torch.no_grad():
        for batch in subject.batches():
            subject.model(batch.images)
    handle.remove()
    return torch.cat(seen).numpy()


def test_values_are_those_of_the_covariance_of_each_images_tokens(checkpoints: Paths) -> None:
    subject = Subject.of(checkpoints["ssat"], SAMPLE)
    table = Probe().measure(subject)
    rows = table[table["block"] == 3]
    assert rows["rank"].tolist() == list(range(1, 16))
    spectra = np.stack([np.linalg.svd(np.cov(tokens.T), compute_uv=False)[:15] for tokens in outputs(subject, 3)])
    np.testing.assert_allclose(rows["log_value"], np.log(spectra).mean(0), rtol=1e-8)
    np.testing.assert_allclose(rows["log_value_sd"], np.log(spectra).std(0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(rows["energy_share"], (spectra / spectra.sum(1, keepdims=True)).mean(0), rtol=1e-8)


def test_differences_to_the_first_checkpoint_are_those_of_each_singular_value(checkpoints: Paths) -> None:
    first, second = (Subject.of(checkpoints[name], SAMPLE) for name in ("scratch", "ssat"))
    before, after = Probe().between(iter([("scratch", first), ("ssat", second)]))
    assert before["log_value_difference"].isna().all()
    rows = after[after["block"] == 3]
    logs = [
        np.log(np.stack([np.linalg.svd(np.cov(tokens.T), compute_uv=False)[:15] for tokens in outputs(one, 3)]))
        for one in (first, second)
    ]
    apart = logs[1] - logs[0]
    np.testing.assert_allclose(rows["log_value_difference"], apart.mean(0), rtol=1e-7)
    counts = resample_counts(torch.arange(7)).numpy()
    counts = counts[:, counts.sum(0) > 0]
    ends = np.quantile(counts.T @ apart / counts.sum(0)[:, None], [0.025, 0.975], axis=0)
    np.testing.assert_allclose(rows["log_value_difference_low"], ends[0], rtol=1e-6)
    np.testing.assert_allclose(rows["log_value_difference_high"], ends[1], rtol=1e-6)


def test_shares_sum_to_1_and_fall(checkpoints: Paths) -> None:
    table = Probe(standardize=True).measure(Subject.of(checkpoints["ssat"], SAMPLE))
    np.testing.assert_allclose(table.groupby("block")["energy_share"].sum(), 1)
    for _, one in table.groupby("block"):
        assert (one["energy_share"].diff().dropna() <= 0).all()


def test_standardised_channels_weigh_alike(checkpoints: Paths) -> None:
    subject = Subject.of(checkpoints["ssat"], SAMPLE)
    with torch.no_grad():
        subject.model.patch_embed.proj.weight[5] *= 1000
    plain, fair = (Probe(standardize=value).measure(subject)["energy_share"][0] for value in (False, True))
    assert plain > 0.99
    assert fair < 0.9


def test_figure_shows_the_beginning_the_middle_and_the_end(checkpoints: Paths) -> None:
    table = probe.measure("spectrum", list(checkpoints.values()), num_images=7, device="cpu")
    titles = [ax.get_title(loc="left") for ax in Probe().draw(table).axes]
    assert titles == ["Before the first block", "After block 2", "After block 5"]
    summary = Probe().summary(table)
    assert len(summary) == 4 * 7
    assert summary["of the first three"].between(summary["energy of the first direction"], 1 + 1e-9).all()
    with pytest.raises(ValueError, match="No 'standardise' in the options of spectrum"):
        probe.make("spectrum", standardise=True)
