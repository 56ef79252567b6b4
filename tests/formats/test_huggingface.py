"""ViT, DeiT and ViTMAE files of transformers, written from timm's weights by the published key table."""

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssat_probe.foreign import Foreign
from ssat_probe.formats import detect

Lively = Callable[..., nn.Module]
Open = Callable[..., Foreign]


def layers(state: dict[str, Tensor], theirs: str, ours: str, depth: int) -> dict[str, Tensor]:
    """The blocks behind ``ours`` as transformers names them behind ``theirs``."""
    written = {}
    for i in range(depth):
        for end in ("weight", "bias"):
            query, key, value = state[f"{ours}.{i}.attn.qkv.{end}"].chunk(3)
            at = f"{theirs}.{i}"
            written |= {
                f"{at}.attention.attention.query.{end}": query,
                f"{at}.attention.attention.key.{end}": key,
                f"{at}.attention.attention.value.{end}": value,
                f"{at}.attention.output.dense.{end}": state[f"{ours}.{i}.attn.proj.{end}"],
                f"{at}.intermediate.dense.{end}": state[f"{ours}.{i}.mlp.fc1.{end}"],
                f"{at}.output.dense.{end}": state[f"{ours}.{i}.mlp.fc2.{end}"],
                f"{at}.layernorm_before.{end}": state[f"{ours}.{i}.norm1.{end}"],
                f"{at}.layernorm_after.{end}": state[f"{ours}.{i}.norm2.{end}"],
            }
    return {name: value.clone() for name, value in written.items()}


def vit(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    ends = ("weight", "bias")
    written = {f"{prefix}embeddings.cls_token": state["cls_token"]}
    written |= {f"{prefix}embeddings.position_embeddings": state["pos_embed"]}
    written |= {f"{prefix}embeddings.patch_embeddings.projection.{e}": state[f"patch_embed.proj.{e}"] for e in ends}
    written |= {f"{prefix}layernorm.{e}": state[f"norm.{e}"] for e in ends}
    return written | layers(state, f"{prefix}encoder.layer", "blocks", 3)


def reference(lively: Lively, **options: object) -> nn.Module:
    """timm's model with the ε of transformers."""
    model = lively(**options)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12
    return model


def test_a_classifier(
    lively: Lively, opened: Open, logits: Callable[[Foreign, Tensor], Tensor], images: Tensor
) -> None:
    model = reference(lively)
    state = vit(model.state_dict(), "vit.")
    state |= {"classifier.weight": model.head.weight, "classifier.bias": model.head.bias}
    state |= {"vit.embeddings.mask_token": torch.zeros(1, 1, 128)}
    assert detect(state) == "huggingface"
    foreign = opened(state)
    assert torch.equal(logits(foreign, images), model(images))
    assert foreign.facts.mean == (0.5, 0.5, 0.5)
    assert set(foreign.report.dropped) == {"vit.embeddings.mask_token"}


def test_a_bare_model_with_a_pooler(
    lively: Lively, opened: Open, logits: Callable[[Foreign, Tensor], Tensor], images: Tensor
) -> None:
    model = reference(lively, num_classes=0)
    foreign = opened(vit(model.state_dict(), "") | {"pooler.dense.weight": torch.zeros(128, 128)})
    assert torch.equal(logits(foreign, images), model(images))


def test_vitmae_with_its_decoder(autoencoder: Callable, lively: Lively, opened: Open, images: Tensor) -> None:
    official = autoencoder(0)
    for module in official.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12
    state = official.names()
    written = vit(state, "vit.") | layers(state, "decoder.decoder_layers", "decoder_blocks", 2)
    written |= {"decoder.mask_token": state["mask_token"], "decoder.decoder_pos_embed": state["decoder_pos_embed"]}
    for name in ("decoder_embed", "decoder_norm", "decoder_pred"):
        written |= {f"decoder.{name}.{end}": state[f"{name}.{end}"] for end in ("weight", "bias")}
    foreign = opened(written)
    encoder, decoder = foreign.encoder().eval(), foreign.decoder()
    assert decoder is not None
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), official.encoder(images))
        keep = torch.tensor([[0, 3, 5, 9], [1, 2, 7, 15]])
        mask = torch.ones(2, 16, dtype=torch.bool).scatter(1, keep, False)
        rest = torch.stack([torch.nonzero(row)[:, 0] for row in mask])
        expected = official.reconstruct(images, keep, torch.cat([keep, rest], 1).argsort(1))
        torch.testing.assert_close(decoder.eval()(encoder.encode(images, mask)), expected, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_triple_is_left_over_not_guessed(lively: Lively, opened: Open) -> None:
    state = vit(reference(lively, num_classes=0).state_dict(), "")
    del state["encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(
        ValueError, match=r"missing: 1 \(blocks\.1\.attn\.qkv\.weight\); unexpected: 2 \(encoder\.layer"
    ):
        opened(state)
    assert isinstance(reference(lively), VisionTransformer)
