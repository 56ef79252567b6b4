from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ssat_probe import probe
from ssat_probe.capture import Attention
from ssat_probe.placement import Place
from ssat_probe.probes.heads import Probe, _finished, _rows
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject

Paths = dict[str, Path]
SAMPLE = Sample(num_images=7, batch_size=3, device="cpu", dtype="float64")


def maps(subject: Subject) -> np.ndarray:
    """Weights by another way: timm's own unfused attention, read by a hook. (block, image, head, query, key)."""
    seen: list[torch.Tensor] = []
    for block in subject.model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        subject.model(torch.cat([batch.images for batch in subject.batches()]))
    return torch.stack(seen).numpy()


def test_every_number_is_what_the_weights_say(checkpoints: Paths) -> None:
    table = Probe().measure(Subject.of(checkpoints["ssat"], SAMPLE))
    weights = maps(Subject.of(checkpoints["ssat"], SAMPLE))
    rows, patches = weights[..., 1:, :], weights[..., 1:, 1:]
    renormalised = patches / patches.sum(-1, keepdims=True)
    place = np.stack(np.divmod(np.arange(16), 4), 1) * 2.0
    distance = np.sqrt(((place[:, None] - place[None]) ** 2).sum(-1))
    expected = {
        "mass_to_prefix": rows[..., 0].mean(-1),
        "mass_prefix_to_prefix": weights[..., 0, 0],
        "effective_keys": np.exp(entropy(renormalised, axis=-1)).mean(-1),
        "entropy_all": entropy(rows, axis=-1).mean(-1),
        "distance": (renormalised * distance).sum(-1).mean(-1),
        "distance_probing_vits": (patches * distance).sum(-1).mean(-1),
        "key_entropy": entropy(renormalised.mean(-2), axis=-1),
        "divergence": entropy(renormalised, renormalised.mean(2, keepdims=True), axis=-1).mean(-1),
    }
    for name, values in expected.items():  # (block, image, head)
        np.testing.assert_allclose(table[name], values.mean(1).ravel(), rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(table["distance_sd"], expected["distance"].std(1, ddof=1).ravel())
    np.testing.assert_allclose(table["distance_uniform"], distance.mean())
    parts = table["entropy_groups"] + table["entropy_prefix"] + table["entropy_patch"]
    np.testing.assert_allclose(parts, table["entropy_all"])
    assert table["nmi"].between(table["nmi_low"], table["nmi_high"]).all()


def test_parities_are_the_numbers_of_the_codes_they_are_named_after() -> None:
    """A class token and 4 x 4 patches of 16 px: two images, three heads, of random scores."""
    generator = torch.Generator().manual_seed(43)
    scores = 2 * torch.randn(2, 3, 17, 17, generator=generator, dtype=torch.float64)
    place = Place("blocks.0", nn.Identity(), None, batch=2, grid=(4, 4), stride=(16, 16), num_prefix=1)
    theirs = {
        # naver-ai/cl-vs-mim at eafe516, self_attention_analysis.ipynb, cells 10 and 12: calculate_mean_attention_dist
        # and calculate_nmi, of weights that their loops cut, floored and renormalised.
        "distance": [
            [29.198729173659423, 32.88461513723341, 32.16247740916865],
            [31.26388756664158, 32.75279934692137, 32.745328792301365],
        ],
        "nmi_cl_vs_mim": [
            [0.35150448496142156, 0.3681309559479969, 0.31309247512397026],
            [0.3888993038821416, 0.3257356551679711, 0.33475129749154786],
        ],
        # sayakpaul/probing-vits at b1b08d3, notebooks/mean-attention-distance-1k.ipynb, cell 14:
        # compute_mean_attention_dist with one class token.
        "distance_probing_vits": [
            [27.65433381012985, 29.116254751611905, 29.526778095274395],
            [28.674802517304343, 30.295828826992818, 31.085646004668618],
        ],
    }
    # wangsr126/mae-lite at f3090d4, projects/eval_tools/visualize/attn_analyzer.py, _Analyzer: mean over the images.
    of_mae_lite = [26.452394823881686, 28.71636883681772, 28.397165213143133]
    seen = Attention(0, "blocks.0.attn", scores, True, None, 0, 17, place)
    values, _ = _finished({name: getattr(one, "value", one) for name, one in _rows(seen).items()})
    for name, expected in theirs.items():
        np.testing.assert_allclose(values[name], expected, rtol=1e-10, err_msg=name)
    np.testing.assert_allclose(values["distance_mae_lite"].mean(0), of_mae_lite, rtol=1e-10)


def test_differences_are_of_blocks_because_heads_have_no_common_order(checkpoints: Paths) -> None:
    table, _ = probe.measure_all(Probe(untrained_twin=False), [checkpoints["scratch"], checkpoints["ssat"]], SAMPLE)
    first, second = (one.groupby("block").mean(numeric_only=True) for _, one in table.groupby("method", sort=False))
    np.testing.assert_allclose(second["distance_difference"], second["distance"] - first["distance"], atol=1e-12)
    assert table.groupby(["method", "block"])["distance_difference"].nunique().max() == 1
    assert first["distance_difference"].isna().all()


def test_figure_has_the_uniform_reference(checkpoints: Paths) -> None:
    table = probe.measure("heads", list(checkpoints.values()), num_images=7, device="cpu", untrained_twin=True)
    figure = Probe().draw(table)
    assert len(figure.axes) == 6
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["scratch", "SSL+FT", "SSAT", "untrained", "uniform attention"]
    assert len(Probe().summary(table)) == 4 * 6


def test_capture_is_checked_and_hooks_are_gone_after_a_failure(checkpoints: Paths) -> None:
    subject = Subject.of(checkpoints["ssat"], SAMPLE)
    with torch.no_grad():
        subject.model.blocks[2].attn.qkv.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"blocks\.2\.attn: captured weights @ values must equal"):
        Probe().measure(subject)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())


