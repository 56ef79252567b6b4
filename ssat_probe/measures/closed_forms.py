"""GELU, layer normalisation, linear maps and attention with second derivatives in closed form.

torch differentiates their first derivatives through chains of elementary operations, which on a ViT-T take a tenth of a
Hessian product, in passes over memory. By hand there are fewer passes, the result is equal to rounding, and whatever
depends on the point alone is ready for the next product.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import pi, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten


class ClosedForms(TorchFunctionMode):
    """Within this context, a loss is built of operations whose gradients are cheap to differentiate once more.

    For one gradient of gradient, taken after the context has ended. Gradients that the loss takes of its own, within
    the context, are torch's, which can be differentiated any number of times. What a closed form does not cover stays
    as it is: other dtypes, masks, tanh-GELU, tensors without gradient.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        """Nothing changes yet.

        Args:
            parameters: Those that will be differentiated for, all together. Linear maps of others stay torch's, which
                leaves out the products that nobody asks for.
        """
        super().__init__()
        self.is_open = False
        self._wanted = {id(parameter) for parameter in parameters}

    def __enter__(self) -> "ClosedForms":
        """From here on."""
        self.is_open = True
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Up to here."""
        self.is_open = False
        super().__exit__(*exception)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The closed form where there is one; everything else, as it is."""
        make = _FORMS.get(func)
        found = make(self, *args, **(kwargs or {})) if make and _are_usual(args[:1]) else None
        return func(*args, **(kwargs or {})) if found is None else found

    def _gelu(self, x: Tensor, approximate: str = "none") -> Tensor | None:
        return _Gelu.apply(x, self) if approximate == "none" else None

    def _norm(
        self, x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor | None:
        is_usual = len(shape) == 1 < x.ndim and _are_usual((weight, bias), like=x)
        return _Norm.apply(x, weight, bias, eps, self) if is_usual else None

    def _linear(self, x: Tensor, weight: Any, bias: Any = None) -> Tensor | None:
        is_usual = _are_usual((weight, bias), like=x) and {id(weight), id(bias)} <= self._wanted
        return _Linear.apply(x, weight, bias, self) if is_usual else None

    def _attention(
        self, q: Tensor, k: Any, v: Any, *unusual: Any, scale: float | None = None, **options: Any
    ) -> Tensor | None:
        is_usual = not unusual and not any(isinstance(one, Tensor) or one for one in options.values())
        if not is_usual or q.ndim != 4 or not _are_usual((k, v), like=q) or not q.shape == k.shape == v.shape:
            return None
        flat = [one.reshape(-1, *q.shape[2:]) for one in (q, k, v)]  # images and heads side by side
        return _Attention.apply(*flat, q.shape[-1] ** -0.5 if scale is None else scale, self)[0].view(q.shape)


_FORMS: dict[Any, Callable[..., Tensor | None]] = {
    F.gelu: ClosedForms._gelu,
    F.layer_norm: ClosedForms._norm,
    F.linear: ClosedForms._linear,
    F.scaled_dot_product_attention: ClosedForms._attention,
}


def _are_usual(tensors: Sequence[Any], like: Tensor | None = None) -> bool:
    """Whether these are tensors that gradients go through: an input, or what goes with one."""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    return all(
        isinstance(one, Tensor)
        and one.requires_grad
        and one.dtype in (torch.float32, torch.float64)
        and not one.is_nested
        and not torch.is_autocast_enabled(one.device.type)
        and (like is None or one.dtype == like.dtype)
        for one in tensors
    )


def _plainly(operation: Callable[..., Tensor], inputs: Sequence[Tensor], along: Tensor | None) -> tuple[Tensor, ...]:
    """First derivative by torch's own forms, for a loss that takes a gradient itself."""
    with torch.enable_grad():
        return torch.autograd.grad(operation(*inputs), inputs, along, create_graph=torch.is_grad_enabled())


def _refuse_third() -> None:
    """Not left to torch's `once_differentiable`, whose error is skipped by gradients for given inputs."""
    if torch.is_grad_enabled():
        raise ValueError("Closed forms must be differentiated twice at most, got a third time. Leave ClosedForms out.")


# In each pair, the first gives the operation and its first derivative f'(x)·dy, the second that of the first
# derivative. Cotangents of first derivatives are None where nobody asked; those that are there may be batches of a
# vectorised backward pass, which cannot be written into what is no batch.


class _Gelu(Function):
    """x Φ(x); the slope Φ + xφ stays for all later products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mode: ClosedForms) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mode, ctx.slope = mode, None
        return _aten.gelu(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if ctx.mode.is_open:
            return *_plainly(_aten.gelu, [x], dy), None
        if torch.is_grad_enabled():
            with torch.no_grad():
                ctx.slope = _aten.gelu_backward(torch.ones_like(x[:1]).expand_as(x), x)
            return _GeluSlope.apply(dy, x, ctx.slope), None
        return (_aten.gelu_backward(dy, x) if ctx.slope is None else dy * ctx.slope), None


class _GeluSlope(Function):
    """dy (Φ + xφ); its derivative by x is dy φ (2 - x²)."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, slope: Tensor) -> Tensor:
        square = x.square()
        bend = (square * -0.5).exp_()  # few new tensors: their first touch costs more than the arithmetic
        bend.mul_(square.neg_().add_(2)).mul_(1 / sqrt(2 * pi)).mul_(dy)
        ctx.save_for_backward(slope, bend)
        return dy * slope

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_third()
        slope, bend = ctx.saved_tensors
        return u * slope, u * bend, None


class _Norm(Function):
    """γ x̂ + β with x̂ = (x - mean) r and r = 1/√(variance + ε)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, mode: ClosedForms) -> Tensor:
        y, mean, r = _aten.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, r)
        ctx.eps, ctx.mode = eps, mode
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, r = ctx.saved_tensors
        if ctx.mode.is_open:
            affine = [x, weight, bias]
            return *_plainly(lambda x, *rest: _aten.layer_norm(x, x.shape[-1:], *rest, ctx.eps), affine, dy), None, None
        if torch.is_grad_enabled():
            return *_NormSlope.apply(dy, x, weight, bias, mean, r), None, None
        return *_norm_backward(dy, x, mean, r, weight, bias), None, None


class _NormSlope(Function):
    """dx = r P(γ dy) with P(z) = z - mean(z) - x̂ mean(z x̂); dγ = Σ dy x̂; dβ = Σ dy.

    With cotangents a, g, b of these, and as r and x̂ change by -r² mean(x̂ δx) and r P(δx):

        of dy:  γ r P(a) + g x̂ + b
        of γ:   Σ dy r P(a)
        of x:   r P(g dy) - r [r P(a) mean(γ dy x̂) + dx mean(a x̂) + x̂ mean(a dx)]
    """

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, r: Tensor
    ) -> tuple[Tensor, ...]:
        dx, dweight, dbias = _norm_backward(dy, x, mean, r, weight, bias)
        hat = (x - mean).mul_(r)
        tilt = (hat * dy @ weight)[..., None].mul_(r / len(weight))
        ctx.save_for_backward(dy, x, weight, mean, r, dx, hat, tilt)
        ctx.set_materialize_grads(False)
        return dx, dweight, dbias

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, g: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_third()
        dy, x, weight, mean, r, dx, hat, tilt = ctx.saved_tensors
        of_dy = of_x = of_weight = None
        if a is not None:
            along = _norm_backward(a, x, mean, r)
            of_dy = along * weight
            of_weight = (along * dy).sum(tuple(range(dy.ndim - 1)))
            of_x = along * -tilt
            share = -r / len(weight)
            of_x.addcmul_(dx, (a * hat).sum(-1, keepdim=True) * share)
            of_x.addcmul_(hat, (a * dx).sum(-1, keepdim=True) * share)
        if g is not None:
            of_dy = _plus(of_dy, hat * g)
            of_x = _plus(of_x, _norm_backward(dy, x, mean, r, g))
        if b is not None:
            of_dy = b.expand_as(dy) if of_dy is None else of_dy.add_(b)
        return of_dy, of_x, of_weight, None, None, None


class _Linear(Function):
    """x Wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mode: ClosedForms) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.mode = mode
        return _aten.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if ctx.mode.is_open:
            return *_plainly(_aten.linear, [x, weight, bias], dy), None
        take = _LinearSlope.apply if torch.is_grad_enabled() else _linear_backward
        return *take(dy, x, weight), None


