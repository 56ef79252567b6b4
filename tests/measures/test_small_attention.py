"""Attention of few tokens against torch's own, and where torch's own is left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ssat_probe.measures.small_attention import MOST_TOKENS, WIDEST_HEAD, SmallAttention


def heads(
    generator: Callable[[str], torch.Generator], num: int, dim: int, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """Queries, keys and values as views of a fused projection, as the blocks of a ViT have them."""
    fused = torch.randn(2, num, 3, 3, dim, generator=generator(f"heads {num} {dim}"), dtype=dtype)
    return list(fused.permute(2, 0, 3, 1, 4).unbind(0))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens of what was computed here."""
    seen: list[int] = []
    whole = SmallAttention.attention
    monkeypatch.setattr(
        SmallAttention, "attention", lambda self, *args: (seen.append(args[0].shape[2]), whole(self, *args))[1]
    )
    return seen


@pytest.mark.parametrize(("num", "dim"), [(1, 5), (5, 7), (7, 11), (17, 8), (11, 13), (MOST_TOKENS, WIDEST_HEAD)])
def test_it_is_torchs_attention_up_to_rounding(generator: Callable, computed: list[int], num: int, dim: int) -> None:
    parts = heads(generator, num, dim)
    expected = F.scaled_dot_product_attention(*parts)
    with SmallAttention() as small:
        for _ in range(2):  # the second time memory is used again
            found = F.scaled_dot_product_attention(*parts)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        other = [part.flip(0) for part in parts]
        torch.testing.assert_close(small.attention(*other), expected.flip(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)  # not overwritten by the next call
    assert computed == [num] * 3


def test_scores_that_would_overflow_an_exponential_do_not(generator: Callable) -> None:
    queries, keys, values = heads(generator, 17, 8, torch.float32)
    expected = F.scaled_dot_product_attention(1e3 * queries, keys, values)
    with SmallAttention():
        torch.testing.assert_close(F.scaled_dot_product_attention(1e3 * queries, keys, values), expected)


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"dropout_p": 0.5}, {"attn_mask": torch.zeros(5, 5)}, {"scale": 0.3}]
)
def test_what_it_does_not_know_is_left_to_torch(
    generator: Callable, computed: list[int], options: dict[str, Any]
) -> None:
    parts = heads(generator, 5, 7, torch.float32)
    with SmallAttention():
        F.scaled_dot_product_attention(*parts, **options)
    assert computed == []


def test_large_attention_and_gradients_are_left_to_torch(generator: Callable, computed: list[int]) -> None:
    with SmallAttention():
        F.scaled_dot_product_attention(*heads(generator, MOST_TOKENS + 1, 7))
        F.scaled_dot_product_attention(*heads(generator, 5, WIDEST_HEAD + 1))
        queries, keys, values = heads(generator, 5, 7)
        F.scaled_dot_product_attention(queries[:, :, :3], keys, values)
        found = F.scaled_dot_product_attention(queries.requires_grad_(), keys, values)
    assert computed == []
    assert found.requires_grad
