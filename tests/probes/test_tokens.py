from pathlib import Path

import numpy as np
import pytest
import torch

from ssat_probe import probe
from ssat_probe.measures import tokens as measures
from ssat_probe.probes.tokens import Probe
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject

Paths = dict[str, Path]
SAMPLE = Sample(num_images=13, batch_size=5, device="cpu", dtype="float64")


def stream(subject: Subject) -> list[torch.Tensor]:
    """Patch tokens before the first and after every block, by hooks of our own."""
    outputs: list[torch.Tensor] = []
    handles = [subject.model.blocks[0].register_forward_pre_hook(lambda _, args: outputs.append(args[0][:, 1:]))]
    handles += [b.register_forward_hook(lambda _, args, out: outputs.append(out[:, 1:])) for b in subject.model.blocks]
    with torch.no_grad():
        for batch in subject.batches():
            subject.model(batch.images)
    for handle in handles:
        handle.remove()
    sites = len(subject.model.blocks) + 1
    return [torch.cat(outputs[i::sites]) for i in range(sites)]


def test_every_row_is_the_measure_of_that_blocks_output(checkpoints: Paths) -> None:
    subject = Subject.of(checkpoints["ssat"], SAMPLE)
    table = Probe().measure(subject)
    assert table["block"].tolist() == list(range(-1, 6))
    for row, tokens in zip(table.itertuples(), stream(subject), strict=True):
        values = measures.singular_values(tokens)
        assert row.cosine == pytest.approx(measures.cosine_similarity(tokens).mean().item())
        assert row.cosine_sd == pytest.approx(measures.cosine_similarity(tokens).std().item())
        assert row.effective_rank == pytest.approx(measures.effective_rank(values).mean().item())
        assert row.stable_rank <= row.energy_rank <= row.effective_rank <= row.ceiling == 15
        assert row.cosine_low < row.cosine < row.cosine_high
        assert row.num_images == 13


def test_image_ranks_are_of_the_mean_tokens_of_all_images_together(checkpoints: Paths) -> None:
    subject = Subject.of(checkpoints["ssat"], SAMPLE)
    table = Probe().measure(subject)
    for row, tokens in zip(table.itertuples(), stream(subject), strict=True):
        rows = tokens.mean(1).numpy()
        values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)[:12]
        shares, energies = values / values.sum(), values**2 / (values**2).sum()
        assert row.image_effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-10)
        assert row.image_energy_rank == pytest.approx(np.exp(-(energies * np.log(energies)).sum()), rel=1e-10)
        assert row.image_stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-10)
        assert row.image_ceiling == 12
    # Standardised over the positions of an image, its mean token would be 0: image ranks are of the tokens as they are.
    other = Probe(standardize=True).measure(subject)
    np.testing.assert_array_equal(other["image_effective_rank"], table["image_effective_rank"])


def test_differences_are_to_the_first_checkpoint_on_the_same_images(checkpoints: Paths) -> None:
    table, _ = probe.measure_all(Probe(untrained_twin=False), [checkpoints["scratch"], checkpoints["ssat"]], SAMPLE)
    first, second = (one.reset_index() for _, one in table.groupby("checkpoint", sort=False))
    assert first.filter(like="difference").isna().all(axis=None)
    np.testing.assert_allclose(second["cosine_difference"], second["cosine"] - first["cosine"], atol=1e-12)
    is_inside = second["cosine_difference"].between(second["cosine_difference_low"], second["cosine_difference_high"])
    assert is_inside.all()


def test_differences_are_empty_where_the_images_differ(checkpoints: Paths) -> None:
    one = Subject.of(checkpoints["scratch"], SAMPLE)
    other = Subject.of(checkpoints["ssat"], Sample(num_images=11, device="cpu", dtype="float64"))
    tables = Probe().between(iter([("a", one), ("b", other)]))
    assert tables[1].filter(like="difference").isna().all(axis=None)


def test_the_untrained_twin_is_one_more_checkpoint(checkpoints: Paths) -> None:
    table, record = probe.measure_all(Probe(), list(checkpoints.values()), SAMPLE)
    twin = table[table["method"] == "untrained"]
    assert twin["checkpoint"].unique().tolist() == ["vit_nano-digits-untrained-patch2x2-seed0"]
    assert set(twin["epoch"]) == {0}
    assert len(record["checkpoints"]) == 4
    own = Probe().measure(Subject.of(checkpoints["ssat"], SAMPLE).untrained())
    np.testing.assert_allclose(twin["cosine"], own["cosine"])


def test_figure_shows_every_method_and_the_twin(checkpoints: Paths) -> None:
    table, _ = probe.measure_all(Probe(), list(checkpoints.values()), SAMPLE)
    figure = Probe().draw(table)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["scratch", "SSL+FT", "SSAT", "untrained"]
    assert len(figure.axes) == 4
    assert len(Probe().summary(table)) == 8
