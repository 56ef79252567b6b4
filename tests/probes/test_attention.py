import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import special, stats
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssat_probe import drawing
from ssat_probe.probes.attention import Probe

IMAGES, DEPTH, HEADS, PATCHES, PREFIX = 7, 3, 2, 6, 3


@dataclass
class StandIn:
    """What a probe needs of a subject."""

    model: nn.Module
    images: Tensor
    batch_size: int = 3
    order: list[int] = field(default_factory=list)

    def batches(self) -> Iterator[SimpleNamespace]:
        for ids in torch.tensor(self.order or range(len(self.images))).split(self.batch_size):
            yield SimpleNamespace(images=self.images[ids], ids=ids)


def make_model(*, is_fused: bool = True, **options) -> nn.Module:
    torch.manual_seed(3)
    sizes = {"img_size": (8, 12), "patch_size": 4, "in_chans": 1, "embed_dim": 10, "depth": DEPTH, "num_heads": HEADS}
    model = VisionTransformer(**sizes | {"reg_tokens": PREFIX - 1} | options).eval().double()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(30)
            block.attn.fused_attn = is_fused
    return model


def make(batch_size: int = 3, **options) -> StandIn:
    images = torch.randn(IMAGES, 1, 8, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return StandIn(make_model(**options), images, batch_size)


def maps(subject: StandIn) -> np.ndarray:
    """Weights by another way: timm's own unfused attention, read by a hook. (block, image, head, query, key)."""
    seen: list[Tensor] = []
    handles = []
    for block in subject.model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out)))
    with torch.no_grad():
        subject.model(subject.images)
    for handle in handles:
        handle.remove()
    return torch.stack(seen).numpy()


def numbers(table: pd.DataFrame) -> np.ndarray:
    return table.drop(columns="self_check").select_dtypes("number").to_numpy()


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("queries", ["patch", "cls", "all"])
@pytest.mark.parametrize("keys", ["patch", "all"])
def test_against_scipy_on_maps_read_another_way(queries: str, keys: str, is_fused: bool):
    subject = make(is_fused=is_fused)
    table = Probe(queries=queries, keys=keys).measure(subject)
    weights = maps(subject)
    if keys == "patch":
        weights = weights[..., PREFIX:] / weights[..., PREFIX:].sum(-1, keepdims=True)
    weights = {"patch": weights[..., PREFIX:, :], "cls": weights[..., :1, :], "all": weights}[queries]
    num_keys = weights.shape[-1]
    per_image = {
        "entropy": special.entr(weights).sum(-1).mean(-1),
        "entropy_normalised": special.entr(weights).sum(-1).mean(-1) / np.log(num_keys),
        "kurtosis": stats.kurtosis(weights, axis=-1).mean(-1),
        "kurtosis_normalised": (stats.kurtosis(weights, axis=-1).mean(-1) + 2) / (num_keys - 3 + 1 / (num_keys - 1)),
    }
    for name, values in per_image.items():
        np.testing.assert_allclose(table[name], values.mean(1).ravel(), atol=1e-9, err_msg=name)
        np.testing.assert_allclose(table[f"{name}_sd"], values.std(1, ddof=1).ravel(), atol=1e-9, err_msg=name)
    median = np.median(stats.kurtosis(weights, axis=-1), axis=-1).mean(1).ravel()
    np.testing.assert_allclose(table["kurtosis_median"], median, atol=1e-9)
    np.testing.assert_allclose(table["skew"], stats.skew(weights, axis=-1).mean(-1).mean(1).ravel(), atol=1e-9)
    assert (table["num_keys"] == num_keys).all()
    assert (table["undefined"] == 0).all()
    assert (table["keys"] == keys).all()
    assert (table["queries"] == queries).all()


def test_one_row_per_block_and_head_with_the_declared_columns():
    table = Probe().measure(make())
    assert list(table.columns) == [column.name for column in Probe.columns]
    assert table[["block", "head"]].to_numpy().tolist() == [[b, h] for b in range(DEPTH) for h in range(HEADS)]
    assert (table["num_images"] == IMAGES).all()
    assert table["self_check"].between(0, 1e-12).all()


def test_result_does_not_depend_on_the_batch_size_nor_on_the_order():
    expected = numbers(Probe().measure(make(batch_size=IMAGES)))
    for batch_size in (1, 2, 5):
        np.testing.assert_allclose(numbers(Probe().measure(make(batch_size))), expected, rtol=0, atol=1e-12)
    shuffled = make()
    shuffled.order = [3, 0, 6, 1, 5, 2, 4]
    np.testing.assert_allclose(numbers(Probe().measure(shuffled)), expected, rtol=0, atol=1e-12)


