import pytest
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ssat_probe import anatomy


def test_model_without_blocks_or_without_a_number_of_prefix_tokens_is_refused():
    with pytest.raises(ValueError, match="must hold its transformer blocks in 'blocks', got a Linear without"):
        anatomy.blocks(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"in 'num_prefix_tokens' .* got a Linear with None"):
        anatomy.num_prefix_tokens(nn.Linear(2, 3))


def test_sites_are_embed_and_two_per_block():
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2)
    assert [(site.index, site.block, site.name) for site in anatomy.sites(model)] == [
        (0, -1, "embed"), (1, 0, "attention"), (2, 0, "mlp"), (3, 1, "attention"), (4, 1, "mlp"),
    ]  # fmt: skip
