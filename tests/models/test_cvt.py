"""CvT against a plain reading of the paper, and its masked pass against leaks."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssat_probe import capture
from ssat_probe.budget import budget_of
from ssat_probe.checkpoint import load_checkpoint
from ssat_probe.models import cvt
from ssat_probe.network import build_encoder, resolve
from ssat_probe.recipe import Recipe
from ssat_probe.training import train

Make = Callable[..., tuple]
DIMS, DEPTHS, HEADS = (6, 8, 15), (1, 2, 2), (2, 4, 3)


def made(img_size: tuple[int, int] = (24, 48), patch_size: tuple[int, int] = (2, 4)) -> cvt.Model:
    torch.manual_seed(5)
    model = cvt.Model(
        img_size=img_size, patch_size=patch_size, channels=3, num_classes=11, dims=DIMS, depths=DEPTHS, heads=HEADS,
        mlp_ratio=2,
    ).double()  # fmt: skip
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after some training
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def images_of(generator: Callable[[str], torch.Generator], img_size: tuple[int, int] = (24, 48)) -> Tensor:
    return torch.randn(5, 3, *img_size, generator=generator("cvt"), dtype=torch.float64)


def by_the_paper(
    state: dict[str, Tensor], image: Tensor, strides: tuple[tuple[int, int], ...], inside: list[Tensor] | None = None
) -> Tensor:
    """Logits of one image, written straight down from Wu et al. (2021), Sec. 3, in eval mode.

    ``inside`` gets each block's weights and its patch tokens after attention and after the MLP.
    """
    inside = [] if inside is None else inside

    def linear(name: str, tokens: Tensor) -> Tensor:
        return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, tokens: Tensor) -> Tensor:
        mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, keepdim=True, correction=0)
        return (tokens - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def projection(name: str, maps: Tensor, stride: int) -> Tensor:
        maps = F.conv2d(maps, state[f"{name}.conv.weight"], None, stride, 1, groups=maps.shape[1])
        mean, variance = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
        scale = state[f"{name}.bn.weight"] / (variance + 1e-5).sqrt()
        maps = (maps - mean[:, None, None]) * scale[:, None, None] + state[f"{name}.bn.bias"][:, None, None]
        return maps[0].flatten(1).T

    maps = image[None]
    for stage, (depth, heads, stride) in enumerate(zip(DEPTHS, HEADS, strides, strict=True)):
        name = f"stage{stage}"
        maps = F.conv2d(
            maps, state[f"{name}.patch_embed.proj.weight"], state[f"{name}.patch_embed.proj.bias"], stride,
            tuple(step // 2 for step in stride),
        )  # fmt: skip
        (rows, columns), dim = maps.shape[2:], maps.shape[1]
        tokens = norm(f"{name}.patch_embed.norm", maps[0].flatten(1).T)
        prefix = state[f"{name}.cls_token"][0] if stage == 2 else tokens[:0]
        tokens = torch.cat([prefix, tokens])
        for number in range(depth):
            block = f"{name}.blocks.{number}"
            normed = norm(f"{block}.norm1", tokens)
            first, grid = normed[: len(prefix)], normed[len(prefix) :].T.reshape(1, dim, rows, columns)
            q, k, v = (
                linear(f"{block}.attn.proj_{letter}", torch.cat([first, one])).reshape(-1, heads, dim // heads)
                for letter, one in (
                    (letter, projection(f"{block}.attn.conv_proj_{letter}", grid, 1 if letter == "q" else 2))
                    for letter in "qkv"
                )
            )
            weights = (torch.einsum("qhd,khd->hqk", q, k) / dim**0.5).softmax(-1)
            tokens = tokens + linear(f"{block}.attn.proj", torch.einsum("hqk,khd->qhd", weights, v).reshape(-1, dim))
            inside += [weights, tokens[len(prefix) :]]
            hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", tokens))
            tokens = tokens + linear(f"{block}.mlp.fc2", hidden / (1 + torch.exp(-1.702 * hidden)))
            inside.append(tokens[len(prefix) :])
        maps = tokens[len(prefix) :].T.reshape(1, dim, rows, columns)
    return linear("head", norm("norm", tokens[0]))


def test_it_is_the_papers(generator: Callable[[str], torch.Generator]) -> None:
    model = made()
    images = images_of(generator)
    with torch.no_grad():
        expected = torch.stack([by_the_paper(model.state_dict(), one, ((2, 4), (2, 2), (2, 2))) for one in images])
        torch.testing.assert_close(model(images), expected, rtol=1e-11, atol=1e-11)


def test_probes_see_the_weights_and_patch_tokens_of_the_paper(generator: Callable[[str], torch.Generator]) -> None:
    model = made()
    images = images_of(generator)
    expected: list[list[Tensor]] = [[] for _ in images]
    weights: list[Tensor] = []
    states: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for one, into in zip(images, expected, strict=True):
            by_the_paper(model.state_dict(), one, ((2, 4), (2, 2), (2, 2)), into)
        with capture.attention(model, lambda seen: weights.append(seen.rows.softmax(-1))) as errors:
            model(images)
        with capture.features(model, lambda site, tokens: states.setdefault(site.name, []).append(tokens)):
            model(images)
    together = [torch.stack(parts) for parts in zip(*expected, strict=True)]
    for found, wanted in (
        (weights, together[0::3]),
        (states["attention"], together[1::3]),
        (states["mlp"], together[2::3]),
    ):
        assert [one.shape for one in found] == [one.shape for one in wanted]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    assert list(errors) == [0, 1, 2, 3, 4]
    assert max(errors.values()) < 1e-14
    assert [one.shape[1:] for one in weights] == [(2, 144, 36), *[(4, 36, 9)] * 2, *[(3, 10, 5)] * 2]


def test_cvt_13_has_the_papers_parameters_and_the_multiply_adds_of_the_closed_form(make_recipe: Make) -> None:
    recipe, facts = make_recipe((224, 224), 3, 1000, model="cvt_13", method="scratch")
    with torch.device("meta"):
        model = build_encoder(recipe, facts)
    counts = {name: value.numel() for name, value in model.named_parameters() if name != "mask_token"}
    biases = sum(count for name, count in counts.items() if re.search(r"\.proj_[qkv]\.bias", name))
    assert biases == 3 * (64 + 2 * 192 + 10 * 384)
    # Wu et al. (2021), Table 3, count no biases of queries, keys and values; the released weights have them.
    assert round((sum(counts.values()) - biases) / 1e6, 2) == 19.98
    budget = budget_of(recipe, facts, 100)
    assert budget.encoder_parameters == sum(counts.values()) + 64
    assert budget.stages[0].multiply_adds_per_image == by_hand(224, 1000)


def by_hand(side: int, classes: int) -> int:
    """Multiply-adds of a full pass of cvt_13."""
    total, in_dim = 0, 3
    stages = zip((64, 192, 384), (1, 2, 10), (4, 2, 2), (7, 3, 3), (0, 0, 1), strict=True)
    for dim, depth, stride, kernel, prefix in stages:
        side //= stride
        queries, keys = side**2 + prefix, (side // 2) ** 2 + prefix
        total += side**2 * kernel**2 * in_dim * dim
        block = 9 * dim * (side**2 + 2 * (side // 2) ** 2)  # depth-wise convolutions
        block += dim * dim * (queries + 2 * keys + queries) + 2 * queries * keys * dim + 8 * dim * dim * queries
        total, in_dim = total + depth * block, dim
    return total + in_dim * classes


def test_names_are_microsofts() -> None:
    state = made().state_dict()
    for name in (
        "stage0.patch_embed.proj.weight", "stage0.patch_embed.norm.bias",
        "stage1.blocks.1.attn.conv_proj_k.conv.weight",
        "stage1.blocks.1.attn.conv_proj_v.bn.running_var", "stage2.cls_token", "stage2.blocks.0.attn.proj_q.bias",
        "stage2.blocks.1.mlp.fc2.weight", "norm.weight", "head.bias",
    ):  # fmt: skip
        assert name in state
    assert not any("cls_token" in name for name in state if not name.startswith("stage2"))


def test_hidden_pixels_get_no_gradient_and_change_nothing_in_training(
    generator: Callable[[str], torch.Generator],
) -> None:
    model = made().train()
    images = images_of(generator)
    mask = torch.rand(5, 9, generator=generator("mask")) < 0.6
    hidden = mask.view(5, 1, 3, 3).repeat_interleave(8, 2).repeat_interleave(16, 3).expand_as(images)
    images.requires_grad_()
    features = model.encode(images, mask)
    (features.tokens.square().sum() + features.class_token.square().sum()).backward()  # type: ignore[union-attr]
    assert images.grad is not None
    assert not images.grad[hidden].any()
    assert images.grad[~hidden].all()
    changed = torch.where(hidden, float("nan"), images.detach())
    again = model.encode(changed, mask)
    assert torch.equal(again.tokens, features.tokens)
    assert torch.equal(again.class_token, features.class_token)


def test_hidden_places_hold_the_mask_token_after_the_first_embedding(
    generator: Callable[[str], torch.Generator],
) -> None:
    model, images = made(), images_of(generator)
    mask = torch.rand(5, 9, generator=generator("mask")) < 0.5
    seen: list[Tensor] = []
    model.stage0.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = model.encode(images, mask)
    assert (features.grid, features.visible_ids) == ((3, 3), None)
    assert features.tokens.shape == (5, 9, 15)
    fine = mask.view(5, 3, 3).repeat_interleave(4, 1).repeat_interleave(4, 2)
    maps = seen[0].permute(0, 2, 3, 1)
    assert (maps[fine] == model.mask_token[0, :, 0, 0]).all()
    black = torch.where(mask.view(5, 1, 3, 3).repeat_interleave(8, 2).repeat_interleave(16, 3), 0.0, images)
    assert torch.equal(maps[~fine], model.stage0.embedded(black).permute(0, 2, 3, 1)[~fine])


def test_a_masked_pass_leaves_the_running_statistics_alone_and_a_full_one_does_not(
    generator: Callable[[str], torch.Generator],
) -> None:
    model, images = made().train(), images_of(generator)
    mask = torch.rand(5, 9, generator=generator("mask")) < 0.5
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.encode(images, mask)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    model.encode(images)
    assert not any(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_one_image_does_not_change_with_its_neighbours(generator: Callable[[str], torch.Generator]) -> None:
    model, images = made(), images_of(generator)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (4, 8)])
def test_any_stride_gives_the_grid(patch: tuple[int, int]) -> None:
    model = made((patch[0] * 12, patch[1] * 8), patch)
    assert model.grid == (3, 2)
    assert model.encode(torch.zeros(1, 3, patch[0] * 12, patch[1] * 8, dtype=torch.float64)).tokens.shape == (1, 6, 15)


def test_a_stride_that_does_not_divide_the_image_is_named(make_facts: Make) -> None:
    with pytest.raises(ValueError, match="patch_size times 4, the total stride of CvT, must divide the image of 28x36"):
        resolve(Recipe(model="cvt_13"), make_facts((28, 36)))


# Masked convolutions


def masked() -> cvt.Model:
    """The model of ``made``, with masked convolutions."""
    plain = made()
    model = cvt.Model(
        img_size=(24, 48), patch_size=(2, 4), channels=3, num_classes=11, dims=DIMS, depths=DEPTHS, heads=HEADS,
        mlp_ratio=2, masked_convolutions=True,
    ).double()  # fmt: skip
    model.load_state_dict({name: value for name, value in plain.state_dict().items() if name != "mask_token"})
    return model.eval()


@pytest.mark.parametrize("is_training", [True, False])
def test_masked_convolutions_that_hide_nothing_are_the_dense_ones_to_the_last_bit(
    generator: Callable[[str], torch.Generator], *, is_training: bool
) -> None:
    images, none = images_of(generator), torch.zeros(5, 9, dtype=torch.bool)
    with torch.no_grad():
        dense = made().train(is_training).encode(images)
        for mask in (none, None):
            got = masked().train(is_training).encode(images, mask)
            assert torch.equal(got.tokens, dense.tokens)
            assert torch.equal(got.class_token, dense.class_token)


def test_nothing_of_hidden_pixels_passes_masked_convolutions(generator: Callable[[str], torch.Generator]) -> None:
    model, images = masked().train(), images_of(generator)
    noise = torch.rand(5, 9, generator=generator("mask"))
    mask = noise.argsort(1).argsort(1) >= 4
    hidden = mask.view(5, 1, 3, 3).repeat_interleave(8, 2).repeat_interleave(16, 3).expand_as(images)
    images.requires_grad_()
    before = {name: value.clone() for name, value in model.named_buffers()}
    features = model.encode(images, mask)
    assert features.tokens.shape == (5, 4, 15)
    assert torch.equal(features.visible_ids, torch.stack([(~row).nonzero().flatten() for row in mask]))
    (features.tokens.square().sum() + features.class_token.square().sum()).backward()
    assert images.grad is not None
    assert not images.grad[hidden].any()
    assert images.grad[~hidden].all()
    again = model.encode(torch.where(hidden, float("nan"), images.detach()), mask)
    assert torch.equal(again.tokens, features.tokens)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_what_hidden_places_hold_inside_reaches_no_visible_one(generator: Callable[[str], torch.Generator]) -> None:
    model, images = masked(), images_of(generator)
    mask = torch.rand(5, 9, generator=generator("mask")).argsort(1).argsort(1) >= 4

    def spoilt(module: torch.nn.Module, args: tuple) -> tuple:
        tokens, grid, *others = args
        factor = grid[0] // 3
        places = mask.view(5, 3, 3).repeat_interleave(factor, 1).repeat_interleave(factor, 2).flatten(1)
        prefix = tokens.shape[1] - places.shape[1]
        places = torch.cat([torch.zeros(5, prefix, dtype=torch.bool), places], dim=1)
        return torch.where(places[:, :, None], torch.randn_like(tokens) * 1e3, tokens), grid, *others

    with torch.no_grad():
        plain = model.encode(images, mask)
        for module in model.modules():
            if type(module).__name__ == "Block":
                module.register_forward_pre_hook(spoilt)
        again = model.encode(images, mask)
    assert torch.equal(again.tokens, plain.tokens)
    assert torch.equal(again.class_token, plain.class_token)


def test_a_masked_pass_sees_less_than_the_dense_one(generator: Callable[[str], torch.Generator]) -> None:
    images, mask = images_of(generator), torch.zeros(5, 9, dtype=torch.bool)
    mask[:, 4] = True  # the middle one of nine
    with torch.no_grad():
        got, dense = masked().encode(images, mask), made().encode(images, mask)
    assert not torch.allclose(got.class_token, dense.class_token, rtol=1e-2)


def test_it_trains_with_a_decoder_that_puts_mask_tokens_in(make_recipe: Make, tmp_path: Path) -> None:
    fields = {"model": "cvt_nano", "subset": 14, "batch_size": 7, "epochs": 1, "masked_convolutions": True}
    run = train(Recipe(**fields), tmp_path, device="cpu")  # type: ignore[arg-type]
    assert "mask_token" not in run.state
    assert "decoder.mask_token" in run.state
    assert load_checkpoint(run.path).hash == run.hash
    with pytest.raises(ValueError, match="decoder must be one for an encoder that leaves hidden patches out"):
        train(Recipe(task="simmim", **fields), tmp_path, device="cpu")  # type: ignore[arg-type]
