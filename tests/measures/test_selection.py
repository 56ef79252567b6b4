"""Selection of parameters by pattern: which, in what order, parts of the fused qkv, and what matches nothing."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from ssat_probe.measures.certificate import certify
from ssat_probe.measures.dense import dense
from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.selection import selected


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    torch.manual_seed(5)
    sizes = {"img_size": 6, "patch_size": 3, "in_chans": 1, "num_classes": 5, "embed_dim": 6, "depth": 2}
    return VisionTransformer(**sizes, num_heads=2, mlp_ratio=1).double().eval()


@pytest.fixture(scope="module")
def pairs() -> list:
    torch.manual_seed(7)
    images, labels = torch.randn(11, 1, 6, 6).double(), torch.randint(5, (11,))
    return [((x, y), len(x)) for x, y in zip(images.split(4), labels.split(4), strict=True)]


def operator(vit, pairs, patterns) -> HessianOperator:
    parameters, coordinates = selected(dict(vit.named_parameters()), patterns)
    return HessianOperator(parameters, lambda b: F.cross_entropy(vit(b[0]), b[1]), pairs, coordinates=coordinates)


def test_no_pattern_means_everything(vit):
    parameters, coordinates = selected(dict(vit.named_parameters()), ())
    assert list(parameters) == [name for name, _ in vit.named_parameters()]
    assert coordinates is None


def test_patterns_keep_the_order_of_the_model_and_count_overlaps_once(vit):
    parameters, coordinates = selected(dict(vit.named_parameters()), ("head.*", "blocks.1.norm*", "*.bias"))
    wanted = [n for n, _ in vit.named_parameters() if n.startswith(("head.", "blocks.1.norm")) or n.endswith(".bias")]
    assert list(parameters) == wanted
    assert coordinates is None


@pytest.mark.parametrize(("part", "place"), [("q", 0), ("k", 1), ("v", 2)])
def test_a_part_of_qkv_is_the_block_of_the_whole_hessian(vit, pairs, part, place):
    whole = dense(operator(vit, pairs, ("blocks.1.attn.qkv.*",)))
    mine = operator(vit, pairs, (f"blocks.1.attn.{part}.*",))
    assert mine.is_restricted
    assert mine.size == 6 * 6 + 6
    rows = torch.cat([torch.arange(36) + 36 * place, 108 + torch.arange(6) + 6 * place])
    torch.testing.assert_close(dense(mine), whole[rows][:, rows], rtol=0, atol=1e-14)


def test_all_three_parts_are_the_whole(vit):
    parts = tuple(f"blocks.0.attn.{part}.*" for part in "qkv")
    parameters, coordinates = selected(dict(vit.named_parameters()), parts)
    assert list(parameters) == ["blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"]
    assert coordinates is None


def test_a_restricted_operator_passes_the_certificate_and_moves_only_its_own(vit, pairs):
    mine = operator(vit, pairs, ("*.attn.k.weight",))
    names = ["determinism", "reduction", "symmetry", "finite difference"]
    assert [check.name for check in certify(mine).checks] == names
    before = vit.blocks[0].attn.qkv.weight.detach().clone()
    with mine.moved(torch.ones(mine.size, dtype=torch.float64)) as happened:
        assert happened.shape == (mine.size,)
        moved = vit.blocks[0].attn.qkv.weight.detach() - before
    assert moved[6:12].min() > 0.9
    assert moved[:6].abs().max() == moved[12:].abs().max() == 0
    assert torch.equal(vit.blocks[0].attn.qkv.weight, before)
    assert mine.evaluate().gradient.shape == (mine.size,)


def test_a_pattern_that_matches_nothing(vit):
    with pytest.raises(ValueError, match=r"got 'blocks\.7\.\*' that matches none of .*head\.bias"):
        selected(dict(vit.named_parameters()), ("blocks.0.*", "blocks.7.*"))


def test_a_projection_that_cannot_be_cut_in_three_has_no_parts():
    with pytest.raises(ValueError, match=r"got 'a\.q\.weight' that matches none of a\.qkv\.weight"):
        selected({"a.qkv.weight": torch.zeros(7, 2)}, ("a.q.weight",))
