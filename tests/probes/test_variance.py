import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssat_probe.probes.variance import Probe

IMAGES, DEPTH, PREFIX, DIM = 7, 3, 3, 10
SITES = 1 + 2 * DEPTH


@dataclass
class StandIn:
    """What a probe needs of a subject."""

    model: nn.Module
    images: Tensor
    batch_size: int
    order: list[int] = field(default_factory=list)

    def batches(self) -> Iterator[SimpleNamespace]:
        for ids in torch.tensor(self.order or range(len(self.images))).split(self.batch_size):
            yield SimpleNamespace(images=self.images[ids], ids=ids)


def make(batch_size: int = 3) -> StandIn:
    torch.manual_seed(3)
    model = VisionTransformer(
        img_size=(8, 12), patch_size=4, in_chans=1, embed_dim=DIM, depth=DEPTH, num_heads=2, reg_tokens=PREFIX - 1
    )
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.mul_(20)
            block.mlp.fc2.weight.mul_(20)
    images = torch.randn(IMAGES, 1, 8, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return StandIn(model.eval().double(), images, batch_size)


def by_hand(subject: StandIn) -> list[np.ndarray]:
    """Residual stream at every site, patch tokens as (image, token, channel), by walking through the blocks."""
    model = subject.model
    with torch.no_grad():
        stream = [model._pos_embed(model.patch_embed(subject.images))]
        for block in model.blocks:
            stream.append(stream[-1] + block.attn(block.norm1(stream[-1])))
            stream.append(stream[-1] + block.mlp(block.norm2(stream[-1])))
    return [x[:, PREFIX:].numpy() for x in stream]


def test_against_the_formula_of_park_and_kim_on_the_stream_walked_by_hand():
    table = Probe().measure(make())
    variances = np.stack([x.var(axis=1, ddof=1).mean(-1) for x in by_hand(make())])
    np.testing.assert_allclose(table["variance"], variances.mean(1), rtol=1e-12)
    np.testing.assert_allclose(table["variance_sd"], variances.std(1, ddof=1), rtol=1e-9)
    gains = np.log2(variances.mean(1)[1:] / variances.mean(1)[:-1])
    np.testing.assert_allclose(table["gain"][1:], gains, atol=1e-12)
    assert np.isnan(table["gain"][0])


def test_scale_free_form_is_the_share_of_energy_over_positions():
    table = Probe().measure(make())
    shares = np.stack([((x - x.mean(1, keepdims=True)) ** 2).sum((1, 2)) / (x**2).sum((1, 2)) for x in by_hand(make())])
    np.testing.assert_allclose(table["relative_variance"], shares.mean(1), rtol=1e-12)
    np.testing.assert_allclose(table["relative_variance_sd"], shares.std(1, ddof=1), rtol=1e-9)


def test_one_row_per_site_with_the_declared_columns():
    table = Probe().measure(make())
    assert list(table.columns) == [column.name for column in Probe.columns]
    assert table["site"].tolist() == ["embed", *["attention", "mlp"] * DEPTH]
    assert table["block"].tolist() == [-1, 0, 0, 1, 1, 2, 2]
    assert table["index"].tolist() == list(range(SITES))
    np.testing.assert_allclose(table["depth"], np.linspace(0, 1, SITES))
    assert (table["num_images"] == IMAGES).all()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_result_does_not_depend_on_the_batch_size(batch_size: int):
    numbers = Probe().measure(make(batch_size)).select_dtypes("number").to_numpy()
    expected = Probe().measure(make(IMAGES)).select_dtypes("number").to_numpy()
    np.testing.assert_allclose(numbers, expected, rtol=1e-12, atol=1e-12)


def test_result_does_not_depend_on_the_order():
    subject = make()
    expected = Probe().measure(subject).select_dtypes("number").to_numpy()
    subject.order = list(range(IMAGES))[::-1]
    numbers = Probe().measure(subject).select_dtypes("number").to_numpy()
    np.testing.assert_allclose(numbers, expected, rtol=1e-12, atol=1e-12)


def test_parity_with_park_and_kim_is_their_three_lines():
    table = Probe(parity="park_kim").measure(make(IMAGES))
    latents = [torch.from_numpy(x) for x in by_hand(make())]  # (image, token, channel), class token dropped
    for row, latent in zip(table.itertuples(), latents, strict=True):
        maps = latent.reshape(len(latent), 2, -1, latent.shape[-1]).permute(0, 3, 1, 2)
        assert row.variance == pytest.approx(maps.var(dim=[-1, -2]).mean(dim=[0, 1]).item(), rel=1e-12)
    with pytest.raises(ValueError, match="No 'parkkim' in parities"):
        Probe(parity="parkkim").measure(make())


def test_gains_have_intervals_from_the_same_resamples():
    table = Probe().measure(make())[1:]
    assert table["gain"].between(table["gain_low"], table["gain_high"]).all()
    widths = table["gain_high"] - table["gain_low"]
    assert (widths > 0).all()
    assert (table["gain_undefined"] == 0).all()


def test_the_spread_of_a_gain_is_what_each_image_adds_to_it():
    subject = make()
    table = Probe().measure(subject)
    variances = [x.var(axis=1, ddof=1).mean(-1) for x in by_hand(subject)]
    for row, (before, after) in zip(table[1:].itertuples(), pairwise(variances), strict=True):
        added = (after / after.mean() - before / before.mean()) / np.log(2)
        assert row.gain_sd == pytest.approx(added.std(ddof=1), rel=0.35)  # of few images and 1,000 resamples
    assert table["gain_undefined"].tolist() == [1.0] + [0.0] * (len(table) - 1)


def test_images_without_structure_have_no_variance():
    subject = make()
    with torch.no_grad():
        subject.model.pos_embed.zero_()
    subject.images = torch.ones_like(subject.images)
    table = Probe().measure(subject)
    np.testing.assert_allclose(table[["variance", "relative_variance"]], 0, atol=1e-20)


def with_identity(methods: list[str], seeds: list[int], blocks: int = DEPTH) -> pd.DataFrame:
    tables = []
    count = 1 + 2 * blocks
    for i, method in enumerate(methods):
        for seed in seeds:
            one = pd.DataFrame(
                {
                    "checkpoint": f"{method or 'foreign'}-{seed}",
                    "model": "m",
                    "method": method,
                    "data": "d",
                    "seed": seed,
                    "epoch": 1,
                    "index": range(count),
                    "site": ["embed", *["attention", "mlp"] * blocks],
                    "depth": np.linspace(0, 1, count),
                    "variance": np.linspace(1 + i + 0.1 * seed, 4, count),
                    "relative_variance": np.linspace(0.9 - 0.1 * i, 0.3 + 0.01 * seed, count),
                    "gain": [np.nan, *[-0.5, 0.25] * blocks],
                }
            )
            tables.append(one)
    return pd.read_csv(io.StringIO(pd.concat(tables).to_csv(index=False)))


@pytest.mark.parametrize(
    ("methods", "seeds", "blocks", "lines"),
    [(["ssat"], [0], 4, 1), (["scratch", "ssl_ft", "ssat"], [0, 1, 2], 12, 3), ([""], list(range(12)), 24, 12)],
)
def test_figure_has_labels_lines_and_grey_attention_steps(
    methods: list[str], seeds: list[int], blocks: int, lines: int
):
    figure = Probe().draw(with_identity(methods, seeds, blocks))
    left, right = figure.axes
    assert (left.get_xlabel(), left.get_ylabel()) == ("normalised depth", "variance [activation²]")
    assert (right.get_xlabel(), right.get_ylabel()) == ("normalised depth", "share of energy over positions")
    assert len(left.lines) == len(right.lines) == lines
    assert len(left.patches) == blocks
    first = left.patches[0].get_extents().transformed(left.transData.inverted())
    assert (first.x0, first.x1) == pytest.approx((0, 1 / (2 * blocks)))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0] == "attention step"
    if len(methods) == 3:
        assert texts[1:] == ["scratch", "SSL+FT", "SSAT"]