def test_result_does_not_depend_on_the_order_of_the_patches():
    subject = make()
    expected = numbers(Probe().measure(subject))
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    embed = subject.model.patch_embed.forward
    subject.model.patch_embed.forward = lambda x: embed(x)[:, order]
    position = subject.model.pos_embed.data
    subject.model.pos_embed.data = torch.cat([position[:, :PREFIX], position[:, PREFIX:][:, order]], 1)
    np.testing.assert_allclose(numbers(Probe().measure(subject)), expected, rtol=0, atol=1e-12)


def test_uniform_attention_has_normalised_entropy_one_and_undefined_kurtosis():
    subject = make()
    with torch.no_grad():
        for block in subject.model.blocks:
            block.attn.qkv.weight[:10] = 0
            block.attn.qkv.bias.zero_()
    table = Probe().measure(subject)
    np.testing.assert_allclose(table["entropy_normalised"], 1, atol=1e-12)
    np.testing.assert_allclose(table["entropy"], np.log(PATCHES), atol=1e-12)
    np.testing.assert_allclose(table["effective_keys"], PATCHES, rtol=1e-12)
    assert (table["undefined"] == 1).all()
    assert table[["kurtosis", "kurtosis_median", "kurtosis_normalised", "skew"]].isna().all(axis=None)


def test_heads_are_averaged_after_the_measure():
    table = Probe(blocks=(1,)).measure(make())
    layer = Probe().summary(table.assign(checkpoint="a"))["entropy"].item()
    weights = maps(make())[1][..., PREFIX:, PREFIX:]
    weights = weights / weights.sum(-1, keepdims=True)
    assert layer == pytest.approx(special.entr(weights).sum(-1).mean(), abs=1e-12)
    assert layer < special.entr(weights.mean(1)).sum(-1).mean() - 0.01


def test_some_blocks_only():
    everything = Probe().measure(make())
    some = Probe(blocks=(2, 0, 2)).measure(make())
    expected = everything[everything["block"] != 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(some, expected)


@pytest.mark.parametrize("block", [-1, 3])
def test_block_that_does_not_exist_is_refused(block: int):
    with pytest.raises(ValueError, match=f"blocks must lie between 0 and 2 for this model, got {block}"):
        Probe(blocks=(0, block)).measure(make())


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match=r"No 'patches' in queries: patch, cls, all\. Did you mean 'patch'\?"):
        Probe(queries="patches").measure(make())
    with pytest.raises(ValueError, match="No 'cls' in keys: patch, all"):
        Probe(keys="cls").measure(make())


def test_class_token_is_never_guessed():
    subject = make(class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="queries 'cls' needs a model with a class token, got a VisionTransformer"):
        Probe(queries="cls").measure(subject)
    assert (Probe(queries="all").measure(subject)["num_keys"] == PATCHES).all()


def test_module_attention_is_measured_from_its_weights():
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(10, HEADS, batch_first=True)

        def forward(self, x: Tensor, **_) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    subject = make()
    for block in subject.model.blocks:
        inner = Inner().double()
        inner.attention.in_proj_weight.data, inner.attention.in_proj_bias.data = (
            block.attn.qkv.weight.data,
            block.attn.qkv.bias.data,
        )
        inner.attention.out_proj.weight.data = block.attn.proj.weight.data
        inner.attention.out_proj.bias.data = block.attn.proj.bias.data
        block.attn = inner.eval()
    tables = [Probe().measure(one) for one in (subject, make())]
    assert tables[0]["kurtosis_scores"].isna().all()  # it does not show its scores
    tables = [one[[name for name in one if not name.startswith("kurtosis_scores")]] for one in tables]
    np.testing.assert_allclose(numbers(tables[0]), numbers(tables[1]), atol=1e-9)


def with_identity(table: pd.DataFrame, methods: list[str], seeds: list[int], blocks: int = DEPTH) -> pd.DataFrame:
    tables = []
    for i, method in enumerate(methods):
        for seed in seeds:
            one = pd.concat([table[table["block"] == 0].assign(block=block) for block in range(blocks)])
            shift = 0.03 * i + 0.01 * seed
            one = one.assign(entropy_normalised=one["entropy_normalised"] - shift, kurtosis=one["kurtosis"] + shift)
            one.insert(0, "checkpoint", f"{method or 'foreign'}-{seed}")
            tables.append(one.assign(model="m", method=method, data="d", seed=seed, epoch=1))
    return pd.read_csv(io.StringIO(pd.concat(tables).to_csv(index=False)))


