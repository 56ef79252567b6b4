from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssat_probe import capture, probe
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


class StandIn:
    """What a probe needs of a subject, of any model."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images, self.num_images = model.double(), images.double(), len(images)
        self.checkpoint = SimpleNamespace(facts=SimpleNamespace(mean=(0.0,) * 3, std=(1.0,) * 3))

    def batches(self) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(images=self.images, ids=torch.arange(len(self.images)))


def captured(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Weights (window, head, query, key) of every block."""
    seen: list[Tensor] = []
    with torch.no_grad(), capture.attention(model, lambda one: seen.append(one.rows.softmax(-1))):
        model(images)
    return seen


def heads_of(table: pd.DataFrame) -> np.ndarray:
    """(head, row, column)."""
    mine = table[table["kind"] == "head"]
    return mine["value"].to_numpy().reshape(mine["head"].nunique(), mine["row"].max() + 1, -1)


class Numbers(nn.Module):
    """Takes the place of a window attention and remembers which patch the model put into which slot."""

    def forward(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        self.slots = windows[..., 0].long() - 1
        return windows


@pytest.mark.parametrize("name", ["swin", "swin padded", "swinv2", "our swin"])
def test_maps_of_windows_lie_where_the_model_itself_puts_a_map_of_coordinates(make_family: Callable, name: str) -> None:
    subject = StandIn(*make_family(name))
    has_shift = False
    for number, block in enumerate(capture.blocks(subject.model)):
        weights = captured(subject.model, subject.images[1:2])[number].numpy()
        attention, block.attn = block.attn, Numbers()
        grid = (8, 12) if number < 2 else (4, 6)
        block._attn(torch.arange(1.0, np.prod(grid) + 1).reshape(1, *grid, 1))
        slots, block.attn = block.attn.slots.numpy(), attention
        mask = getattr(block, "attn_mask", None)
        allowed = np.ones((len(slots), *weights.shape[2:]), dtype=bool) if mask is None else (mask == 0).numpy()
        has_shift |= mask is not None
        expected = np.zeros((weights.shape[1], np.prod(grid)))
        for window, patches in enumerate(slots):
            for q in np.flatnonzero(patches >= 0):
                counts = (patches >= 0) & allowed[window, q]
                row = weights[window, :, q, counts]  # (key, head)
                expected[:, patches[counts]] += (row / row.sum(0)).T
        table = Probe(images=(1,), block=number).measure(subject)
        ours = heads_of(table)
        assert ours.shape == (weights.shape[1], *grid)
        np.testing.assert_allclose(ours.reshape(len(ours), -1), expected, rtol=1e-9)  # each key gets 1 where uniform
        mean = table.loc[table["kind"] == "mean", "value"].to_numpy()
        np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-9)
        assert set(table["kind"]) == {"mean", "head", "red", "green", "blue"}
        assert set(table["query"]) == {"patches"}
        assert "all tokens of one grid, and layers.0.blocks.0.attn has " in table["no_rollout"].unique().item()
    assert has_shift


@pytest.mark.parametrize(
    ("name", "grids", "queries"),
    [
        ("pvt", [(4, 6), (4, 6), (4, 6)], ["patches"] * 3),
        ("twins", [None, (4, 6), None, (4, 6)], ["patches"] * 4),
        ("our cvt", [(8, 12), (4, 6), (2, 3), (2, 3)], ["patches", "patches", "cls", "cls"]),
        ("cait", [(4, 6)] * 5, ["patches"] * 3 + ["cls"] * 2),
    ],
)
def test_maps_of_coarser_keys_are_in_the_order_of_the_keys_own_grid(
    make_family: Callable, name: str, grids: list[tuple[int, int] | None], queries: list[str]
) -> None:
    subject = StandIn(*make_family(name))
    for number, weights in enumerate(captured(subject.model, subject.images[:1])):
        grid = grids[number]
        if grid is None:
            continue
        table = Probe(images=(0,), block=number).measure(subject)
        assert set(table["query"]) == {queries[number]}
        prefix = weights.shape[3] - grid[0] * grid[1]
        received = weights[0, :, 0, prefix:] if queries[number] == "cls" else weights[0].mean(1)
        expected = received / received.sum(1, keepdim=True) * received.shape[1]
        np.testing.assert_allclose(heads_of(table), expected.unflatten(1, grid), rtol=1e-9)
        assert "rollout" not in set(table["kind"])


def test_a_peak_in_a_shifted_window_is_drawn_at_its_patch(make_family: Callable) -> None:
    """Every query of the window of patch (3, 7) is made to attend to that patch alone."""
    model, x = make_family("swin")
    block = model.layers[0].blocks[1]
    assert block.shift_size == (1, 1)
    with torch.no_grad():
        block.norm1.weight.zero_()
        block.norm1.bias.zero_()
        block.attn.qkv.weight.zero_()
        block.attn.qkv.bias.zero_()
        block.attn.relative_position_bias_table.zero_()
    qkv = block.attn.qkv

    class Marked(nn.Module):
        """Keys of one patch alone are along the queries."""

        def forward(self, windows: Tensor) -> Tensor:
            found = torch.zeros(*windows.shape[:2], 3, *windows.shape[2:], dtype=windows.dtype)
            found[:, :, 0] = 1
            # Rolled by one up and left, (3, 7) is at (2, 6): the first slot of window 1 * 6 + 3 of 4 x 6.
            found[9, 0, 1] = 60
            return found.flatten(2)

    block.attn.qkv = Marked()
    table = Probe(images=(0,), block=1).measure(StandIn(model, x))
    assert qkv is not block.attn.qkv
    values = heads_of(table)
    for head in values:
        assert np.unravel_index(head.argmax(), head.shape) == (3, 7)
        np.testing.assert_allclose(head[3, 7], 4, rtol=1e-9)
        np.testing.assert_allclose(head[[3, 4, 4], [8, 7, 8]], 0, atol=1e-9)
        np.testing.assert_allclose(np.delete(head.ravel(), [3 * 12 + 7, 3 * 12 + 8, 4 * 12 + 7, 4 * 12 + 8]), 1)


def test_figure_and_summary_say_why_there_is_no_rollout(make_family: Callable) -> None:
    swin = Probe(images=(0,)).measure(StandIn(*make_family("swin"))).assign(checkpoint="swin", method="", seed="")
    figure = Probe().draw(swin)
    panels = [ax for ax in figure.axes if ax.get_ylabel() != "attention / uniform attention"]
    assert [ax.get_ylabel() for ax in panels] == ["image 0", "mean", "head 0", "head 1", "head 2"]
    note = " ".join(figure.legends[0].get_title().get_text().split())
    assert "no rollout" in note
    assert "layers.0.blocks.0.attn has 24 windows of 4 queries and 4 keys" in note
    row = Probe().summary(swin).iloc[0]
    assert "24 windows of 4 queries" in row["rollout peaks at"]