@pytest.mark.parametrize(
    ("options", "prefix"), [({}, 1), ({"class_token": False, "global_pool": "avg"}, 0), ({"reg_tokens": 4}, 5)]
)
def test_class_and_register_tokens_and_oblong_grids_of_timms_models(options: dict[str, Any], prefix: int) -> None:
    torch.manual_seed(5)
    sizes = {"img_size": (6, 10), "patch_size": 2, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 3}
    model = VisionTransformer(**sizes, num_classes=2, **options).eval().double()
    batch = SimpleNamespace(images=torch.randn(3, 1, 6, 10, dtype=torch.float64), ids=torch.arange(3))
    table = Probe().measure(SimpleNamespace(model=model, batches=lambda: iter([batch])))  # type: ignore[arg-type]
    # Fresh weights attend nearly uniformly: the prefix gets its share of the tokens.
    np.testing.assert_allclose(table["mass_to_prefix"], prefix / (15 + prefix), rtol=0.05)
    assert (table["entropy_prefix"] > 1e-3).all() == (prefix > 1)
    assert table["mass_prefix_to_prefix"].isna().all() == (prefix == 0)
    place = np.stack(np.divmod(np.arange(15), 5), 1) * 2.0
    uniform = np.sqrt(((place[:, None] - place[None]) ** 2).sum(-1)).mean()
    np.testing.assert_allclose(table["distance_uniform"], uniform)
    np.testing.assert_allclose(table["distance_normalised"], 1, rtol=0.05)


class StandIn:
    """What a probe needs of a subject."""

    fingerprint = setting = ""
    num_images = 2

    def __init__(self, model: torch.nn.Module, images: torch.Tensor) -> None:
        self.model, self.images = model, images

    def batches(self) -> Any:
        for i, image in enumerate(self.images):
            yield SimpleNamespace(images=image[None], ids=torch.tensor([i]))


