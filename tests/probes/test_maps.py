from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from ssat_probe import probe
from ssat_probe.probes.maps import Probe
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject

Paths = dict[str, Path]
SAMPLE = Sample(num_images=7, batch_size=3, device="cpu", dtype="float64")


def weights(subject: Subject) -> np.ndarray:
    """Weights by another way: timm's own unfused attention, read by a hook. (block, image, head, query, key)."""
    seen: list[torch.Tensor] = []
    for block in subject.model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        subject.model(torch.cat([batch.images for batch in subject.batches()]))
    return torch.stack(seen).numpy()


def test_maps_are_the_attention_of_the_class_token_in_units_of_uniform(checkpoints: Paths) -> None:
    table = Probe(images=(5, 2), block=3).measure(Subject.of(checkpoints["ssat"], SAMPLE))
    assert table["image"].unique().tolist() == [5, 2]
    all_weights = weights(Subject.of(checkpoints["ssat"], SAMPLE))
    for image in (5, 2):
        one = table[table["image"] == image]
        cls = all_weights[3, image, :, 0, 1:]
        for head in range(4):
            mine = one[(one["kind"] == "head") & (one["head"] == head)]
            assert mine[["row", "column"]].to_numpy().tolist() == [[i // 4, i % 4] for i in range(16)]
            np.testing.assert_allclose(mine["value"], cls[head] / cls[head].sum() * 16)
        mean = cls.mean(0)
        np.testing.assert_allclose(one.loc[one["kind"] == "mean", "value"], mean / mean.sum() * 16)
        product = np.eye(17)
        for block in all_weights[:, image]:
            product = (block.mean(0) + np.eye(17)) / 2 @ product
        rolled = product[0, 1:] / product[0, 1:].sum() * 16
        np.testing.assert_allclose(one.loc[one["kind"] == "rollout", "value"], rolled)
    assert set(table["query"]) == {"cls"}


def test_colours_are_those_of_the_image(checkpoints: Paths) -> None:
    subject = Subject.of(checkpoints["ssat"], SAMPLE)
    table = Probe(images=(1,)).measure(subject)
    pixels = subject.images.read([1])[0, 0].numpy() / 255
    for colour in ("red", "green", "blue"):
        values = table.loc[table["kind"] == colour, "value"].to_numpy().reshape(8, 8)
        np.testing.assert_allclose(values, pixels, atol=1e-12)


def test_what_does_not_exist_is_refused(checkpoints: Paths) -> None:
    subject = Subject.of(checkpoints["ssat"], SAMPLE)
    with pytest.raises(ValueError, match="images must lie between 0 and 6, got 7"):
        Probe(images=(0, 7)).measure(subject)
    with pytest.raises(ValueError, match="block must lie between -6 and 5, got 6"):
        Probe(block=6).measure(subject)


def test_without_a_class_token_maps_are_the_mean_over_the_patches(checkpoints: Paths) -> None:
    torch.manual_seed(2)
    subject = Subject.of(checkpoints["ssat"], SAMPLE)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 3}
    model = VisionTransformer(**sizes, num_classes=2, class_token=False, global_pool="avg").eval().double()
    object.__setattr__(subject, "model", model)
    table = Probe(images=(0,), block=0).measure(subject)
    expected = weights(subject)[0, 0].mean((0, 1)) * 16
    np.testing.assert_allclose(table.loc[table["kind"] == "mean", "value"], expected)
    assert set(table["query"]) == {"patches"}


def test_figure_has_a_row_per_line_and_image(checkpoints: Paths) -> None:
    table = probe.measure("maps", list(checkpoints.values()), num_images=7, device="cpu", images=(0, 4))
    figure = Probe().draw(table)
    panels = [ax for ax in figure.axes if ax.get_ylabel() != "attention / uniform attention"]
    assert len(panels) == 3 * 2 * (1 + 2 + 4)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["scratch", "SSL+FT", "SSAT"]
    assert len(Probe().summary(table)) == 6
