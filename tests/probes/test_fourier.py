from pathlib import Path

import numpy as np
import pytest
import torch

from ssat_probe import probe
from ssat_probe.probes.fourier import Probe
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject

Paths = dict[str, Path]
SAMPLE = Sample(num_images=13, batch_size=5, device="cpu", dtype="float64")


def test_coarse_grids_are_marked_and_the_frequency_is_the_true_one(fine_checkpoints: Paths) -> None:
    table = Probe().measure(Subject.of(fine_checkpoints["ssat"], SAMPLE))
    assert set(table["grid"]) == {"8x8"}
    assert set(table["is_coarse"]) == {"yes"}
    np.testing.assert_allclose(table["park_kim_frequency"], 3 / 4)
    assert table["index"].tolist() == list(range(13))
    assert table["log_amplitude"].between(table["log_amplitude_low"], table["log_amplitude_high"]).all()


def test_the_first_row_is_the_spectrum_of_the_embedding(fine_checkpoints: Paths) -> None:
    subject = Subject.of(fine_checkpoints["scratch"], SAMPLE)
    model = subject.model
    with torch.no_grad():
        images = torch.cat([batch.images for batch in subject.batches()])
        tokens = model.patch_embed(images) + model.pos_embed[:, 1:]
    energies = np.abs(np.fft.fft2(tokens.numpy().reshape(13, 8, 8, -1), axes=(1, 2))) ** 2
    # Of eight frequencies 0 1 2 3 4 3 2 1 quarters of pi, those from 3 on are high.
    is_high = np.isin(np.arange(8), [3, 4, 5])
    is_high = is_high[:, None] | is_high[None]
    shares = energies[:, is_high].sum((1, 2)) / (energies.sum((1, 2, 3)) - energies[:, 0, 0].sum(-1))
    assert Probe().measure(subject)["energy_share"][0] == pytest.approx(shares.mean())


def test_a_small_grid_is_refused(checkpoints: Paths) -> None:
    with pytest.raises(ValueError, match=r"at least 7 x 7 patches, got 4 x 4\."):
        Probe().measure(Subject.of(checkpoints["ssat"], SAMPLE))


def test_tokens_that_are_in_no_known_order_are_refused_with_what_to_do() -> None:
    """NesT's blocks get their patches block by block, of as many as there are in the grid that the model tells."""
    subject = Subject.of("timm:nest_tiny", Sample(data="digits", num_images=2, batch_size=2, device="cpu"))
    with pytest.raises(ValueError, match=r"got a Nest that does not\. Use probes that need no maps: variance, tokens"):
        Probe().measure(subject)


def test_differences_are_to_the_first_checkpoint(fine_checkpoints: Paths) -> None:
    table, _ = probe.measure_all(
        Probe(untrained_twin=False), [fine_checkpoints["scratch"], fine_checkpoints["ssat"]], SAMPLE
    )
    first, second = (one.reset_index() for _, one in table.groupby("checkpoint", sort=False))
    difference = second["log_amplitude"] - first["log_amplitude"]
    np.testing.assert_allclose(second["log_amplitude_difference"], difference, atol=1e-12)
    assert first["log_amplitude_difference"].isna().all()


def test_figure_says_that_the_grid_is_coarse(fine_checkpoints: Paths) -> None:
    table = probe.measure("fourier", list(fine_checkpoints.values()), num_images=13, device="cpu", untrained_twin=False)
    figure = Probe().draw(table)
    assert figure.legends[0].get_title().get_text() == "energy share of white noise: 0.62; coarse grid: 8x8"
    assert len(Probe().summary(table)) == 6
