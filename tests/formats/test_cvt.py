"""CvT's official layout, from a model written for these tests: the loaded one gives its logits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ssat_probe.foreign import Foreign
from ssat_probe.formats import detect
from ssat_probe.subject import Subject

Lively = Callable[..., nn.Module]
Open = Callable[..., Foreign]
Logits = Callable[[Foreign, Tensor], Tensor]


class Named(nn.Module):
    """Parts under the names of the official files; what they do is written in `logits_of`."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def projection(dim: int, stride: int) -> nn.Module:
    return Named(conv=nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False), bn=nn.BatchNorm2d(dim))


def block(dim: int) -> nn.Module:
    maps = {f"conv_proj_{letter}": projection(dim, 1 if letter == "q" else 2) for letter in "qkv"}
    lines = {f"proj_{letter}": nn.Linear(dim, dim) for letter in "qkv"}
    attention = Named(**maps, **lines, proj=nn.Linear(dim, dim))
    mlp = Named(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim))
    return Named(norm1=nn.LayerNorm(dim), attn=attention, norm2=nn.LayerNorm(dim), mlp=mlp)


def official(dims: tuple[int, ...], depths: tuple[int, ...], classes: int) -> nn.Module:
    """Weights of a CvT in the layout of Microsoft's files; 7x7 embedding of stride 4, then 3x3 of stride 2."""
    stages: dict[str, nn.Module] = {}
    before = 3
    for number, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        kernel, stride, pad = (3, 2, 1) if number else (7, 4, 2)
        embed = Named(proj=nn.Conv2d(before, dim, kernel, stride, pad), norm=nn.LayerNorm(dim))
        stages[f"stage{number}"] = Named(patch_embed=embed, blocks=nn.ModuleList(block(dim) for _ in range(depth)))
        before = dim
    stages[f"stage{len(dims) - 1}"].cls_token = nn.Parameter(torch.zeros(1, 1, before))
    whole = Named(**stages, norm=nn.LayerNorm(before))
    if classes:
        whole.head = nn.Linear(before, classes)
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            module.num_batches_tracked.fill_(41)  # type: ignore[union-attr]
    return whole


def logits_of(model: nn.Module, images: Tensor, width: int) -> Tensor:
    """Wu et al. (2021), Sec. 3, on named parts; attention one head at a time, scaled by the whole width."""
    x, token = images, images.new_zeros(len(images), 0, 0)
    for number in range(len([name for name, _ in model.named_children() if name.startswith("stage")])):
        stage = model.get_submodule(f"stage{number}")
        x = stage.patch_embed.proj(x)
        rows, columns = x.shape[2:]
        x = stage.patch_embed.norm(x.flatten(2).transpose(1, 2))
        token = stage.cls_token.repeat(len(x), 1, 1) if hasattr(stage, "cls_token") else x[:, :0]
        for one in stage.blocks:
            joined = torch.cat([token, x], 1)
            normed = one.norm1(joined)
            first, rest = normed[:, : token.shape[1]], normed[:, token.shape[1] :]
            image = rest.transpose(1, 2).reshape(len(x), -1, rows, columns)
            parts = {}
            for letter in "qkv":
                way = one.attn.get_submodule(f"conv_proj_{letter}")
                flat = way.bn(way.conv(image)).flatten(2).transpose(1, 2)
                parts[letter] = one.attn.get_submodule(f"proj_{letter}")(torch.cat([first, flat], 1))
            outs = []
            for q, k, v in zip(*(parts[letter].split(width, -1) for letter in "qkv"), strict=True):
                outs.append((q @ k.transpose(1, 2) / joined.shape[-1] ** 0.5).softmax(-1) @ v)
            joined = joined + one.attn.proj(torch.cat(outs, -1))
            hidden = one.mlp.fc1(one.norm2(joined))
            joined = joined + one.mlp.fc2(hidden * (1.702 * hidden).sigmoid())
            token, x = joined[:, : token.shape[1]], joined[:, token.shape[1] :]
        x = x.transpose(1, 2).reshape(len(x), -1, rows, columns)
    found = model.norm(token[:, 0])
    return model.head(found) if hasattr(model, "head") else found


