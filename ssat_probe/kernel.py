"""Kernel of attention in training: torch's own, or another where a short measurement finds it much faster.

torch's fused kernel is made for many tokens and wide heads. On a CPU with narrow heads or in bfloat16 it can take many
times as long as the same arithmetic in plain matrix products.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Heads = Float[Tensor, "batch head token dim"]

PAYS_BELOW = 2 / 3
"Share of the fused kernel's time that another one must stay below: near ties would make equal runs round differently."

SHORT_ROW = 64
"""Keys below which the softmax of low precision is taken in float32: what is left over of a row after vectors of 32,
torch treats number by number. Measured with AVX-512: attention with 17 keys takes 0.7, with 50 keys 0.9, with 65 keys
1.1 of the time otherwise."""

PIECE, WIDE_HEAD = 4 * 2**20, 32
"""Bytes of scores that are made at once on a CPU for heads of fewer dimensions than that, whose products wait for
memory: 1,024 heads of 8 dimensions and 197 tokens then take 0.83 of the time, 192 heads of 64 dimensions 1.04."""

TURNS = 4
"The kernels are timed in turns; the first does not count, and of the others the fastest does."

_measured: dict[str, tuple[str, dict[str, float]]] = {}
"What was found in this process, by device, dtype and shapes."


def fused(query: Heads, key: Heads, value: Heads, mask: Tensor | None = None, scale: float | None = None) -> Heads:
    """Attention by what torch takes to be best."""
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


def math(query: Heads, key: Heads, value: Heads, mask: Tensor | None = None, scale: float | None = None) -> Heads:
    """The same by torch's products in turn, of which low precision is computed in float32."""
    with sdpa_kernel(SDPBackend.MATH):
        return fused(query, key, value, mask, scale)


def plain(query: Heads, key: Heads, value: Heads, mask: Tensor | None = None, scale: float | None = None) -> Heads:
    """The same by two products and a softmax between them, each rounded to the dtype given."""
    heads = query.shape[:2]
    with torch.autocast(query.device.type, enabled=False):
        # Each part is copied once, heads one after the other; torch alone would also transpose the keys in memory.
        query, key, value = (part.flatten(0, 1) for part in (query, key, value))
        query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        size = len(query)
        if query.device.type == "cpu" and query.shape[-1] < WIDE_HEAD and mask is None:
            size = max(1, PIECE // (query.shape[1] * key.shape[1] * query.element_size()))
        pieces = [
            _attended(*piece, heads, mask)
            for piece in zip(query.split(size), key.split(size), value.split(size), strict=True)
        ]
        return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).unflatten(0, heads)


def _attended(query: Tensor, key: Tensor, value: Tensor, heads: Sequence[int], mask: Tensor | None) -> Tensor:
    """Of some heads, of queries that are scaled; of all heads where there is a mask."""
    scores = torch.bmm(query, key.mT)
    if mask is not None:
        scores = _masked(scores.unflatten(0, heads), mask).flatten(0, 1)
    # The softmax is computed in float32 inside torch either way: what would be asked for is that it is also read and
    # written so, twice more in all.
    is_low = scores.dtype in (torch.bfloat16, torch.float16)
    weights = scores.float() if is_low and scores.shape[-1] < SHORT_ROW else scores
    return torch.bmm(weights.softmax(-1).to(value.dtype), value)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores with the mask added, or where it says True alone."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask.to(scores.dtype)


KERNELS: dict[str, Callable[..., Tensor]] = {"fused": fused, "math": math, "plain": plain}
"""Of queries, keys and values of all heads the mean of the values for each query, weighted by softmax(scale · query ·
keys + mask), or where the mask says True alone; the scale is 1 / √dim where none is given."""


