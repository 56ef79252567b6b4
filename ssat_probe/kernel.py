"""Kernel of attention in training: torch's own, or another where a short measurement finds it much faster.

torch's fused kernel is made for many tokens and wide heads. On a CPU with narrow heads or in bfloat16 it can take many
times as long as the same arithmetic in plain matrix products.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


def fused(query: Heads, key: Heads, value: Heads, scale: float | None = None) -> Heads:
    """Attention by what torch takes to be best."""
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def math(query: Heads, key: Heads, value: Heads, scale: float | None = None) -> Heads:
    """The same by torch's products in turn, of which low precision is computed in float32."""
    with sdpa_kernel(SDPBackend.MATH):
        return fused(query, key, value, scale)


def plain(query: Heads, key: Heads, value: Heads, scale: float | None = None) -> Heads:
    """The same by two products and a softmax between them, each rounded to the dtype given."""
    heads = query.shape[:2]
    with torch.autocast(query.device.type, enabled=False):
        # Each part is copied once, heads one after the other; torch alone would also transpose the keys in memory.
        query, key, value = (part.flatten(0, 1) for part in (query, key, value))
        query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        size = len(query)
        if query.device.type == "cpu" and query.shape[-1] < WIDE_HEAD:
            size = max(1, PIECE // (query.shape[1] * key.shape[1] * query.element_size()))
        pieces = [
            _attended(*piece) for piece in zip(query.split(size), key.split(size), value.split(size), strict=True)
        ]
        return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).unflatten(0, heads)


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of some heads, of queries that are scaled."""
    scores = torch.bmm(query, key.mT)
    # The softmax is computed in float32 inside torch either way: what would be asked for is that it is also read and
    # written so, twice more in all.
    is_low = scores.dtype in (torch.bfloat16, torch.float16)
    weights = scores.float() if is_low and scores.shape[-1] < SHORT_ROW else scores
    return torch.bmm(weights.softmax(-1).to(value.dtype), value)


KERNELS: dict[str, Callable[..., Tensor]] = {"fused": fused, "math": math, "plain": plain}
"""Of queries, keys and values of all heads the mean of the values for each query, weighted by softmax(scale · query ·
keys); the scale is 1 / √dim where none is given."""


class Attention(TorchFunctionMode):
    """Within this context, attention without masks and dropout is computed by the kernel chosen for its shapes."""

    def __init__(self, asked: str = "auto", chosen: Mapping[str, str] | None = None) -> None:
        """Make it.

        Args:
            asked: One of ``KERNELS``, or auto: the fastest by measurement, of each shape once in a process.
            chosen: Kernels by shape that a run has used before, and goes on with.
        """
        super().__init__()
        self.asked, self.chosen = asked, dict(chosen or {})
        "What is used, by device, dtype and shapes."
        self._is_settled = asked == "fused"

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step of a training; once all shapes are found to be best off with torch's own kernel, nothing is changed.

        Yields:
            Nothing.
        """
        if self._is_settled:
            yield
            return
        with self:
            yield
        self._is_settled = all(name == "fused" for name in self.chosen.values())

    def unsettle(self) -> None:
        """Look again: another stage may have other shapes."""
        self._is_settled = self.asked == "fused"

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Attention by the kernel chosen; everything else as it is."""
        options = kwargs or {}
        if func is not F.scaled_dot_product_attention or not _is_simple(args, options):
            return func(*args, **options)
        dtype = args[0].dtype
        device = args[0].device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        scale = options.get("scale")
        return KERNELS[self._of(args, dtype)](*(part.to(dtype) for part in args), scale=scale)

    def _of(self, parts: Sequence[Tensor], dtype: torch.dtype) -> str:
        """Kernel for such tensors."""
        query, key, _ = parts
        tokens = f"{query.shape[2]}" if key.shape[2] == query.shape[2] else f"{query.shape[2]}/{key.shape[2]}"
        case = f"{query.device.type} {dtype} {len(query)}x{query.shape[1]}x{tokens}x{query.shape[3]}"
        case = case.replace("torch.", "")
        if case not in self.chosen:
            if self.asked == "auto" and case not in _measured:
                with torch.autocast(query.device.type, enabled=False), torch.enable_grad():
                    _measured[case] = fastest(*(part.shape for part in parts), dtype=dtype, device=query.device)
            self.chosen[case] = _measured[case][0] if self.asked == "auto" else self.asked
        return self.chosen[case]


def fastest(
    *shapes: Sequence[int], dtype: torch.dtype, device: torch.device | str, pays_below: float = PAYS_BELOW
) -> tuple[str, dict[str, float]]:
    """Time a forward and backward pass of each kernel.

    Args:
        *shapes: Of queries, keys and values.
        dtype: Of all of them.
        device: Where they are.
        pays_below: Share of the fused kernel's time below which another one is taken.

    Returns:
        Name of the kernel, and the seconds of each.
    """
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(tuple(shape), generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    seconds = dict.fromkeys(KERNELS, float("inf"))
    for turn in range(TURNS):
        for name, kernel in KERNELS.items():
            taken = _seconds(kernel, parts)
            seconds[name] = min(seconds[name], taken) if turn else seconds[name]
    best = min(seconds, key=lambda name: seconds[name])
    return (best if seconds[best] < pays_below * seconds["fused"] else "fused"), seconds


def _seconds(kernel: Callable[..., Tensor], parts: Sequence[Tensor]) -> float:
    """Of one forward and backward pass."""
    _wait_for(parts[0].device)
    started = time.perf_counter()
    torch.autograd.grad(kernel(*parts).sum(), parts)
    _wait_for(parts[0].device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_simple(args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Whether a call has nothing beyond queries, keys, values and a scale, and its gradient is wanted."""
    plain_calls = all(not isinstance(value, Tensor) and not value for name, value in options.items() if name != "scale")
    return (
        len(args) == 3
        and plain_calls
        and args[0].ndim == 4
        and not args[0].is_meta
        and torch.is_grad_enabled()
        and any(part.requires_grad for part in args)
    )