@pytest.fixture
def wide_images(generator: Callable[[str], torch.Generator]) -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=generator("wide"))


@pytest.mark.parametrize("classes", [5, 0])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_logits_are_those_of_the_official_layout(
    lively: Lively, opened: Open, logits: Logits, wide_images: Tensor, classes: int, prefix: str
) -> None:
    torch.manual_seed(0)
    model = lively(official((64, 128, 192), (1, 1, 2), classes))
    state = model.state_dict()
    assert detect(state) == "cvt"
    named = {prefix + name: value for name, value in reversed(state.items())}
    foreign = opened({"state_dict": named, "epoch": 3, "model": "cls_cvt"}, img_size=(32, 48))
    with torch.no_grad():
        torch.testing.assert_close(
            logits(foreign, wide_images), logits_of(model, wide_images, 64), rtol=1e-4, atol=1e-4
        )
    report = foreign.report
    assert (report.layout, report.entry, report.fraction) == ("cvt", "state_dict", 1.0)
    assert report.loaded == tuple(sorted(state))
    assert report.missing == report.unexpected == ()
    assert (foreign.recipe.model, foreign.recipe.patch_size) == ("CvT", (4, 4))
    assert [foreign.state[f"stage{i}.blocks.0.attn.conv_proj_k.bn.num_batches_tracked"] for i in range(3)] == [41] * 3


def test_heads_of_another_width_are_told_by_those_of_the_first_stage(
    lively: Lively, opened: Open, logits: Logits, wide_images: Tensor
) -> None:
    model = lively(official((6, 9, 12), (1, 1, 1), 5))
    with pytest.raises(ValueError, match=r"got stages of width 6, 9, 12 that heads of width 64 .* with --heads"):
        opened(model.state_dict(), img_size=(32, 48))
    foreign = opened(model.state_dict(), img_size=(32, 48), heads=2)
    with torch.no_grad():
        torch.testing.assert_close(logits(foreign, wide_images), logits_of(model, wide_images, 3), rtol=1e-4, atol=1e-4)


def test_what_is_missing_and_what_is_left_over_is_reported(lively: Lively, opened: Open) -> None:
    state = lively(official((64, 128), (1, 1), 5)).state_dict()
    lacking = {name: value for name, value in state.items() if "conv_proj_v.bn" not in name} | {"foo": torch.ones(2)}
    with pytest.raises(
        ValueError, match=r"missing: 10 \(stage0.blocks.0.attn.conv_proj_v.bn.bias.*unexpected: 1 \(foo"
    ):
        opened(lacking, img_size=(32,))
    report = opened(lacking, img_size=(32,), allow_partial=True).report
    assert set(report.missing) == {name for name in state if "conv_proj_v.bn" in name}
    assert report.unexpected == ("foo",)
    assert 0.99 < report.fraction < 1
    with pytest.raises(ValueError, match="do not tell the image size; give it with --img-size"):
        opened(state)
    with pytest.raises(ValueError, match="must have blocks in 'stage1', got none"):
        opened({name: value for name, value in state.items() if "stage1.blocks" not in name}, img_size=(32,))


def test_without_a_mask_token_there_is_no_masked_pass(lively: Lively, opened: Open, wide_images: Tensor) -> None:
    from types import SimpleNamespace

    foreign = opened(lively(official((64, 128), (1, 1), 5)).state_dict(), img_size=(32, 48))
    stand_in = SimpleNamespace(model=foreign.encoder(), checkpoint=foreign)
    with pytest.raises(ValueError, match="must hold a model with a masked pass for this, got a Model without"):
        Subject.masks(stand_in, None)  # type: ignore[arg-type]
