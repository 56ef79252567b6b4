import contextlib
import gc
import math
import weakref
from itertools import pairwise

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from ssat_probe import capture

IMAGES, DEPTH, HEADS, DIM, PATCHES = 5, 3, 2, 14, 6
SIZES = {"img_size": (8, 12), "patch_size": 4, "in_chans": 1, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}

VARIANTS = {
    "vit": (1, lambda: VisionTransformer(**SIZES, num_classes=3)),
    "registers": (5, lambda: VisionTransformer(**SIZES, num_classes=3, reg_tokens=4)),
    "no class token": (0, lambda: VisionTransformer(**SIZES, num_classes=3, class_token=False, global_pool="avg")),
    "distilled": (2, lambda: VisionTransformerDistilled(**SIZES, num_classes=3)),
    "layer scale, norm of q and k": (1, lambda: VisionTransformer(**SIZES, init_values=0.1, qk_norm=True)),
}


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(IMAGES, 1, 8, 12, generator=torch.Generator().manual_seed(1), dtype=dtype)


def make(variant: str = "vit", *, is_fused: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = VARIANTS[variant][1]().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.fused_attn = is_fused
            block.attn.qkv.weight.mul_(20)  # away from uniform attention
    return model


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def joined(chunks: list[capture.Attention]) -> Tensor:
    """Rows of the chunks of an operation, those of some images after those of others."""
    starts = [i for i, one in enumerate(chunks) if one.first_query == 0] + [len(chunks)]
    groups = [chunks[start:stop] for start, stop in pairwise(starts)]
    assert all([one.first_query for one in group] == sorted({one.first_query for one in group}) for group in groups)
    return torch.cat([torch.cat([one.rows for one in group], 2) for group in groups])


def captured(model: nn.Module, x: Tensor, **options) -> tuple[list[capture.Attention], dict[int, float]]:
    seen: list[capture.Attention] = []
    with torch.no_grad(), capture.attention(model, seen.append, **options) as errors:
        model(x)
    return seen, errors


class AttentionByHand(nn.Module):
    """Same as timm's, with a chosen spelling of softmax and matmul."""

    def __init__(self, attn: nn.Module, softmax, matmul=torch.matmul) -> None:
        super().__init__()
        self.attn, self.apply_softmax, self.apply_matmul = attn, softmax, matmul

    def forward(self, x: Tensor, **_) -> Tensor:
        batch, tokens, dim = x.shape
        query, key, value = self.attn.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        weights = self.apply_softmax(query * self.attn.scale @ key.mT)
        return self.attn.proj(self.apply_matmul(weights, value).transpose(1, 2).reshape(batch, tokens, dim))


class ModuleAttention(nn.Module):
    """``nn.MultiheadAttention`` in the place of timm's attention."""

    def __init__(self, padding: Tensor | None = None, mask: Tensor | None = None) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.padding, self.mask = padding, mask

    def forward(self, x: Tensor, **_) -> Tensor:
        return self.inner(x, x, x, key_padding_mask=self.padding, attn_mask=self.mask, need_weights=False)[0]


class MaskedAttention(nn.Module):
    """Fused attention with a mask or grouped keys."""

    def __init__(self, attn: nn.Module, **options) -> None:
        super().__init__()
        self.attn, self.options = attn, options

    def forward(self, x: Tensor, **_) -> Tensor:
        batch, tokens, dim = x.shape
        query, key, value = self.attn.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self.options.get("enable_gqa"):
            key, value = key[:, :1], value[:, :1]
        x = nn.functional.scaled_dot_product_attention(query, key, value, **self.options)
        return self.attn.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_block_is_captured_once_with_its_name_and_checked(variant: str, is_fused: bool):
    seen, errors = captured(make(variant, is_fused=is_fused), images())
    tokens = VARIANTS[variant][0] + PATCHES
    assert [(one.block, one.name) for one in seen] == [(i, f"blocks.{i}.attn") for i in range(DEPTH)]
    assert all(one.has_scores and one.is_valid is None for one in seen)
    assert {one.rows.shape for one in seen} == {(IMAGES, HEADS, tokens, tokens)}
    assert list(errors) == list(range(DEPTH))
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_and_unfused_attention_give_the_same_scores(variant: str):
    x = images(torch.float64)
    fused, unfused = (captured(make(variant, is_fused=is_fused).double(), x)[0] for is_fused in (True, False))
    for one, other in zip(fused, unfused, strict=True):
        torch.testing.assert_close(one.rows, other.rows, rtol=0, atol=1e-12)


def test_scores_are_those_of_the_formula():
    model, x = make().double(), images(torch.float64)
    first = captured(model, x)[0][0]
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        query, key, _ = model.blocks[0].attn.qkv(model.blocks[0].norm1(tokens)).chunk(3, -1)
        query, key = (t.reshape(IMAGES, -1, HEADS, DIM // HEADS).transpose(1, 2) for t in (query, key))
    torch.testing.assert_close(first.rows, query @ key.mT / math.sqrt(DIM // HEADS), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "softmax",
    [
        lambda s: s.softmax(-1),
        lambda s: s.softmax(dim=3),
        lambda s: torch.softmax(s, dim=-1),
        lambda s: torch.softmax(input=s, dim=-1),
        lambda s: nn.functional.softmax(s, -1),
        lambda s: nn.functional.softmax(s, dim=-1, dtype=torch.float32),
        lambda s: torch.special.softmax(s, -1),
        nn.Softmax(dim=-1),
    ],
)
@pytest.mark.parametrize(
    "matmul", [torch.matmul, Tensor.matmul, lambda w, v: w @ v, lambda w, v: torch.dropout(w, 0.3, False) @ v]
)
def test_every_spelling_of_softmax_is_seen_once(softmax, matmul):
    model, x = make(), images()
    expected = captured(model, x)[0]
    for block in model.blocks:
        block.attn = AttentionByHand(block.attn, softmax, matmul)
    seen, errors = captured(model, x)
    assert len(seen) == DEPTH
    for one, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(one.rows, other.rows, rtol=1e-4, atol=1e-4)
    assert max(errors.values()) < 1e-5


def test_softmax_module_is_named_by_the_attention_that_holds_it():
    model = make()
    for block in model.blocks:
        block.attn.softmax = nn.Softmax(dim=-1)
        block.attn.forward = AttentionByHand(block.attn, block.attn.softmax).forward
    assert [one.name for one in captured(model, images())[0]] == [f"blocks.{i}.attn" for i in range(DEPTH)]


def test_softmax_whose_product_is_not_seen_has_no_check():
    model = make()
    for block in model.blocks:
        block.attn = AttentionByHand(block.attn, lambda s: s.softmax(-1), lambda w, v: (w.flip(1) + 0) @ v)
    assert all(math.isnan(error) for error in captured(model, images())[1].values())


def test_softmax_over_another_axis_or_of_other_tensors_is_not_attention():
    model = make()
    model.blocks[1].mlp = nn.Sequential(nn.Softmax(dim=-1), nn.Unflatten(-1, (2, 7)), nn.Softmax(dim=1), nn.Flatten(2))
    assert len(captured(model, images())[0]) == DEPTH


def test_module_attention_is_captured_by_head():
    model, x = make(), images()
    torch.manual_seed(2)
    for block in model.blocks:
        block.attn = ModuleAttention()
    model.eval()
    with torch.no_grad():
        expected = model(x)
    seen, errors = captured(model, x)
    assert [one.name for one in seen] == [f"blocks.{i}.attn.inner" for i in range(DEPTH)]
    assert not any(one.has_scores for one in seen)
    torch.testing.assert_close(seen[0].rows.sum(-1), torch.ones(IMAGES, HEADS, PATCHES + 1))
    assert max(errors.values()) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_masks_of_module_attention_become_valid_keys():
    tokens = PATCHES + 1
    padding = torch.zeros(IMAGES, tokens, dtype=torch.bool)
    padding[:, -2:] = True
    model = make()
    model.blocks[0].attn = ModuleAttention(padding=padding)
    model.blocks[1].attn = ModuleAttention(mask=torch.ones(tokens, tokens, dtype=torch.bool).triu(1))
    per_head = torch.zeros(IMAGES * HEADS, tokens, tokens)
    per_head[HEADS, :, 3] = -torch.inf  # second image, first head
    model.blocks[2].attn = ModuleAttention(mask=per_head)
    seen = captured(model.eval(), images())[0]
    assert (seen[0].is_valid == ~padding[:, None, None]).all()
    assert (seen[1].is_valid == torch.ones(tokens, tokens, dtype=torch.bool).tril()).all()
    out = (~seen[2].is_valid).nonzero()
    assert out[:, 0].unique().tolist() == [1]
    assert out[:, 1].unique().tolist() == [0]
    assert out[:, 3].unique().tolist() == [3]
    for one in seen:
        assert (one.rows[~one.is_valid.expand_as(one.rows)] == 0).all()


@pytest.mark.parametrize("kind", ["bool", "float", "causal", "grouped", "scaled"])
def test_options_of_fused_attention_are_part_of_the_scores(kind: str):
    tokens = PATCHES + 1
    lower = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    options = {
        "bool": {"attn_mask": lower},
        "float": {"attn_mask": torch.zeros(tokens, tokens).masked_fill(~lower, -torch.inf) + 0.3},
        "causal": {"is_causal": True},
        "grouped": {"enable_gqa": True},
        "scaled": {"scale": 0.7},
    }
    model = make()
    for block in model.blocks:
        block.attn = MaskedAttention(block.attn, **options[kind])
    seen, errors = captured(model, images())
    assert max(errors.values()) < 1e-5
    assert all(one.rows.shape == (IMAGES, HEADS, tokens, tokens) for one in seen)
    for one in seen:
        is_valid = one.is_valid if kind in ("bool", "float", "causal") else None
        assert (is_valid is None) == (one.is_valid is None)
        if is_valid is not None:
            assert (is_valid == lower).all()
            assert one.rows[~is_valid.expand_as(one.rows)].isneginf().all()


def test_a_bias_hides_no_key():
    model = make()
    bias = torch.randn(HEADS, PATCHES + 1, PATCHES + 1, generator=torch.Generator().manual_seed(3))
    for block in model.blocks:
        block.attn = MaskedAttention(block.attn, attn_mask=bias)
    seen, errors = captured(model, images(), most_weights=1)
    assert all(one.is_valid is None for one in seen)
    assert max(errors.values()) < 1e-5


def test_rows_without_a_valid_key_pass_the_check():
    mask = torch.ones(PATCHES + 1, PATCHES + 1, dtype=torch.bool)
    mask[2] = False
    model = make()
    model.blocks[2].attn = MaskedAttention(model.blocks[2].attn, attn_mask=mask)
    seen, errors = captured(model, images(), only=[2])
    assert (seen[0].is_valid == mask).all()
    assert errors[2] < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_are_in_float32_or_better(dtype: torch.dtype):
    seen, _ = captured(make().to(dtype), images(dtype))
    assert {one.rows.dtype for one in seen} == {torch.float32 if dtype == torch.bfloat16 else torch.float64}


def test_autocast_does_not_reach_the_scores():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen, _ = captured(make(), images())
    assert {one.rows.dtype for one in seen} == {torch.float32}


def test_only_some_blocks():
    seen, errors = captured(make(), images(), only=[2, 0])
    assert [one.block for one in seen] == [0, 2]
    assert list(errors) == [0, 2]


def test_without_the_check_nothing_is_compared():
    assert all(math.isnan(error) for error in captured(make(), images(), is_checked=False)[1].values())


def test_attention_is_handed_over_one_block_at_a_time():
    model, alive = make(), []

    def reduce(one: capture.Attention) -> None:
        import weakref

        assert all(reference() is None for reference in alive)
        alive.append(weakref.ref(one.rows))

    with torch.no_grad(), capture.attention(model, reduce):
        model(images())
    assert len(alive) == DEPTH


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("most_weights", [1, 3 * HEADS * (PATCHES + 1), 2 * HEADS * (PATCHES + 1) ** 2, 10**9])
def test_chunks_of_images_and_queries_are_the_rows_of_the_whole_and_no_larger_than_allowed(
    most_weights: int, is_fused: bool
):
    model, x = make(is_fused=is_fused).double(), images(torch.float64)
    whole, _ = captured(model, x)
    chunks, errors = captured(model, x, most_weights=most_weights)
    assert all(one.rows.numel() <= max(most_weights, HEADS * (PATCHES + 1)) for one in chunks)
    for block, one in enumerate(whole):
        mine = [chunk for chunk in chunks if chunk.block == block]
        assert [chunk.is_last for chunk in mine] == [False] * (len(mine) - 1) + [True]
        assert sum(chunk.place.batch for chunk in mine if chunk.first_query == 0) == IMAGES
        assert torch.equal(joined(mine), one.rows)
    assert sorted(errors) == list(range(DEPTH))
    assert all(error < 1e-12 for error in errors.values())


@pytest.mark.parametrize("kind", ["causal", "boolean", "additive", "one row"])
def test_masks_are_cut_with_their_queries(kind: str):
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            size = x.shape[2]
            shape = (1, size) if kind == "one row" else (size, size)
            mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3
            mask[:, 0] = True
            if kind == "additive":
                mask = torch.where(mask, 0.5, -torch.inf)
            options = {"is_causal": True} if kind == "causal" else {"attn_mask": mask}
            return nn.functional.scaled_dot_product_attention(x, x, x, **options)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Masked()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    x = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(4))
    (whole,), _ = captured(Model().eval(), x)
    chunks, _ = captured(Model().eval(), x, most_weights=2 * 2 * 3 * 7)
    assert len(chunks) == 4
    torch.testing.assert_close(torch.cat([one.rows for one in chunks], 2), whole.rows)
    valid = [one.part(slice(None), slice(None)).is_valid for one in (*chunks, whole)]
    assert torch.equal(torch.cat(valid[:-1], 2), valid[-1])
    part = [one.part(slice(3, 6), slice(1, None)) for one in chunks]
    torch.testing.assert_close(torch.cat([one.rows for one in part], 2), whole.rows[:, :, 3:6, 1:])


def test_gradients_flow_as_without_capture():
    model, x = make(), images()
    model(x).sum().backward()
    expected = model.blocks[0].attn.qkv.weight.grad.clone()
    model.zero_grad()
    with capture.attention(model, lambda _: None), capture.features(model, lambda *_: None):
        model(x).sum().backward()
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight.grad, expected, rtol=0, atol=0)


class StopError(Exception):
    pass


@pytest.mark.parametrize("how", ["success", StopError, KeyboardInterrupt])
def test_nothing_is_left_behind(how):
    model, x = make(), images()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
    rng = torch.get_rng_state()

    def reduce(*_) -> None:
        if how != "success":
            raise how

    for context in (capture.attention, capture.features):
        try:
            with torch.no_grad(), context(model, reduce):
                torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        except (StopError, KeyboardInterrupt):
            assert how != "success"
        else:
            assert how == "success"
        assert hooks(model) == 0
        assert len(torch.overrides._get_current_function_mode_stack()) == 0
    assert not model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_hooks_of_others_stay():
    model, calls = make(), []
    model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    captured(model, images())
    assert calls == [1]
    assert hooks(model) == 1


def test_block_without_attention_is_an_error_that_names_it():
    model = make()
    model.blocks[1].attn = nn.Identity()
    model.blocks[1].attn.forward = lambda x, **_: x
    with pytest.raises(ValueError, match=r"blocks\.1 must attend exactly once per forward pass, got 0 attention"):
        captured(model, images())
    assert hooks(model) == 0


def test_two_forward_passes_are_an_error():
    model, x = make(), images()
    with (
        pytest.raises(ValueError, match=r"blocks\.0 must attend exactly once per forward pass, got 2 attention"),
        capture.attention(model, lambda _: None),
    ):
        model(x), model(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_many_equal_values_is_no_false_alarm(dtype: torch.dtype):
    """Images of one colour: every key has the same value, so that rounding errors of the sums do not cancel."""
    torch.manual_seed(0)
    sizes = {"img_size": 56, "patch_size": 2, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 1}
    model = VisionTransformer(**sizes, pos_embed="none", num_classes=2).eval().to(dtype)
    _, errors = captured(model, torch.zeros(1, 1, 56, 56, dtype=dtype))
    assert max(errors.values()) < 785 * torch.finfo(dtype).eps


def test_attention_that_is_not_what_was_captured_is_an_error_that_names_it():
    model = make()
    model.blocks[2].attn = AttentionByHand(
        model.blocks[2].attn, lambda s: s.softmax(-1).mul_(torch.linspace(0.5, 1.5, s.shape[-1]))
    )
    with pytest.raises(
        ValueError, match=r"blocks\.2\.attn: captured weights @ values must equal .* got a difference of"
    ):
        captured(model, images())
    assert hooks(model) == 0


def test_values_that_are_not_finite_are_an_error_that_names_the_block():
    model = make()
    with torch.no_grad():
        model.blocks[1].norm1.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.attn: scores of attention must be finite"):
        captured(model, images(), is_checked=False)
    with pytest.raises(ValueError, match="site 'attention' of block 1 must be finite"), torch.no_grad():
        sites_of(model)


def test_training_mode_is_refused():
    model = make().train()
    with pytest.raises(ValueError, match="Attention must be captured in eval mode, got a model in training mode"):
        captured(model, images())
    with pytest.raises(ValueError, match="Features must be captured in eval mode, got a model in training mode"):
        sites_of(model)


def sites_of(model: nn.Module, x: Tensor | None = None) -> dict[tuple[str, int], Tensor]:
    seen: dict[tuple[str, int], Tensor] = {}
    with torch.no_grad(), capture.features(model, lambda site, tokens: seen.update({(site.name, site.block): tokens})):
        model(images() if x is None else x)
    return seen


@pytest.mark.parametrize("variant", VARIANTS)
def test_sites_are_the_patch_tokens_of_the_residual_stream(variant: str):
    prefix, model = VARIANTS[variant][0], make(variant).double()
    seen = sites_of(model, images(torch.float64))
    assert list(seen) == [(site.name, site.block) for site in capture.sites(model)]
    assert {tuple(tokens.shape) for tokens in seen.values()} == {(IMAGES, PATCHES, DIM)}
    with torch.no_grad():
        stream = model.norm_pre(model._pos_embed(model.patch_embed(images(torch.float64))))
        torch.testing.assert_close(seen["embed", -1], stream[:, prefix:])
        for index, block in enumerate(model.blocks):
            stream = stream + block.ls1(block.attn(block.norm1(stream)))
            torch.testing.assert_close(seen["attention", index], stream[:, prefix:])
            stream = stream + block.ls2(block.mlp(block.norm2(stream)))
            torch.testing.assert_close(seen["mlp", index], stream[:, prefix:])


def test_state_after_attention_where_norms_stand_after_the_branches():
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES, block_fn=ResPostBlock).eval()
    seen = sites_of(model)
    with torch.no_grad():
        stream = model._pos_embed(model.patch_embed(images()))
        block = model.blocks[0]
        stream = stream + block.norm1(block.attn(stream))
    torch.testing.assert_close(seen["attention", 0], stream[:, 1:])


def test_blocks_without_a_state_after_attention_are_refused_by_name():
    model = VisionTransformer(**SIZES, block_fn=ParallelScalingBlock).eval()
    with pytest.raises(ValueError, match=r"blocks\.0 must have 'norm2' and 'mlp' .* got a ParallelScalingBlock"):
        sites_of(model)


def test_features_of_two_forward_passes_are_an_error():
    model = make()
    with (
        pytest.raises(ValueError, match=r"'embed' of block -1 must be passed exactly once .* got 2 times"),
        capture.features(model, lambda *_: None),
    ):
        model(images()), model(images())


OPERATIONS = {
    "vit": 3, "deit distilled": 3, "registers": 3, "gap": 3, "swin": 4, "swin padded": 4, "our swin": 4, "swinv2": 4,
    "our cvt": 4, "twins": 4, "cait": 5, "pvt": 3, "pvt linear": 3, "mvit": 3, "mvit class token": 3, "torchvision": 3,
}  # fmt: skip
UNCHECKED = {"cait": {0, 1, 2}}  # talking heads mix the weights after softmax, so that no product with them is seen


def counted(model: nn.Module, x: Tensor) -> int:
    """Attention operations of a forward pass, counted by the products whose left side sums to 1: by another way."""
    count = 0

    class Counter(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal count
            fused = (nn.functional.scaled_dot_product_attention, nn.functional.multi_head_attention_forward)
            result = func(*args, **(kwargs or {}))
            count += func in fused or (func in (Tensor.softmax, torch.softmax, nn.functional.softmax))
            return result

    with torch.no_grad(), Counter():
        model(x)
    return count


def test_every_attention_operation_of_every_family_is_captured_once_and_checked(family: tuple[str, nn.Module, Tensor]):
    name, model, x = family
    with torch.no_grad():
        expected = model(x)
    seen, errors = captured(model, x)
    assert len(seen) == OPERATIONS[name] == counted(model, x)
    assert [one.block for one in seen] == list(range(len(seen))) == list(errors)
    assert {block for block, error in errors.items() if math.isnan(error)} == UNCHECKED.get(name, set())
    assert all(error < 1e-4 for error in errors.values() if not math.isnan(error))
    assert hooks(model) == 0
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", [StopError, KeyboardInterrupt])
def test_nothing_is_left_behind_in_any_family(family: tuple[str, nn.Module, Tensor], how: type[BaseException]):
    _, model, x = family
    model.eval()

    def reduce(*_) -> None:
        raise how

    for context in (capture.attention, capture.features):
        with pytest.raises(how), torch.no_grad(), context(model, reduce):
            model(x)
        assert hooks(model) == 0
        assert len(torch.overrides._get_current_function_mode_stack()) == 0


def test_the_residual_stream_of_every_family_has_the_patches_of_its_grid(family: tuple[str, nn.Module, Tensor]):
    name, model, x = family
    shapes: dict[capture.Site, tuple[int, ...]] = {}
    with torch.no_grad(), capture.features(model, lambda s, t: shapes.update({s: tuple(t.shape)})) as grids:
        model(x)
    assert list(shapes) == capture.sites(model)
    assert {site: grid[0] * grid[1] for site, grid in grids.items()} == {site: s[1] for site, s in shapes.items()}
    stages = {site.stage for site in shapes}
    assert stages == (
        {0, 1, 2}
        if name == "our cvt"
        else {0, 1}
        if name.startswith(("swin", "our swin", "pvt", "twins", "mvit"))
        else {0}
    )
    merges = [site.block for site in shapes if site.name == "merge"]
    assert merges == (
        [1, 2]
        if name == "our cvt"
        else [2]
        if name == "twins" or "swin" in name
        else [1]
        if name.startswith("pvt")
        else []
    )


def test_the_windows_of_twins_are_told_apart_from_its_images_with_and_without_the_fused_kernel(make_family):
    model, x = make_family("twins")
    fused, errors = captured(model.double(), x.double())
    assert [tuple(one.rows.shape) for one in fused] == [(24, 1, 9, 9), (2, 1, 96, 24), (4, 2, 16, 16), (2, 2, 24, 24)]
    for level in model.blocks:
        for block in level:
            block.attn.fused_attn = False
    plain, plain_errors = captured(model, x.double(), most_weights=100)
    assert max(*errors.values(), *plain_errors.values()) < 1e-12  # the product with the values was seen in all of them
    for block, whole in enumerate(fused):
        torch.testing.assert_close(joined([one for one in plain if one.block == block]), whole.rows)


def test_maps_with_channels_first_are_read_as_maps():
    model = timm.create_model("visformer_tiny").eval()
    maps: list[Tensor] = []
    for block in capture.blocks(model):
        block.register_forward_hook(lambda _, args, output: maps.append(output))
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    seen = sites_of(model, x)
    for block, expected in enumerate(maps):
        assert torch.equal(seen["mlp", block], expected.flatten(2).mT)


def test_the_stream_of_swin_is_that_of_its_blocks(make_family):
    model, x = make_family("swin padded")
    seen: dict[tuple[str, int], Tensor] = {}
    with torch.no_grad(), capture.features(model, lambda s, t: seen.update({(s.name, s.block): t})):
        model(x)
    with torch.no_grad():
        stream = model.patch_embed(x)
        torch.testing.assert_close(seen["embed", -1], stream.flatten(1, 2))
        for stage, layer in enumerate(model.layers):
            stream = layer.downsample(stream)
            if stage:
                torch.testing.assert_close(seen["merge", 2 * stage], stream.flatten(1, 2))
            for inner, block in enumerate(layer.blocks):
                middle = stream + block._attn(block.norm1(stream))
                torch.testing.assert_close(seen["attention", 2 * stage + inner], middle.flatten(1, 2))
                stream = middle + block.mlp(block.norm2(middle))
                torch.testing.assert_close(seen["mlp", 2 * stage + inner], stream.flatten(1, 2))


def test_a_hook_of_others_that_fails_does_not_confuse_who_is_running():
    """A pre-hook that fails before ours leaves a module that never got onto the stack of callers."""
    model, x = make(), images()
    inner = nn.Linear(DIM, DIM)

    def refuse(*_) -> None:
        raise StopError

    inner.register_forward_pre_hook(refuse)
    plain = model.blocks[1].attn

    class Tolerant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.attn = inner, plain

        def forward(self, x: Tensor, **_) -> Tensor:
            with contextlib.suppress(StopError):
                return self.inner(x)
            return self.attn(x)

    model.blocks[1].attn = Tolerant()
    seen, _ = captured(model.eval(), x)
    assert [one.name for one in seen] == ["blocks.0.attn", "blocks.1.attn.attn", "blocks.2.attn"]


@pytest.mark.parametrize("most_weights", [0, HEADS * (PATCHES + 1) ** 2, 1])
def test_masks_of_unfused_attention_are_seen_chunk_by_chunk(most_weights: int):
    model, x = make(), images()
    mask = torch.zeros(PATCHES + 1, PATCHES + 1)
    mask[2:, 3] = -torch.inf
    mask[4, 1] = torch.finfo(torch.float32).min
    for block in model.blocks:
        block.attn = AttentionByHand(block.attn, lambda s: (s + mask).softmax(-1))
    seen, errors = captured(model, x, most_weights=most_weights)
    assert max(errors.values()) < 1e-5
    for block in range(DEPTH):
        chunks = [one for one in seen if one.block == block]
        for one in chunks:
            expected = mask[one.first_query : one.first_query + one.rows.shape[2]] == 0
            assert expected.all() if one.is_valid is None else (one.is_valid == expected).all()
        assert sum(one.rows.numel() for one in chunks) == IMAGES * HEADS * (PATCHES + 1) ** 2


@pytest.mark.parametrize("is_fused", [True, False])
def test_what_reduce_holds_is_freed_with_it_without_waiting_for_garbage_collection(is_fused: bool):
    class Holder(list):  # a plain list has no weak references
        pass

    model, x, holder = make(is_fused=is_fused), images(), Holder()
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), capture.attention(model, holder.append):
            model(x)
        alive = weakref.ref(holder)
        del holder
        assert alive() is None
    finally:
        gc.enable()