def test_networks_of_different_depth_have_no_common_grey_steps():
    table = pd.concat([with_identity(["ssat"], [0], 4), with_identity(["scratch"], [0], 12)])
    assert not Probe().draw(table).axes[0].patches


def test_wide_ranges_are_drawn_on_a_logarithmic_axis():
    table = with_identity(["ssat"], [0])
    assert Probe().draw(table).axes[0].get_yscale() == "linear"
    table.loc[0, "variance"] = 0.01
    assert Probe().draw(table).axes[0].get_yscale() == "log"


def test_summary_has_one_row_per_checkpoint():
    summary = Probe().summary(with_identity(["ssat", "scratch"], [0, 1]))
    assert summary["checkpoint"].tolist() == ["ssat-0", "ssat-1", "scratch-0", "scratch-1"]
    assert summary["gain per attention"].tolist() == [-0.5] * 4
    assert summary["gain per mlp"].tolist() == [0.25] * 4


def test_stages_begin_without_a_gain_and_no_line_runs_across(make_family):
    model, x = make_family("swin")
    table = Probe().measure(StandIn(model, x, 2))
    assert table["site"].tolist() == ["embed", *["attention", "mlp"] * 2, "merge", *["attention", "mlp"] * 2]
    assert table["stage"].tolist() == [0] * 5 + [1] * 5
    assert table["gain"].isna().tolist() == [True] + [False] * 4 + [True] + [False] * 4
    table = table.assign(checkpoint="a", method="scratch", seed=0, model="swin", data="digits", epoch=1)
    line = next(line for line in Probe().draw(table).axes[0].get_lines() if len(line.get_xdata()) > 2)
    assert np.isnan(line.get_ydata()).tolist() == [False] * 5 + [True] + [False] * 5
