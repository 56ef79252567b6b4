"""The Swin Transformer that names and shapes tell, and the sentence where they do not."""

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from ssat_probe.formats import Converted
from ssat_probe.hierarchy import inferred_swin
from ssat_probe.source import Source

SMALL = {"img_size": 32, "patch_size": 2, "embed_dim": 6, "depths": (1, 3), "num_heads": (2, 3), "window_size": 4}


def state(**options: object) -> dict[str, Tensor]:
    return SwinTransformer(**(SMALL | {"num_classes": 5} | options)).state_dict()  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"mlp_ratio": 2.0}, {"in_chans": 1}, {"window_size": 5}])
def test_names_and_shapes_tell_all_but_the_image_size(options: dict[str, object]) -> None:
    wanted = state(**options)
    model = inferred_swin(Converted(wanted), Source(img_size=(32,)))
    model.load_state_dict(wanted)
    assert [len(layer.blocks) for layer in model.layers] == [1, 3]
    with pytest.raises(ValueError, match="do not tell the image size; give it with --img-size"):
        inferred_swin(Converted(wanted), Source())


def test_windows_that_are_not_told_are_named() -> None:
    bare = {name: value for name, value in state().items() if "table" not in name}
    with pytest.raises(ValueError, match=r"a table of relative positions for each stage .* got 0; name the model"):
        inferred_swin(Converted(bare), Source(img_size=(32,)))
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(ValueError, match="must tell square windows, got a table of 35 relative positions"):
        inferred_swin(Converted(state() | {name: torch.zeros(35, 2)}), Source(img_size=(32,)))


def test_absurd_names_are_refused() -> None:
    hostile = state() | {"layers.0.blocks.99999999.norm1.weight": torch.zeros(6)}
    with pytest.raises(ValueError, match="at most 256 blocks, got block 99999999"):
        inferred_swin(Converted(hostile), Source(img_size=(32,)))
