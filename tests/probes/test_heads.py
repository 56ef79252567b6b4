from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from timm.models.vision_transformer import VisionTransformer

from ssat_probe import probe
from ssat_probe.probes.heads import Probe
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
