"""Watch over every torch function that a model calls: it sees attention whichever kernel computes it."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ssat_probe.placement import Place

_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax)
_MATMUL = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


@dataclass(frozen=True)
class Attention:
    """One attention operation of one forward pass, or a chunk of its queries."""

    block: int
    "Transformer block, 0 next to the input."
    name: str
    "Module that computed it, such as ``blocks.3.attn``."
    rows: Tensor
    "(batch, head, query, key), float32 or float64: scores, scaled and with biases added; or else weights."
    has_scores: bool
    "True for scores before softmax, False for weights after it, where the operation does not show its scores."
    is_valid: Tensor | None
    "True for keys that a query may attend to, broadcasts against (batch, head, query, key); None means all."
    first_query: int = 0
    "Position of the first query among those of the operation, where it is handed over in chunks of queries."
    num_queries: int = 0
    "Queries of the whole operation."
    place: Place | str = "the block was not seen"
    "Where the block stands, with the images of this chunk; or the sentence that says why nobody knows."
    kind: Literal["fused", "plain", "module"] = "plain"
    "``F.scaled_dot_product_attention``, a softmax of its own, or ``nn.MultiheadAttention``."
    is_last: bool = True
    "Whether this ends the operation. Chunks go through the queries of some images before those of the next ones."

    def part(self, queries: slice, keys: slice, windows: slice = slice(None)) -> "Attention":
        """What this chunk holds of some queries and keys.

        Args:
            queries: Positions among all queries of the operation.
            keys: Positions of keys.
            windows: Positions on the first axis.

        Returns:
            Rows and valid keys cut to these; perhaps no query.
        """
        start, stop, _ = queries.indices(self.first_query + self.rows.shape[2])
        here = slice(max(start - self.first_query, 0), max(stop - self.first_query, 0))
        is_valid = self.is_valid
        if is_valid is not None:
            is_valid = is_valid.expand(*is_valid.shape[:2], *self.rows.shape[2:])
            is_valid = _of(is_valid, windows)[:, :, here, keys]
        first = self.first_query + here.start
        return replace(self, rows=self.rows[windows, :, here, keys], is_valid=is_valid, first_query=first)


class AttentionWatch(TorchFunctionMode):
    """Sees every torch function that the model calls, and which module calls it."""

    def __init__(
        self,
        reduce: Callable[[Attention], None],
        names: Mapping[str, int],
        errors: dict[int, float],
        is_checked: bool,
        most_weights: int = 0,
    ) -> None:
        """Watch from entering to leaving the context.

        Args:
            reduce: Gets each operation, or each chunk of its images and queries.
            names: Modules to watch, with the number of their block.
            errors: Filled with the largest error of the self-check by block.
            is_checked: Compare weights @ values with what the operation returned.
            most_weights: Weights handed over at a time; 0 means a whole operation.
        """
        super().__init__()
        self.callers: list[str] = []
        self.counts: Counter[int] = Counter()
        self.places: dict[int, Place | str] = {}
        self.others: dict[int, tuple[int, ...]] = {}
        "By block: shape of an operation that looks like attention, on other axes than those of attention."
        self._reduce = reduce
        self._names = names
        self._errors = errors
        self._is_checked = is_checked
        self._most_weights = most_weights
        self._softmax: tuple[Attention, Tensor] | None = None  # waits for its product with the values
        self._masked_below = -math.inf

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function, then look at it if a watched block called it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        watch = _WATCHERS.get(func)
        block = self._block() if watch else None
        if watch is not None and block is not None:
            output = result[0] if isinstance(result, tuple) else result
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                watch(self, block, output, *args, **kwargs)
        return result

    def _block(self) -> int | None:
        """Block that is running, if it is one of the expected."""
        return next((self._names[name] for name in reversed(self.callers) if name in self._names), None)

    def _has_axis_of_windows(self, block: int) -> bool:
        place = self.places.get(block)
        return isinstance(place, Place) and place.has_axis_of_windows

    def _hand_over(self, seen: Attention) -> None:
        """A whole operation, in chunks."""
        self.counts[seen.block] += 1
        self._errors.setdefault(seen.block, math.nan)
        for part, windows, queries in self._parts(seen):
            self._reduce_finite(part, seen.rows.shape, windows, queries)

    def _parts(self, seen: Attention) -> Iterator[tuple[Attention, slice, slice]]:
        """Chunks of an operation, each with the keys that are masked in it."""
        seen = replace(seen, num_queries=seen.rows.shape[2])
        for windows, queries in self._chunks(seen.block, seen.rows.shape):
            part = seen.part(queries, slice(None), windows)
            if seen.kind == "plain":
                is_masked = part.rows <= self._masked_below
                part = replace(part, is_valid=~is_masked) if is_masked.any() else part
            yield part, windows, queries

    def _reduce_finite(self, seen: Attention, shape: Sequence[int], windows: slice, queries: slice) -> None:
        if seen.has_scores and not seen.rows.amax() < torch.inf:
            raise ValueError(
                f"{seen.name}: scores of attention must be finite, got NaN or infinity. Check the weights."
            )
        place = self.places.get(seen.block, seen.place)
        if isinstance(place, Place):
            place = replace(place, batch=place.batch * len(seen.rows) // shape[0])
        is_last = (windows.stop, queries.stop) == (shape[0], shape[2])
        self._reduce(replace(seen, place=place, is_last=is_last))

    def _chunks(self, block: int, shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
        """Windows and queries to hand over at a time, of an operation on (batch, head, query, key): whole images."""
        place, most = self.places.get(block), self._most_weights or math.prod(shape)
        whole = isinstance(place, Place) and shape[0] % place.batch == 0
        windows = shape[0] // place.batch if whole else shape[0]  # type: ignore[union-attr]
        windows = min(shape[0], windows * max(1, most // (windows * math.prod(shape[1:]))))
        size = max(1, most // (windows * shape[1] * shape[3]))
        for first in range(0, shape[0], windows):
            for start in range(0, shape[2], size):
                yield slice(first, min(first + windows, shape[0])), slice(start, min(start + size, shape[2]))

    def _see_fused(
        self,
        block: int,
        result: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.ndim == 5 and attn_mask is None and self._has_axis_of_windows(block):
            query, key, value, result = (one.flatten(0, 1) for one in (query, key, value, result))
        if query.ndim != 4:
            self.others[block] = tuple(query.shape)
            return
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if attn_mask is not None:
            attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
            attn_mask = attn_mask.expand(*attn_mask.shape[:2], query.shape[2], key.shape[2])
        is_masked = attn_mask is not None and not bool(_open(attn_mask).all())  # a bias alone hides no key
        self.counts[block] += 1
        shape = (*query.shape[:3], key.shape[2])
        for windows, queries in self._chunks(block, shape):
            scores = _wide(query[windows, :, queries]) * scale @ _wide(key[windows]).mT
            is_valid = None
            if is_causal:
                is_valid = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril(queries.start)[None, None]
            elif attn_mask is not None:
                mask = _of(attn_mask, windows)[:, :, queries]
                is_valid = _open(mask) if is_masked else None
                scores = scores if mask.dtype == torch.bool else scores + mask
            if is_valid is not None:
                scores = scores.masked_fill(~is_valid, -torch.inf)
            seen = Attention(
                block, self.callers[-1], scores, True, is_valid, queries.start, query.shape[2], kind="fused"
            )
            if self._is_checked:
                self._check(seen, value[windows], result[windows, :, queries])
            self._errors.setdefault(block, math.nan)
            self._reduce_finite(seen, shape, windows, queries)

    def _see_softmax(
        self, block: int, result: Tensor, input: Tensor, dim: int | None = None, *others: Any, **more: Any
    ) -> None:
        if dim not in (-1, input.ndim - 1):
            return
        if input.ndim == 5 and self._has_axis_of_windows(block):
            input = input.flatten(0, 1)
        if input.ndim != 4:
            self.others[block] = tuple(input.shape)
            return
        self._masked_below = torch.finfo(input.dtype).min / 2  # masked by -inf or the most negative number
        caller = self.callers[-1].removesuffix(".softmax")
        seen = Attention(block, caller, _wide(input), True, None)
        if self._is_checked:
            self._softmax = (seen, result)
        self._hand_over(seen)

    def _see_product(self, block: int, result: Tensor, input: Tensor, other: Tensor) -> None:
        """Compare with the product of the latest softmax and the values, if this is it."""
        if self._softmax is None:
            return
        seen, weights = self._softmax
        if input.untyped_storage().data_ptr() == weights.untyped_storage().data_ptr() and input.shape == weights.shape:
            self._softmax = None
            other, result = (one.flatten(0, 1) if one.ndim == 5 else one for one in (other, result))
            for part, windows, queries in self._parts(seen):
                self._check(part, other[windows], result[windows, :, queries])

    def _see_module(self, block: int, result: Tensor, *args: Any, **kwargs: Any) -> None:
        """``nn.MultiheadAttention``: the same call once more, now with the weights of every head."""
        given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
        again = given | {"need_weights": True, "average_attn_weights": False, "is_causal": False}
        output, weights = F.multi_head_attention_forward(**again)
        assert weights is not None
        weights = weights if weights.ndim == 4 else weights[None]
        is_valid = _allowed(weights, given.get("attn_mask"), given.get("key_padding_mask"))
        seen = Attention(block, self.callers[-1], _wide(weights), False, is_valid, kind="module")
        if self._is_checked:
            self._compare(seen, output, result, 64 * torch.finfo(result.dtype).eps * float(output.abs().max() + 1))
        self._hand_over(seen)

    def _check(self, seen: Attention, value: Tensor, result: Tensor) -> None:
        """Compare weights @ values with what the operation returned."""
        weights, finite, keys = seen.rows.softmax(-1), seen.rows, seen.rows.shape[3]
        if seen.is_valid is not None:
            weights = weights.nan_to_num_(nan=0.0)  # rows without a valid key
            finite = finite.masked_fill(~seen.is_valid, 0)
        largest = torch.maximum(finite.amax(), -finite.amin())
        # Rounding of the scores enters the weights in proportion to the scores' size. That of the two sums over the
        # keys is at most keys * ε / 2 each (Higham, 2002, Sec. 3.1), and is reached where all values are alike.
        tolerance = torch.finfo(result.dtype).eps * float((16 + 4 * largest + keys) * value.abs().max())
        self._compare(seen, weights @ value.to(weights.dtype), result, tolerance)

    def _compare(self, seen: Attention, ours: Tensor, result: Tensor, tolerance: float) -> None:
        error = float((ours - result.to(ours.dtype)).abs().max())
        if not error <= tolerance:
            raise ValueError(
                f"{seen.name}: captured weights @ values must equal the operation's own output within {tolerance:.2g}, "
                f"got a difference of {error:.2g}. This attention is not what was captured; do not trust its measures."
            )
        self._errors[seen.block] = max(error, self._errors.get(seen.block, 0.0))


# Not in the instance: methods bound there would keep it, and what it hands over, alive until garbage is collected.
_WATCHERS: dict[Callable[..., Any], Callable[..., None]] = {
    F.scaled_dot_product_attention: AttentionWatch._see_fused,
    F.multi_head_attention_forward: AttentionWatch._see_module,
    **dict.fromkeys(_SOFTMAX, AttentionWatch._see_softmax),
    **dict.fromkeys(_MATMUL, AttentionWatch._see_product),
}


def _allowed(weights: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """Valid keys under the masks of ``nn.MultiheadAttention``, whose True means that a key is left out."""
    if attn_mask is None and key_padding_mask is None:
        return None
    is_valid = torch.ones_like(weights, dtype=torch.bool)  # extra keys (bias, zero) come last and are valid
    for mask, is_padding in ((attn_mask, False), (key_padding_mask, True)):
        if mask is not None:
            is_out = mask if mask.dtype == torch.bool else mask.isneginf()
            is_out = is_out[..., None, None, :] if is_padding else is_out
            shape = weights.shape[:2] if is_out.ndim == 3 and is_out.shape[0] > 1 else (1, 1)
            is_out = is_out if is_out.ndim == 4 else is_out.reshape(*shape, *is_out.shape[-2:])
            is_valid[..., : is_out.shape[-1]] &= ~is_out
    return is_valid


def _open(mask: Tensor) -> Tensor:
    """Where a mask lets a query attend to a key."""
    return mask if mask.dtype == torch.bool else ~mask.isneginf()


def _of(mask: Tensor, windows: slice) -> Tensor:
    """Of some windows, where not all of them share it."""
    return mask[windows] if len(mask) > 1 else mask


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
