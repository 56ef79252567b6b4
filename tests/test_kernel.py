"""Kernels of attention: the same numbers, chosen by time, kept by a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ssat_probe import kernel
from ssat_probe.execution import Execution
from ssat_probe.kernel import KERNELS, SHORT_ROW, Attention, fastest
from ssat_probe.recipe import Recipe
from ssat_probe.training import train

SHAPES = ((2, 3, 5, 7), (2, 3, 11, 7), (2, 3, 11, 7))


def parts(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in SHAPES]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_softmax_attention_with_its_gradient(name: str, scale: float | None) -> None:
    query, key, value = parts()
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * (7**-0.5 if scale is None else scale)
    expected = torch.einsum("bhqk,bhkd->bhqd", scores.exp() / scores.exp().sum(-1, keepdim=True), value)
    got = KERNELS[name](query, key, value, scale=scale)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    for one, other in zip(
        torch.autograd.grad((got * weight).sum(), (query, key, value)),
        torch.autograd.grad((expected * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["bias", "allowed"])
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_takes_masks_as_torch_does(name: str, kind: str) -> None:
    query, key, value = parts()
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(1, 3, 5, 11, generator=generator, dtype=torch.float64).requires_grad_()  # as Swin's
    allowed = torch.rand(2, 1, 1, 11, generator=generator) > 0.4  # as CvT's with masked convolutions
    mask, given = (bias, [query, key, value, bias]) if kind == "bias" else (allowed, [query, key, value])
    weights = (torch.einsum("bhqd,bhkd->bhqk", query, key) * 7**-0.5 + (bias if kind == "bias" else 0)).exp()
    weights = weights if kind == "bias" else weights * allowed
    expected = torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), value)
    got = KERNELS[name](query, key, value, mask)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    for one, other in zip(
        torch.autograd.grad((got * weight).sum(), given),
        torch.autograd.grad((expected * weight).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_low_precision_is_off_by_its_rounding_alone(name: str) -> None:
    given = [part.bfloat16() for part in parts()]
    exact = F.scaled_dot_product_attention(*(part.double() for part in given))
    got = KERNELS[name](*given)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).abs().max() < 3 * 2**-8 * float(given[2].detach().abs().max())


@pytest.mark.parametrize("keys", [SHORT_ROW - 1, SHORT_ROW])
def test_short_rows_are_weighted_in_float32_and_rounded_once(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, own = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda scores, dim: seen.append(scores.dtype) or own(scores, dim))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, keys, 7, generator=generator).bfloat16() for _ in range(3))
    got = KERNELS["plain"](query, key, value)
    assert seen == [torch.float32 if keys < SHORT_ROW else torch.bfloat16]
    assert got.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention(*(part.double() for part in (query, key, value)))
    assert (got.double() - exact).abs().max() < 3 * 2**-8 * float(value.abs().max())


@pytest.mark.parametrize(("dim", "pieces"), [(7, 3), (32, 1)])
def test_scores_of_narrow_heads_are_made_in_pieces_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch, dim: int, pieces: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, tokens, dim, generator=generator, dtype=torch.float64).requires_grad_()
        for tokens in (5, 11, 11)
    )
    seen, own = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda scores, axis: seen.append(len(scores)) or own(scores, axis))
    found = []
    for size in (2 * 5 * 11 * 8 + 1, 2**30):
        monkeypatch.setattr(kernel, "PIECE", size)
        got = KERNELS["plain"](query, key, value)
        found.append((got, *torch.autograd.grad(got.square().sum(), (query, key, value))))
    assert seen == [6 // pieces] * pieces + [6]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"fused": 1.0, "math": 0.9, "plain": 0.7}, "fused"),  # no more than a near tie
        ({"fused": 1.0, "math": 0.6, "plain": 0.7}, "math"),
        ({"fused": 1.0, "math": 0.6, "plain": 0.1}, "plain"),
        ({"fused": 0.1, "math": 0.6, "plain": 0.7}, "fused"),
    ],
)
def test_another_kernel_must_be_faster_by_far(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], best: str
) -> None:
    names = {kernel: name for name, kernel in KERNELS.items()}
    monkeypatch.setattr(kernel, "_seconds", lambda one, _: seconds[names[one.func]])
    assert fastest(*parts()) == (best, seconds)


def test_a_shape_is_measured_once_in_a_process_and_what_was_chosen_before_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[Any] = []

    def noted(*given: torch.Tensor, mask: torch.Tensor | None) -> tuple[str, dict[str, float]]:
        measured.append((*(tuple(part.shape) for part in given), given[0].dtype, mask))
        return "plain", {}

    monkeypatch.setattr(kernel, "_measured", {})
    monkeypatch.setattr(kernel, "fastest", noted)
    case = "cpu float64 2x3x5/11x7"
    for _ in range(2):
        attention = Attention()
        with attention.step():
            F.scaled_dot_product_attention(*parts())
        assert attention.chosen == {case: "plain"}
    assert measured == [(*SHAPES, torch.float64, None)]
    monkeypatch.setattr(kernel, "_measured", {})
    kept = Attention(chosen={case: "math"})
    with kept.step():
        F.scaled_dot_product_attention(*parts())
    assert kept.chosen == {case: "math"}
    assert len(measured) == 1


def test_calls_without_a_gradient_or_with_dropout_or_causal_are_torchs_own() -> None:
    attention = Attention()
    query, key, value = parts()
    with attention.step():
        F.scaled_dot_product_attention(query, key, value, is_causal=True)
        F.scaled_dot_product_attention(query, key, value, None, 0.5)
        F.scaled_dot_product_attention(query.detach(), key.detach(), value.detach())
    assert attention.chosen == {}


def test_what_is_measured_has_the_mask_in_its_name_and_its_gradient() -> None:
    query, key, value = parts(torch.float32)
    bias = torch.zeros(1, 3, 5, 11)
    asked: list[Any] = [None, bias, bias.clone().requires_grad_(), torch.ones(2, 1, 1, 11, dtype=torch.bool)]
    attention = Attention()
    with torch.autocast("cpu", torch.bfloat16), attention.step():
        for mask in asked:
            F.scaled_dot_product_attention(query, key, value, mask)
        F.scaled_dot_product_attention(query, key, value, attn_mask=bias)  # the same as the second one
    case = "cpu bfloat16 2x3x5/11x7"
    assert list(attention.chosen) == [
        case,
        f"{case} mask bfloat16 1x3x5x11",
        f"{case} mask bfloat16 1x3x5x11 with gradient",
        f"{case} mask bool 2x1x1x11",
    ]


def test_autocast_is_asked_for_its_dtype() -> None:
    attention = Attention("plain")
    with torch.autocast("cpu", torch.bfloat16), attention.step():
        got = F.scaled_dot_product_attention(*parts(torch.float32))
    assert got.dtype == torch.bfloat16
    assert list(attention.chosen) == ["cpu bfloat16 2x3x5/11x7"]


@pytest.mark.parametrize(
    ("options", "processes", "expected"),
    [
        ({}, 1, "auto"),
        ({}, 2, "fused"),
        ({"deterministic": True}, 1, "fused"),
        ({"compile": True}, 1, "fused"),
        ({"checkpointing": True}, 1, "fused"),
        ({"attention": "plain"}, 2, "plain"),
        ({"attention": "math", "deterministic": True}, 1, "math"),
    ],
)
def test_what_must_be_the_same_in_every_run_is_not_left_to_a_clock(
    options: dict[str, Any], processes: int, expected: str
) -> None:
    assert Execution(**options).kernel(processes) == expected


def test_a_kernel_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attention must be auto or fused with compile or checkpointing, got 'math'"):
        train(
            Recipe(method="scratch", subset=20, epochs=1), tmp_path, device="cpu",
            execution=Execution(attention="math", checkpointing=True),
        )  # fmt: skip


def recipe_of(**fields: Any) -> Recipe:
    return Recipe(model="vit_pico", subset=23, batch_size=7, epochs=2, warmup_epochs=0, base_lr=1e-2, **fields)


OF_TIMM = ["6x3x5x64", "6x3x2x64"]
OF_CVT = ["6x1x64/16x8", "6x2x16/4x8", "6x3x5/2x8"]
MASKED_IN_CVT = [f"{case} mask bool 6x1x1x{keys}" for case, keys in zip(OF_CVT, (16, 4, 2), strict=True)]


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("vit_pico", {}, ["6x3x17x4", "6x3x5x4", "6x2x12/17x4"]),
        ("timm:vit_tiny_patch16_224", {"img_size": 8, "patch_size": 4}, [*OF_TIMM, "6x16x5x8", "6x16x3/5x8"]),
        ("swin_nano", {}, ["6x4x16x4"]),  # the decoder alone
        ("cvt_nano", {}, [*OF_CVT, "6x4x5x4", "6x4x4/5x4"]),
        ("cvt_nano", {"masked_convolutions": True}, [*OF_CVT, *MASKED_IN_CVT, "6x4x5x4", "6x4x3/5x4"]),
    ],
)
def test_every_architecture_attends_by_the_kernel_that_is_asked_for(
    tmp_path: Path, model: str, options: dict[str, Any], expected: list[str]
) -> None:
    recipe = Recipe(model=model, subset=6, batch_size=6, epochs=1, warmup_epochs=0, **options)
    run = train(recipe, tmp_path, device="cpu", execution=Execution(attention="plain"))
    used = json.loads((run.path.parent / "cost.json").read_text())["train"]["attention"]
    assert used == {f"cpu float32 {case}": "plain" for case in expected}


@pytest.mark.parametrize("asked", ["math", "fused"])
def test_a_kernel_for_what_does_not_ask_for_one_is_refused(tmp_path: Path, asked: Any) -> None:
    recipe = Recipe(method="scratch", model="swin_nano", subset=6, batch_size=6, epochs=1)
    sentence = rf"attention must be auto for a model .* as Swin .* got '{asked}'; leave it out"
    with pytest.raises(ValueError, match=sentence):
        train(recipe, tmp_path, device="cpu", execution=Execution(attention=asked))
    train(recipe, tmp_path, device="cpu")


@pytest.mark.parametrize("method", ["ssat", "ssl_ft"])
def test_runs_differ_by_rounding_alone_and_say_which_kernels_they_used(tmp_path: Path, method: Any) -> None:
    # Not AdamW, which makes whole steps of the rounding where a gradient is 0, as those of the keys' biases are.
    recipe = recipe_of(method=method, optimiser="sgd")
    runs = {
        name: train(recipe, tmp_path / name, device="cpu", execution=Execution(attention=name))
        for name in ("fused", "math", "plain")
    }
    for name, run in runs.items():
        for key, value in run.state.items():
            torch.testing.assert_close(value, runs["fused"].state[key], rtol=1e-3, atol=1e-5)
        cost = json.loads((run.path.parent / "cost.json").read_text())
        used = {one for stage in cost.values() for one in stage["attention"].values()}
        assert used == {name}
    assert runs["plain"].hash != runs["fused"].hash


@pytest.mark.parametrize("options", [{"deterministic": True}, {"checkpointing": True}])
def test_a_kernel_that_was_never_in_question_is_named_too(tmp_path: Path, options: dict[str, bool]) -> None:
    run = train(recipe_of(), tmp_path, device="cpu", execution=Execution(**options))
    cost = json.loads((run.path.parent / "cost.json").read_text())
    assert [stage["attention"] for stage in cost.values()] == [{"all": "fused"}] * len(cost)


def test_each_stage_names_the_kernels_that_it_used_itself_before_and_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_measured", {})
    monkeypatch.setattr(kernel, "fastest", lambda *shapes, **more: ("plain", {}))
    recipe = Recipe(method="ssl_ft", model="vit_pico", subset=12, batch_size=6, epochs=2, warmup_epochs=0)

    def stop(done: int, total: int, text: str) -> None:
        if done == 7:  # the third step of fine-tuning
            raise KeyboardInterrupt

    expected = {"pretrain": ["6x3x5x4", "6x2x17x4"], "finetune": ["6x3x17x4"]}
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path, device="cpu", save_every_s=-1, progress=stop)
    run = train(recipe, tmp_path, device="cpu", execution=Execution(deterministic=True))
    cost = json.loads((run.path.parent / "cost.json").read_text())
    assert list(cost["pretrain"]["attention"].values()) == ["plain", "plain"]
    assert [case.split()[-1] for case in cost["finetune"]["attention"]] == [*expected["finetune"], "all"]
    assert set(cost["finetune"]["attention"].values()) == {"plain", "fused"}


def test_a_run_that_goes_on_elsewhere_keeps_its_kernels_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always(name: str) -> None:
        monkeypatch.setattr(kernel, "_measured", {})
        monkeypatch.setattr(kernel, "fastest", lambda *shapes, **more: (name, {}))

    def stop(done: int, total: int, text: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    always("plain")
    whole = train(recipe_of(), tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(recipe_of(), tmp_path / "part", device="cpu", save_every_s=-1, progress=stop)
    always("math")
    assert train(recipe_of(), tmp_path / "part", device="cpu").hash == whole.hash
    assert train(recipe_of(), tmp_path / "other", device="cpu").hash != whole.hash
