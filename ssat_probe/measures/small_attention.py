"""Attention of few tokens and narrow heads on the CPU, where the cost of each small matrix product is in calling it.

torch's fused kernel goes through images and heads one by one: on a ViT of 17 tokens and heads of 8 entries it takes
half of a forward pass. Here all images and heads go through each step together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Tuned on a busy CPU with AVX-512: a prototype was 1.1 to 2.1 times as fast as the fused kernel at 5 and 17 tokens with
# heads of 4 to 16 entries, and slower at 65 tokens; the limits between those sizes are a guess.
MOST_TOKENS = 32
WIDEST_HEAD = 16
FEW_TOKENS = 8  # up to so many, and WIDEST_OF_FEW, images and heads are the fastest axis of every tensor
WIDEST_OF_FEW = 8


class SmallAttention(TorchFunctionMode):
    """Within this context, plain attention of few tokens is computed for all images and heads together.

    Only where no gradient is wanted, on the CPU, without mask, dropout or causality; anything else is torch's own.
    """

    def __init__(self) -> None:
        """Memory is taken at the first use and kept for the next."""
        super().__init__()
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Attention that is small, here; everything else, as it is."""
        if func is F.scaled_dot_product_attention and _is_small(args, kwargs or {}):
            return self.attention(*args[:3])
        return func(*args, **(kwargs or {}))

    def attention(
        self,
        queries: Float[Tensor, "batch head query dim"],
        keys: Float[Tensor, "batch head query dim"],
        values: Float[Tensor, "batch head query dim"],
    ) -> Float[Tensor, "batch head query dim"]:
        """Softmax attention over as many keys as there are queries.

        Args:
            queries: Of all heads.
            keys: Theirs.
            values: Theirs.

        Returns:
            Mean of the values, weighted by softmax of queries · keys / √dim.
        """
        if queries.shape[2] <= FEW_TOKENS and queries.shape[3] <= WIDEST_OF_FEW:
            return _of_few_tokens(queries, keys, values)
        batch, head, num, dim = queries.shape
        many = batch * head
        flipped = [self._buffer(name, (many, dim, num), queries) for name in ("queries", "values")]
        for buffer, tensor in zip(flipped, (queries, values), strict=True):
            buffer.view(batch, head, dim, num).copy_(tensor.transpose(2, 3))
        straight = self._buffer("keys", (many, num, dim), queries)
        straight.view(batch, head, num, dim).copy_(keys)
        scores = self._buffer("scores", (many, num, num), queries)  # key, query: softmax runs along the slower axis
        torch.baddbmm(scores, straight, flipped[0], beta=0, alpha=dim**-0.5, out=scores)
        weights = torch.softmax(scores, 1, out=self._buffer("weights", (many, num, num), queries))
        return torch.bmm(flipped[1], weights).view(batch, head, dim, num).transpose(2, 3)

    def _buffer(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        key = (name, shape, like.dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(shape, dtype=like.dtype)
        return self._buffers[key]


def _of_few_tokens(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same entry by entry, images and heads side by side in memory."""
    batch, head, num, dim = queries.shape
    q, k, v = (part.permute(3, 2, 0, 1).reshape(dim, num, batch * head) for part in (queries, keys, values))
    q = q * dim**-0.5
    scores = q[0, None] * k[0, :, None]  # key, query, image and head
    for entry in range(1, dim):
        scores.addcmul_(q[entry, None], k[entry, :, None])
    weights = scores.softmax(0)
    mean = weights[0] * v[:, 0, None]
    for key in range(1, num):
        mean.addcmul_(weights[key], v[:, key, None])
    return mean.view(dim, num, batch, head).permute(2, 3, 1, 0)


def _is_small(args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Whether a call is one that this context computes."""
    if len(args) != 3 or any(isinstance(value, Tensor) or value not in (None, 0) for value in options.values()):
        return False
    queries, keys, values = args
    return (
        queries.ndim == 4
        and queries.shape == keys.shape == values.shape
        and queries.shape[2] <= MOST_TOKENS
        and queries.shape[3] <= WIDEST_HEAD
        and queries.device.type == "cpu"
        and queries.dtype in (torch.float32, torch.float64)
        and not (torch.is_grad_enabled() and any(part.requires_grad for part in args))
    )