class _LinearSlope(Function):
    """dx = dy W, dW = dyᵀ x, db = Σ dy, which are bilinear."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(dy, x, weight)
        ctx.set_materialize_grads(False)
        return _linear_backward(dy, x, weight)

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, g: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_third()
        dy, x, weight = ctx.saved_tensors
        of_dy, of_x, of_weight = b, None, None
        rows, inputs = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        if g is not None:
            of_dy, of_x = _affine(of_dy, inputs, g.t()), (rows @ g).view(x.shape)
        if a is not None:
            a = a.reshape(inputs.shape)
            of_dy, of_weight = _affine(of_dy, a, weight.t()), rows.t() @ a
        if of_dy is not None:
            of_dy = of_dy.expand(dy.shape) if of_dy.ndim == 1 else of_dy.view(dy.shape)
        return of_dy, of_x, of_weight


class _Attention(Function):
    """P v with weights P = softmax(s q kᵀ), and P itself: by it the derivative of its own slope comes back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mode: ClosedForms) -> tuple[Tensor, Tensor]:
        weights = _times(q, k.mT, scale).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.mode = scale, mode
        ctx.set_materialize_grads(False)
        return weights @ v, weights

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, of_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        if ctx.mode.is_open:
            plain = partial(_aten.scaled_dot_product_attention, scale=ctx.scale)
            return *_plainly(plain, [q, k, v], dy), None, None
        if torch.is_grad_enabled():
            return *_AttentionSlope.apply(dy, q, k, v, weights, ctx.scale), None, None
        dv = None if dy is None else weights.mT @ dy
        dweights = _plus(None if dy is None else dy @ v.mT, of_weights)
        if dweights is None:
            return None, None, None, None, None
        dscores = _aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
        return _times(dscores, k, ctx.scale), _times(dscores.mT, q, ctx.scale), dv, None, None


