"""A small timm model with lively weights, and other people's files of it, written in their own key layouts."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ssat_probe.foreign import Foreign, open_weights
from ssat_probe.source import Source

State = dict[str, Tensor]
SIZE = {"img_size": 20, "patch_size": 5, "embed_dim": 128, "depth": 3, "num_heads": 2, "mlp_ratio": 1.5}


@pytest.fixture
def lively(generator: Callable[[str], torch.Generator]) -> Callable[..., nn.Module]:
    """A model in eval mode in which every number matters: no bias is 0 and no gain is 1."""

    def made(model: nn.Module | None = None, **options: object) -> nn.Module:
        model = model or VisionTransformer(**({"num_classes": 7} | SIZE | options))  # type: ignore[arg-type]
        draw = generator("lively")
        with torch.no_grad():
            for value in model.parameters():
                value += 0.1 * torch.randn(value.shape, generator=draw)
        return model.eval()

    return made


@pytest.fixture
def images(generator: Callable[[str], torch.Generator]) -> Tensor:
    return torch.randn(2, 3, 20, 20, generator=generator("images"))


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Foreign]:
    """Write something with torch and open it as foreign weights."""

    def write(content: object, **fields: object) -> Foreign:
        torch.save(content, tmp_path / "a.pth")
        found = open_weights(tmp_path / "a.pth", Source(**fields))  # type: ignore[arg-type]
        assert isinstance(found, Foreign)
        return found

    return write


@pytest.fixture
def logits() -> Callable[[Foreign, Tensor], Tensor]:
    def computed(foreign: Foreign, images: Tensor) -> Tensor:
        with torch.no_grad():
            return foreign.encoder().eval()(images)

    return computed


class MaskedAutoencoder(nn.Module):
    """As the official MAE and SSAT code names and orders its parts, written anew for these tests."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = VisionTransformer(num_classes=0, **SIZE)  # type: ignore[arg-type]
        self.decoder_embed = nn.Linear(128, 32)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 17, 32), requires_grad=False)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(Block(32, 16, 4, qkv_bias=True, norm_layer=norm) for _ in range(2))
        self.decoder_norm = norm(32)
        self.decoder_pred = nn.Linear(32, 75)
        if classes:
            self.head = nn.Linear(128, classes)

    def names(self) -> State:
        """State dict with the encoder at the top, as the official files have it."""
        return {name.removeprefix("encoder."): value for name, value in self.state_dict().items()}

    def reconstruct(self, images: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> Tensor:
        vit = self.encoder
        x = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        x = torch.gather(x, 1, ids_keep[..., None].repeat(1, 1, 128))
        x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        x = self.decoder_embed(vit.norm(vit.blocks(x)))
        masks = self.mask_token.repeat(len(x), ids_restore.shape[1] + 1 - x.shape[1], 1)
        y = torch.cat([x[:, 1:], masks], 1)
        y = torch.gather(y, 1, ids_restore[..., None].repeat(1, 1, 32))
        y = torch.cat([x[:, :1], y], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            y = block(y)
        return self.decoder_pred(self.decoder_norm(y))[:, 1:]


@pytest.fixture
def autoencoder(lively: Callable[..., nn.Module]) -> Callable[[int], MaskedAutoencoder]:
    return lambda classes: lively(MaskedAutoencoder(classes))  # type: ignore[return-value]