@pytest.mark.parametrize(
    ("methods", "seeds", "blocks", "lines"),
    [(["ssat"], [0], 4, 1), (["scratch", "ssl_ft", "ssat"], [0, 1, 2], 12, 3), ([""], list(range(12)), 24, 12)],
)
def test_figure_has_labels_lines_and_the_reference(methods: list[str], seeds: list[int], blocks: int, lines: int):
    table = with_identity(Probe().measure(make()), methods, seeds, blocks)
    figure = Probe().draw(table)
    left, right = figure.axes
    assert (left.get_xlabel(), left.get_ylabel()) == ("block", "entropy / log(number of keys)")
    assert (right.get_xlabel(), right.get_ylabel()) == ("block", "excess kurtosis")
    assert len(left.lines) == lines + 1
    assert set(left.lines[0].get_ydata()) == {1}
    assert len(left.lines[1].get_xdata()) == blocks
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0] == "uniform attention"
    assert len(texts) == lines + 1
    if len(methods) == 3:
        assert texts[1:] == ["scratch", "SSL+FT", "SSAT"]
        np.testing.assert_allclose(
            left.lines[3].get_ydata(),
            table[table["method"] == "ssat"].groupby("block")["entropy_normalised"].mean(),
            atol=1e-12,
        )


def test_dots_are_the_single_heads():
    table = with_identity(Probe().measure(make()), ["ssat"], [0])
    figure = Probe().draw(table)
    offsets = figure.axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(offsets[:, 1], table["entropy_normalised"])
    assert "dots: single heads" in figure.legends[0].get_title().get_text()


def test_large_kurtosis_is_drawn_on_a_logarithmic_axis():
    table = with_identity(Probe().measure(make()), ["ssat"], [0]).assign(kurtosis=150.0)
    assert Probe().draw(table).axes[1].get_yscale() == "symlog"


def test_undefined_kurtosis_draws():
    table = with_identity(Probe().measure(make()), ["ssat", "scratch"], [0, 1]).assign(kurtosis=np.nan)
    with drawing.style():
        Probe().draw(table).canvas.draw()


def test_summary_has_one_row_per_checkpoint_and_block():
    table = with_identity(Probe().measure(make()), ["ssat", "scratch"], [0, 1])
    summary = Probe().summary(table)
    assert len(summary) == 4 * DEPTH
    assert summary["checkpoint"].unique().tolist() == ["ssat-0", "ssat-1", "scratch-0", "scratch-1"]


@pytest.mark.parametrize(
    "name", ["swin", "swin padded", "swinv2", "our cvt", "pvt", "mvit class token", "torchvision", "cait"]
)
def test_rows_are_normed_by_the_keys_that_are_allowed(make_family: Any, name: str) -> None:
    from ssat_probe import capture, geometry

    model, x = make_family(name)
    stand_in = SimpleNamespace(
        model=model, fingerprint="", setting="",
        batches=lambda: (SimpleNamespace(images=one[None], ids=torch.tensor([i])) for i, one in enumerate(x)),
    )  # fmt: skip
    table = Probe(untrained_twin=False).measure(stand_in)  # type: ignore[arg-type]
    expected: dict[int, list[torch.Tensor]] = {}

    def reduce(seen: capture.Attention) -> None:
        if seen.num_queries > 1:
            rows = geometry.arranged(seen)
            weights = (rows.rows.softmax(-1) if rows.has_scores else rows.rows / rows.rows.sum(-1, True)).double()
            keys = (weights > 0).sum(-1) if rows.is_valid is None else rows.is_valid.sum(-1)
            normed = torch.special.entr(weights).sum(-1) / keys.double().log()
            expected[rows.block] = [normed.where(keys > 1, torch.nan).nanmean(-1).mean(0), keys.double().mean()]

    with torch.no_grad(), capture.attention(model, reduce):
        model(x)
    assert list(expected) == table["block"].unique().tolist()
    for block, (normed, keys) in expected.items():
        ours = table[table["block"] == block]
        np.testing.assert_allclose(ours["entropy_normalised"], normed, rtol=1e-4)
        np.testing.assert_allclose(ours["num_keys"], float(keys))
        assert ours["entropy_normalised"].between(0, 1).all()
        assert ours["kurtosis_received"].isna().all() == ("swin" in name)