def by_window(model: torch.nn.Module, x: torch.Tensor) -> list[list[list[torch.Tensor]]]:
    """Weights (image, head, query, key) of every set of patches that attend to each other, by block.

    Gathered key by key from the map of the whole image: by another way than the windows of the model.
    """
    found = []
    seen: list[torch.Tensor] = []
    for layer in model.layers:
        for block in layer.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        model(x)
    for weights, block in zip(seen, (b for layer in model.layers for b in layer.blocks), strict=True):
        rows, columns = block.input_resolution
        (high, wide), (down, right) = block.window_size, block.shift_size
        across = -(-columns // wide)
        slots: dict[tuple[int, ...], list[int]] = {}
        for r in range(rows):
            for c in range(columns):
                i, j = (r - down) % rows, (c - right) % columns
                window, slot = i // high * across + j // wide, i % high * wide + j % wide
                allowed = () if block.attn_mask is None else tuple((block.attn_mask[window, slot] == 0).tolist())
                slots.setdefault((window, *allowed), []).append(slot)
        per_image = -(-rows // high) * across
        groups = []
        for (window, *_), inside in slots.items():
            mine = weights[window::per_image][:, :, inside][..., inside].double()
            groups.append(mine / mine.sum(-1, keepdim=True))
        found.append(groups)
    return found


@pytest.mark.parametrize("name", ["swin", "swin padded", "swinv2"])
def test_windows_are_the_rows_of_patches_that_attend_to_each_other(make_family: Any, name: str) -> None:
    model, x = make_family(name)
    table = Probe(untrained_twin=False).measure(StandIn(*make_family(name)))  # type: ignore[arg-type]
    for block, groups in enumerate(by_window(model, x)):
        ours = table[table["block"] == block]
        counts = np.array([one.shape[2] for one in groups])
        assert counts.sum() == (96 if block < 2 else 24)
        entropies = [entropy(one.numpy(), axis=-1).mean(-1) for one in groups]  # (image, head) each
        between = [entropy(one.numpy().mean(2), axis=-1) for one in groups]
        information = np.average(np.stack(between) - np.stack(entropies), axis=0, weights=counts).mean(0)
        np.testing.assert_allclose(ours["information"], information, rtol=1e-4, atol=1e-6)
        many = [i for i, count in enumerate(counts) if count > 1]
        nmi = [(between[i] - entropies[i]) / np.sqrt(np.log(counts[i]) * between[i]) for i in many]
        np.testing.assert_allclose(
            ours["nmi"], np.average(np.stack(nmi), axis=0, weights=counts[many]).mean(0), rtol=1e-4, atol=1e-6
        )
        spread = np.average(np.stack(entropies), axis=0, weights=counts).mean(0)
        np.testing.assert_allclose(ours["entropy_patch"], spread, rtol=1e-4)
        np.testing.assert_allclose(ours["keys_uniform"], np.average(counts, weights=counts))
        assert ours["nmi_cl_vs_mim"].isna().all()


def test_every_family_has_numbers_within_their_bounds(family: tuple[str, torch.nn.Module, torch.Tensor]) -> None:
    name, model, x = family
    table = Probe(untrained_twin=False).measure(StandIn(model, x))  # type: ignore[arg-type]
    assert table["block"].nunique() == (4 if "swin" in name or name in ("our cvt", "twins") else 3)
    assert (table["distance"] > 0).all()
    assert table["mass_to_prefix"].between(0, 1).all()
    assert table["nmi"].between(0, 1).all()
    many = table.groupby("block")["head"].transform("count") > 1
    assert table["divergence_normalised"][many].between(0, 1).all()
    assert table["divergence"][~many].isna().all()  # one head has no others
    np.testing.assert_allclose(table["distance_normalised"] * table["distance_uniform"], table["distance"], rtol=0.2)