class Attention(TorchFunctionMode):
    """Within this context, attention without dropout is computed by the kernel chosen for its shapes."""

    def __init__(self, asked: str = "auto", chosen: Mapping[str, str] | None = None, *, must_act: bool = False) -> None:
        """Make it.

        Args:
            asked: One of ``KERNELS``, or auto: the fastest by measurement, of each shape once in a process.
            chosen: Kernels by shape that a run has used before, and goes on with.
            must_act: Torch's own kernel is somebody's wish too, which must have an effect.
        """
        super().__init__()
        self.asked, self.chosen = asked, dict(chosen or {})
        "What has been found for this run, by device, dtype and shapes."
        self.used: dict[str, str] = {}
        "What was used since the last call of ``unsettle``."
        self._can_act = asked != "fused" or must_act
        self._is_settled = not self._can_act

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step of a training; once all shapes are found to be best off with torch's own kernel, nothing is changed.

        Yields:
            Nothing.

        Raises:
            ValueError: If a kernel was asked for, and nothing attends in a way that could be given to it.
        """
        if self._is_settled:
            yield
            return
        with self:
            yield
        if self.asked != "auto" and not self.chosen:
            raise ValueError(
                "attention must be auto for a model that does not call scaled_dot_product_attention, as Swin does not, "
                f"got {self.asked!r}; leave it out."
            )
        self._is_settled = all(name == "fused" for name in self.chosen.values())

    def unsettle(self) -> None:
        """Look again: another stage may have other shapes."""
        self.used = {} if self._can_act else {"all": "fused"}
        self._is_settled = not self._can_act

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Attention by the kernel chosen; everything else as it is."""
        options = kwargs or {}
        call = _Call.of(args, options) if func is F.scaled_dot_product_attention else None
        if call is None:
            return func(*args, **options)
        return KERNELS[self._of(call)](*call.parts, call.mask, scale=call.scale)

    def _of(self, call: "_Call") -> str:
        """Kernel for such tensors."""
        case = call.case
        if case not in self.chosen:
            if self.asked == "auto" and case not in _measured:
                with torch.autocast(call.parts[0].device.type, enabled=False), torch.enable_grad():
                    _measured[case] = fastest(*call.parts, mask=call.mask)
            self.chosen[case] = _measured[case][0] if self.asked == "auto" else self.asked
        self.used[case] = self.chosen[case]
        return self.used[case]


@dataclass(frozen=True)
class _Call:
    """Attention whose gradient is wanted, without dropout."""

    parts: tuple[Tensor, ...]
    "Queries, keys and values, in the precision in which torch would take them."
    mask: Tensor | None
    scale: float | None

    @classmethod
    def of(cls, args: Sequence[Any], options: Mapping[str, Any]) -> "_Call | None":
        """The call, if it is one."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **options}
        parts = [given.pop(name) for name in ("query", "key", "value")]
        mask, scale = given.pop("attn_mask", None), given.pop("scale", None)
        needs_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        if any(given.values()) or parts[0].ndim != 4 or parts[0].is_meta or not needs_gradient:
            return None
        device, dtype = parts[0].device.type, parts[0].dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(dtype)
        return cls(tuple(part.to(dtype) for part in parts), mask, scale)

    @property
    def case(self) -> str:
        """What is measured once."""
        query, key, _ = self.parts
        tokens = f"{query.shape[2]}" if key.shape[2] == query.shape[2] else f"{query.shape[2]}/{key.shape[2]}"
        case = f"{query.device.type} {query.dtype} {len(query)}x{query.shape[1]}x{tokens}x{query.shape[3]}"
        if self.mask is not None:
            case += f" mask {self.mask.dtype} {'x'.join(map(str, self.mask.shape))}"
            case += " with gradient" if self.mask.requires_grad else ""
        return case.replace("torch.", "")


def fastest(*parts: Tensor, mask: Tensor | None = None, pays_below: float = PAYS_BELOW) -> tuple[str, dict[str, float]]:
    """Time a forward and backward pass of each kernel.

    Args:
        *parts: Queries, keys and values; random ones of their shapes are taken.
        mask: Added to the scores, or True where they count; none for none.
        pays_below: Share of the fused kernel's time below which another one is taken.

    Returns:
        Name of the kernel, and the seconds of each.
    """
    generator = torch.Generator().manual_seed(0)
    alike = [torch.randn(part.shape, generator=generator).to(part).requires_grad_() for part in parts]
    inputs = alike
    if mask is not None:
        mask = mask.detach().clone().requires_grad_(mask.requires_grad)
        inputs = alike + [mask] * mask.requires_grad
    seconds = dict.fromkeys(KERNELS, float("inf"))
    for turn in range(TURNS):
        for name, kernel in KERNELS.items():
            taken = _seconds(partial(kernel, *alike, mask), inputs)
            seconds[name] = min(seconds[name], taken) if turn else seconds[name]
    best = min(seconds, key=lambda name: seconds[name])
    return (best if seconds[best] < pays_below * seconds["fused"] else "fused"), seconds


def _seconds(attend: Callable[[], Tensor], inputs: Sequence[Tensor]) -> float:
    """Of one forward and backward pass."""
    _wait_for(inputs[0].device)
    started = time.perf_counter()
    torch.autograd.grad(attend().sum(), inputs)
    _wait_for(inputs[0].device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
