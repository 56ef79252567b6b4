"""Files of vit-pytorch, old and new: logits agree with that package's forward pass, written here from its formulas."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ssat_probe.foreign import Foreign
from ssat_probe.formats import detect

DIM, INNER, HIDDEN, PATCH, CLASSES, DEPTH = 40, 128, 56, 5, 7, 3


def written(generator: torch.Generator, *, is_new: bool) -> dict[str, Tensor]:
    """A state dict as the package saves it; two heads of 64, a width that is neither."""
    pixels = 3 * PATCH * PATCH
    shapes = {"pos_embedding": (1, 17, DIM), "cls_token": (1, 1, DIM)}

    def linear(name: str, out: int, into: int, *, has_bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if has_bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)  # type: ignore[assignment]

    if is_new:
        norm("to_patch_embedding.1", pixels)
        norm("to_patch_embedding.3", DIM)
        norm("transformer.norm", DIM)
        linear("mlp_head", CLASSES, DIM)
    else:
        norm("mlp_head.0", DIM)
        linear("mlp_head.1", CLASSES, DIM)
    linear("to_patch_embedding.2" if is_new else "to_patch_embedding.1", DIM, pixels)
    inside = "" if is_new else "fn."
    for i in range(DEPTH):
        at = f"transformer.layers.{i}"
        norm(f"{at}.0.norm", DIM)
        linear(f"{at}.0.{inside}to_qkv", 3 * INNER, DIM, has_bias=False)
        linear(f"{at}.0.{inside}to_out.0", DIM, INNER)
        norm(f"{at}.1.net.0" if is_new else f"{at}.1.norm", DIM)
        linear(f"{at}.1.net.1" if is_new else f"{at}.1.fn.net.0", HIDDEN, DIM)
        linear(f"{at}.1.net.4" if is_new else f"{at}.1.fn.net.3", DIM, HIDDEN)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def forward(state: dict[str, Tensor], images: Tensor, *, is_new: bool) -> Tensor:
    """The package's forward pass with class-token pooling."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    inside = "" if is_new else "fn."
    x = rearrange(images, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=PATCH, p2=PATCH)
    if is_new:
        x = norm(linear(norm(x, "to_patch_embedding.1"), "to_patch_embedding.2"), "to_patch_embedding.3")
    else:
        x = linear(x, "to_patch_embedding.1")
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embedding"]
    for i in range(DEPTH):
        at = f"transformer.layers.{i}"
        qkv = linear(norm(x, f"{at}.0.norm"), f"{at}.0.{inside}to_qkv").chunk(3, -1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=2) for t in qkv)
        weights = (q @ k.transpose(-1, -2) * 64**-0.5).softmax(-1)
        x = x + linear(rearrange(weights @ v, "b h n d -> b n (h d)"), f"{at}.0.{inside}to_out.0")
        names = ("net.0", "net.1", "net.4") if is_new else ("norm", "fn.net.0", "fn.net.3")
        first, up, down = (f"{at}.1.{name}" for name in names)
        x = x + linear(F.gelu(linear(norm(x, first), up)), down)
    if is_new:
        return linear(norm(x, "transformer.norm")[:, 0], "mlp_head")
    return linear(norm(x[:, 0], "mlp_head.0"), "mlp_head.1")


@pytest.mark.parametrize("is_new", [True, False])
def test_logits_are_those_of_the_package(
    generator: Callable[[str], torch.Generator],
    opened: Callable[..., Foreign],
    logits: Callable[[Foreign, Tensor], Tensor],
    images: Tensor,
    *,
    is_new: bool,
) -> None:
    state = written(generator("lucidrains"), is_new=is_new)
    assert detect(state) == "lucidrains"
    foreign = opened(state)
    assert foreign.report.fraction == 1.0
    expected = forward(state, images, is_new=is_new)
    torch.testing.assert_close(logits(foreign, images), expected, rtol=1e-5, atol=1e-5)


def test_tokens_may_be_stored_without_a_batch_axis(
    generator: Callable[[str], torch.Generator],
    opened: Callable[..., Foreign],
    logits: Callable[[Foreign, Tensor], Tensor],
    images: Tensor,
) -> None:
    state = written(generator("newest"), is_new=True)
    expected = forward(state, images, is_new=True)
    state |= {name: state[name][0] for name in ("cls_token", "pos_embedding")}
    torch.testing.assert_close(logits(opened(state), images), expected, rtol=1e-5, atol=1e-5)
