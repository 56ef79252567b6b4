"""VideoMAE files in both spellings against a forward pass written anew, on still clips of two frames."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssat_probe.foreign import Foreign
from ssat_probe.formats import detect
from ssat_probe.formats.videomae import sinusoids

DIM, HEADS, DEPTH, CLASSES, SIDE = 64, 1, 2, 5, 16


def weights(generator: torch.Generator) -> dict[str, Tensor]:
    """A fine-tuned file under the official names."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (DIM, 3, 2, SIDE, SIDE), "patch_embed.proj.bias": (DIM,), "fc_norm.weight": (DIM,),
        "fc_norm.bias": (DIM,), "head.weight": (CLASSES, DIM), "head.bias": (CLASSES,),
    }  # fmt: skip
    for i in range(DEPTH):
        inner = {
            "norm1.weight": (DIM,), "norm1.bias": (DIM,), "attn.q_bias": (DIM,), "attn.v_bias": (DIM,),
            "attn.qkv.weight": (3 * DIM, DIM), "attn.proj.weight": (DIM, DIM), "attn.proj.bias": (DIM,),
            "norm2.weight": (DIM,), "norm2.bias": (DIM,), "mlp.fc1.weight": (2 * DIM, DIM), "mlp.fc1.bias": (2 * DIM,),
            "mlp.fc2.weight": (DIM, 2 * DIM), "mlp.fc2.bias": (DIM,),
        }  # fmt: skip
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in inner.items()}
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def forward(w: dict[str, Tensor], clips: Tensor, eps: float) -> Tensor:
    """Logits of clips (batch, channel, frame, height, width), by the formulas."""
    x = F.conv3d(clips, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=(2, SIDE, SIDE))
    x = x.flatten(2).transpose(1, 2)
    position, j = torch.arange(x.shape[1]).double()[:, None], torch.arange(DIM).double()
    angle = position / 10000 ** (2 * (j // 2) / DIM)
    x = x + torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (DIM,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    for i in range(DEPTH):
        b = f"blocks.{i}"
        bias = torch.cat([w[f"{b}.attn.q_bias"], torch.zeros(DIM), w[f"{b}.attn.v_bias"]])
        q, k, v = F.linear(norm(x, f"{b}.norm1"), w[f"{b}.attn.qkv.weight"], bias).chunk(3, -1)
        y = (q @ k.mT / math.sqrt(DIM // HEADS)).softmax(-1) @ v
        x = x + F.linear(y, w[f"{b}.attn.proj.weight"], w[f"{b}.attn.proj.bias"])
        y = F.gelu(F.linear(norm(x, f"{b}.norm2"), w[f"{b}.mlp.fc1.weight"], w[f"{b}.mlp.fc1.bias"]))
        x = x + F.linear(y, w[f"{b}.mlp.fc2.weight"], w[f"{b}.mlp.fc2.bias"])
    return F.linear(norm(x.mean(1), "fc_norm"), w["head.weight"], w["head.bias"])


def face(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of transformers."""
    table = {"proj": "attention.output.dense", "fc1": "intermediate.dense", "fc2": "output.dense"}
    state = {}
    for name, value in w.items():
        parts = name.split(".")
        if parts[0] == "patch_embed":
            state[f"videomae.embeddings.patch_embeddings.projection.{parts[-1]}"] = value
        elif parts[0] == "blocks":
            stem = f"videomae.encoder.layer.{parts[1]}"
            if parts[3] == "qkv":
                for part, one in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    state[f"{stem}.attention.attention.{part}.weight"] = one
            elif parts[3] in ("q_bias", "v_bias"):
                state[f"{stem}.attention.attention.{parts[3]}"] = value
            elif parts[2] in ("norm1", "norm2"):
                place = "before" if parts[2] == "norm1" else "after"
                state[f"{stem}.layernorm_{place}.{parts[3]}"] = value
            else:
                state[f"{stem}.{table[parts[3]]}.{parts[4]}"] = value
        else:
            state[name.replace("head.", "classifier.")] = value
    return state


@pytest.mark.parametrize("is_face", [False, True])
def test_logits_are_those_of_a_still_clip(
    generator: Callable[[str], torch.Generator],
    opened: Callable[..., Foreign],
    logits: Callable[[Foreign, Tensor], Tensor],
    is_face: bool,
) -> None:
    w = weights(generator("videomae"))
    state = face(w) if is_face else w
    assert detect(state) == "videomae"
    foreign = opened({"model": state} if not is_face else state)
    assert (foreign.report.layout, foreign.report.fraction, foreign.facts.img_size) == ("videomae", 1.0, (224, 224))
    images = torch.randn(2, 3, 224, 224, generator=generator("stills"))
    expected = forward(w, images[:, :, None].expand(-1, -1, 2, -1, -1), 1e-12 if is_face else 1e-6)
    torch.testing.assert_close(logits(foreign, images), expected, rtol=1e-4, atol=1e-4)
    assert "still clip" in foreign.report.note


def test_a_pre_training_file_has_an_encoder_behind_its_prefix_and_no_head(
    generator: Callable[[str], torch.Generator], opened: Callable[..., Foreign]
) -> None:
    w = weights(generator("videomae"))
    state = {f"encoder.{name}".replace("fc_norm", "norm"): value for name, value in w.items() if "head" not in name}
    state |= {"encoder_to_decoder.weight": torch.zeros(8, DIM), "mask_token": torch.zeros(1, 1, 8)}
    state |= {"decoder.head.bias": torch.zeros(3)}
    assert detect(state) == "videomae"
    foreign = opened({"model": state, "epoch": 799})
    assert foreign.report.fraction == 1.0
    assert sorted(foreign.report.dropped) == ["decoder.head.bias", "encoder_to_decoder.weight", "mask_token"]
    assert torch.equal(foreign.state["norm.weight"], w["fc_norm.weight"])
    keys = foreign.state["blocks.0.attn.qkv.bias"][DIM : 2 * DIM]
    assert torch.equal(keys, torch.zeros(DIM))


def test_positions_do_not_depend_on_how_many_there_are() -> None:
    torch.testing.assert_close(sinusoids(1568, 12)[:196], sinusoids(196, 12), rtol=0, atol=0)
    assert torch.equal(sinusoids(1, 4), torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
