from collections.abc import Callable

import pytest
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ssat_probe import anatomy


def test_model_without_blocks_or_without_a_number_of_prefix_tokens_is_refused():
    with pytest.raises(ValueError, match=r"must have transformer blocks: .* got a Linear without"):
        anatomy.blocks(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"in 'num_prefix_tokens' .* got a Linear with None"):
        anatomy.num_prefix_tokens(nn.Linear(2, 3))


def test_sites_are_embed_and_two_per_block():
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2)
    assert [(site.index, site.block, site.name) for site in anatomy.sites(model)] == [
        (0, -1, "embed"), (1, 0, "attention"), (2, 0, "mlp"), (3, 1, "attention"), (4, 1, "mlp"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "prefix", "blocks"),
    [
        ("vit", 1, ["blocks.0", "blocks.1", "blocks.2"]),
        ("deit distilled", 2, ["blocks.0", "blocks.1", "blocks.2"]),
        ("registers", 5, ["blocks.0", "blocks.1", "blocks.2"]),
        ("gap", 0, ["blocks.0", "blocks.1", "blocks.2"]),
        ("swin", 0, [f"layers.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]),
        ("our cvt", 0, ["stage0.blocks.0", "stage1.blocks.0", "stage2.blocks.0", "stage2.blocks.1"]),
        ("swinv2", 0, [f"layers.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]),
        ("cait", 0, [*(f"blocks.{i}" for i in range(3)), "blocks_token_only.0", "blocks_token_only.1"]),
        ("pvt", 0, ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1"]),
        ("twins", 0, [f"blocks.{i}.{j}" for i in (0, 1) for j in (0, 1)]),
        ("mvit", 0, ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1"]),
        ("mvit class token", 1, ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1"]),
        ("torchvision", 1, [f"encoder.layers.encoder_layer_{i}" for i in range(3)]),
    ],
)
def test_blocks_and_prefix_tokens_of_every_family(make_family: Callable, name: str, prefix: int, blocks: list[str]):
    model, _ = make_family(name)
    found = anatomy.find_blocks(model)
    assert [block.name for block in found] == blocks
    assert [block.index for block in found] == list(range(len(blocks)))
    assert [dict(model.named_modules())[block.name] for block in found] == anatomy.blocks(model)
    assert anatomy.num_prefix_tokens(model) == prefix


def test_class_attention_has_the_class_query_alone(make_family: Callable):
    model, _ = make_family("cait")
    assert anatomy.blocks_with(model, "patch") == (0, 1, 2)
    assert anatomy.blocks_with(model, "cls") == (3, 4)
    assert anatomy.blocks_with(model, "all") == (0, 1, 2, 3, 4)
    assert anatomy.blocks_with(make_family("vit")[0], "cls") == (0, 1, 2)
    with pytest.raises(ValueError, match="queries 'cls' needs a model with a class token, got a SwinTransformer"):
        anatomy.blocks_with(make_family("swin")[0], "cls")


def test_tokens_before_the_patches_are_told_by_stage(make_family: Callable):
    model, _ = make_family("our cvt")
    assert [anatomy.num_prefix_tokens(model, stage) for stage in (0, 1, 2)] == [0, 0, 1]
    assert anatomy.has_class_token(model)
    assert anatomy.blocks_with(model, "cls") == (2, 3)
    assert anatomy.blocks_with(model, "patch") == anatomy.blocks_with(model, "all") == (0, 1, 2, 3)