class _AttentionSlope(Function):
    """dq = s D k, dk = s Dᵀ q, dv = Pᵀ dy with D = P C and C = dy vᵀ - Σ_key P dy vᵀ.

    With cotangents a, b, c of these, and T = s (a kᵀ + q bᵀ) less its mean under P:

        of dy:  P T v + P c
        of P:   T C + dy cᵀ, but for what is the same for all keys, which softmax does not see
        of q:   s D b;   of k:  s Dᵀ a;   of v:  (P T)ᵀ dy
    """

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        centred = dy @ v.mT
        centred -= (centred * weights).sum(-1, keepdim=True)
        dscores = centred * weights
        ctx.save_for_backward(dy, q, k, v, weights, centred, dscores)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return _times(dscores, k, scale), _times(dscores.mT, q, scale), weights.mT @ dy

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_third()
        dy, q, k, v, weights, centred, dscores = ctx.saved_tensors
        scale = ctx.scale
        of_dy = of_q = of_k = of_v = of_weights = along = None
        if a is not None:
            along, of_k = _times(a, k.mT, scale), _times(dscores.mT, a, scale)
        if b is not None:
            along, of_q = _plus(along, _times(q, b.mT, scale)), _times(dscores, b, scale)
        if along is not None:
            along = along - (along * weights).sum(-1, keepdim=True)
            of_weights = along * centred
            along = along * weights
            of_dy, of_v = along @ v, along.mT @ dy
        if c is not None:
            of_dy, of_weights = _plus(of_dy, weights @ c), _plus(of_weights, dy @ c.mT)
        return of_dy, of_q, of_k, of_v, of_weights, None


def _norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, r: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Any:
    """Derivatives by x, weight and bias; without bias that by x alone."""
    wanted = [True, bias is not None, bias is not None]
    found = _aten.native_layer_norm_backward(dy, x, x.shape[-1:], mean, r, weight, bias, wanted)
    return found[0] if bias is None else found


def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    rows = dy.reshape(-1, dy.shape[-1])
    return (rows @ weight).view(x.shape), rows.t() @ x.reshape(-1, x.shape[-1]), rows.sum(0)


def _affine(start: Tensor | None, one: Tensor, two: Tensor) -> Tensor:
    """Product of matrices, added to what there is: to a bias, or in place."""
    if start is None:
        return one @ two
    return torch.addmm(start, one, two) if start.ndim == 1 else start.addmm_(one, two)


def _times(one: Tensor, two: Tensor, scale: float) -> Tensor:
    """Scaled product of matrices, without a pass for the scale."""
    return torch.baddbmm(one.new_zeros(()), one, two, beta=0, alpha=scale)


def _plus(one: Tensor | None, two: Tensor | None) -> Any:
    """Sum of what is there; in place of the first."""
    return two if one is None else one if two is None else one.add_(two)
