from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssat_probe import capture, geometry, observation, probe
from ssat_probe.probes.repetition import Probe
from ssat_probe.sample import Sample
from ssat_probe.subject import Batch, Subject

Paths = dict[str, Path]
SAMPLE = Sample(num_images=7, batch_size=3, device="cpu", dtype="float64")


def maps(subject: Subject) -> np.ndarray:
    """Weights by another way: unfused attention, read by a hook. (block, image, head, query, key), patches alone."""
    seen: list[torch.Tensor] = []
    for block in subject.model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        subject.model(torch.cat([batch.images for batch in subject.batches()]))
    patches = torch.stack(seen)[..., 1:, 1:]
    return (patches / patches.sum(-1, keepdim=True)).numpy()


def test_every_number_is_what_the_weights_say(checkpoints: Paths) -> None:
    table = Probe().measure(Subject.of(checkpoints["ssat"], SAMPLE)).set_index(["block", "other_block"])
    weights = maps(Subject.of(checkpoints["ssat"], SAMPLE))
    assert len(table) == 15
    for end, each in (("", weights), ("_mean", weights.mean(2, keepdims=True))):
        for (block, other), row in table.iterrows():
            a, b = each[block], each[other]
            cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            assert row[f"cosine{end}"] == pytest.approx(cosine.mean(), rel=1e-10)
            found = [np.corrcoef(x, y)[0, 1] for x, y in zip(a.reshape(-1, 16), b.reshape(-1, 16), strict=True)]
            assert row[f"correlation{end}"] == pytest.approx(np.mean(found), rel=1e-10)
            per_image = np.reshape(found, (7, -1)).mean(1)
            assert row[f"correlation{end}_sd"] == pytest.approx(per_image.std(ddof=1), rel=1e-9)


def test_maps_of_few_images_are_held_at_a_time(checkpoints: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject.of(checkpoints["ssat"], replace(SAMPLE, batch_size=7))
    whole = Probe().measure(subject)
    sizes: list[int] = []
    original = observation.ImageStatistics.add
    monkeypatch.setattr(
        observation.ImageStatistics,
        "add",
        lambda self, ids, *rest: sizes.append(len(ids)) or original(self, ids, *rest),
    )
    monkeypatch.setattr(observation, "MOST_MAPS", 2 * 6 * 4 * 16 * 16)  # of two images
    part = Probe().measure(subject)
    assert sizes[:: len(whole)] == [1, 2, 2, 2]
    np.testing.assert_allclose(part.to_numpy(float), whole.to_numpy(float), rtol=0, atol=1e-12)


PAIRS = {
    "vit": {(1, 0), (2, 0), (2, 1)},
    # A stage has other patches, and a shifted block other windows, than those beside it.
    "swin": set(),
    "pvt": {(2, 1)},
    "cait": {(1, 0), (2, 0), (2, 1)},
}


@pytest.mark.parametrize("name", PAIRS)
def test_blocks_compare_where_they_attend_over_the_same_patches(
    name: str, make_family: Callable[[str], tuple[torch.nn.Module, torch.Tensor]]
) -> None:
    model, images = make_family(name)
    batch = Batch(images, torch.zeros(2, dtype=torch.long), torch.arange(2))
    subject = SimpleNamespace(
        model=model, batches=lambda: iter([batch]), num_images=2, checkpoint=SimpleNamespace(path="x")
    )
    if not PAIRS[name]:
        with pytest.raises(ValueError, match=r"Two blocks of the model must attend over the same patches .* got none"):
            Probe().measure(subject)  # type: ignore[arg-type]
        return
    table = Probe().measure(subject)  # type: ignore[arg-type]
    assert {(row.block, row.other_block) for row in table.itertuples()} == PAIRS[name]
    assert table["correlation"].between(-1, 1).all()


def test_blocks_with_the_same_shifted_windows_compare_and_masked_keys_have_no_say() -> None:
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    options = {"img_size": (32, 48), "patch_size": 4, "num_classes": 3, "embed_dim": 6}
    model = SwinTransformer(**options, depths=(4,), num_heads=(2,), window_size=(3, 5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    images = torch.randn(2, 3, 32, 48)
    batch = Batch(images, torch.zeros(2, dtype=torch.long), torch.arange(2))
    subject = SimpleNamespace(
        model=model, batches=lambda: iter([batch]), num_images=2, checkpoint=SimpleNamespace(path="x")
    )
    table = Probe().measure(subject).set_index(["block", "other_block"])  # type: ignore[arg-type]
    assert set(table.index) == {(2, 0), (3, 1)}
    rows: dict[int, geometry.Rows] = {}
    with torch.no_grad(), capture.attention(model, lambda one: rows.__setitem__(one.block, geometry.arranged(one))):
        model(images)
    a, b = (rows[block].rows.softmax(-1).double() for block in (1, 3))
    expected = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()
    assert table.loc[(3, 1), "cosine"] == pytest.approx(expected.item(), rel=1e-5)
    valid = rows[1].is_valid
    assert valid is not None
    found = []
    for image, head, query in np.ndindex(*a.shape[:3]):
        mask = valid.expand_as(a)[image, head, query]
        found.append(np.corrcoef(a[image, head, query, mask], b[image, head, query, mask])[0, 1])
    assert table.loc[(3, 1), "correlation"] == pytest.approx(np.nanmean(found), rel=1e-4)


def test_figure_shows_neighbours_distances_and_matrices(checkpoints: Paths) -> None:
    table, _ = probe.measure_all(Probe(), list(checkpoints.values()), SAMPLE)
    figure = Probe().draw(table)
    titles = [ax.get_title("left") for ax in figure.axes]
    assert titles[:6] == ["Neighbours", "Neighbours", "Over the distance", "scratch", "SSL+FT", "SSAT"]
    assert "matrices: the first 3 of 4" in figure.legends[0].get_title().get_text()
    assert len(Probe().summary(table)) == 4 * 5
