"""Directions in parameter space for loss landscapes: random, gradient, eigenvectors; and how they are normalised.

"Filter normalisation" means different things in different codes; each convention has its own name here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from ssat_probe.measures.basis import combined
from ssat_probe.measures.lanczos import Krylov, ritz
from ssat_probe.registry import known

NORMALISATIONS = ("filter", "layer", "park_kim", "none")
VECTORS = ("zero", "scale", "keep")
LI_EPSILON = 1e-10  # Li et al. (2018), net_plotter.py of the authors
PARK_KIM_EPSILON = 1e-7  # Park & Kim (2022), ops/norm.py of the authors
_KEPT_BY_PARK_KIM = ("pos_embed", "relative_position")  # names whose direction their code sets to zero
_TOKENS = ("cls_token", "mask_token", "pos_embed")

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Eigenvector:
    """A unit vector near an eigenvector: some eigenvalue lies within ``residual`` of ``value``."""

    value: float
    residual: float
    converged: bool
    vector: Float64[Tensor, " parameter"]


def flat(tensors: Named) -> Float64[Tensor, " parameter"]:
    """Tensors one after another as one vector in float64.

    Args:
        tensors: By name; their order is that of the vector.

    Returns:
        A copy without gradient.
    """
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors.values()])


def named(vector: Float64[Tensor, " parameter"], like: Named) -> dict[str, Tensor]:
    """The inverse of `flat`.

    Args:
        vector: As long as all tensors together.
        like: Names and shapes.

    Returns:
        Views of the vector.
    """
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(like.items(), parts, strict=True)}


def heads_of(model: nn.Module, prefix: str = "") -> dict[str, int]:
    """Number of heads of every fused projection to queries, keys and values.

    Args:
        model: Any; a fused projection is a linear map ``qkv`` beside a number ``num_heads``.
        prefix: In front of the names.

    Returns:
        By the name of the projection's module, such as ``blocks.0.attn.qkv``.
    """
    return {
        f"{prefix}{name}.qkv": int(module.num_heads)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads")
    }


def random_direction(
    weights: Named,
    seed: int,
    normalisation: str = "filter",
    *,
    vectors: str = "zero",
    heads: Mapping[str, int] | None = None,
    against: Named | None = None,
) -> dict[str, Tensor]:
    """Gaussian direction, normalised.

    Args:
        weights: Parameters by name.
        seed: Of the Gaussian entries; they do not depend on the normalisation.
        normalisation: See `normalised`.
        vectors: See `normalised`.
        heads: See `normalised`.
        against: Another direction, to which this one is made orthogonal within each unit, so that it keeps the
            norms of the normalisation (units of one entry cannot be); not for ``park_kim``, which is their code's.

    Returns:
        In float64, by name.
    """
    generator = torch.Generator().manual_seed(seed)
    size = sum(tensor.numel() for tensor in weights.values())
    entries = torch.randn(size, generator=generator, dtype=torch.float64).to(next(iter(weights.values())).device)
    direction = named(entries, weights)
    if against is not None and normalisation != "park_kim":
        direction = {
            name: _orthogonal(name, value, against[name], normalisation, heads or {})
            for name, value in direction.items()
        }
    return normalised(direction, weights, normalisation, vectors=vectors, heads=heads)


def normalised(
    direction: Named,
    weights: Named,
    normalisation: str,
    *,
    vectors: str = "zero",
    heads: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Direction whose parts are as long as the same parts of the weights.

    ``filter`` (Li et al., 2018): each output unit, that is each index of the first axis of a matrix or convolution:
    d · ‖w‖ / (‖d‖ + 1e-10). A row of a fused qkv belongs to one of q, k, v and to one head already. The patch embedding
    is such a convolution; of class, mask and trained position tokens each token is one unit.
    ``layer``: each tensor as a whole, but a fused qkv as 3 · heads tensors: q, k, v of each head.
    ``park_kim`` (Park & Kim, 2022, as their code does it): norms along the first axis, so one per *input* coordinate of
    a linear map; d · ‖w‖ / (‖d‖ + 1e-7); an entry of a class token is a unit; positions and vectors are zero.
    ``none``: the direction as it is.

    Args:
        direction: By name, as ``weights``.
        weights: Parameters.
        normalisation: One of the four.
        vectors: What becomes of biases and norms (tensors of one axis) under ``filter`` and ``layer``: ``zero`` (Li et
            al.'s default), ``scale`` (each as one unit; a fused qkv bias per q, k, v and head) or ``keep`` (as is).
        heads: Heads of each fused qkv, from `heads_of`.

    Returns:
        By name, in float64; an unknown convention is a ValueError.
    """
    known(normalisation, NORMALISATIONS, "normalisations")
    known(vectors, VECTORS, "ways to treat vectors")
    result = {}
    for name, value in direction.items():
        d, w = value.double(), weights[name].detach().double()
        if normalisation == "none" or (d.ndim < 2 and vectors == "keep" and normalisation != "park_kim"):
            result[name] = d.clone()
        elif normalisation == "park_kim":
            is_zero = d.ndim < 2 or any(part in name for part in _KEPT_BY_PARK_KIM)
            scale = w.norm(dim=0, keepdim=True) / (d.norm(dim=0, keepdim=True) + PARK_KIM_EPSILON)
            result[name] = torch.zeros_like(d) if is_zero else d * scale
        elif d.ndim < 2 and vectors == "zero":
            result[name] = torch.zeros_like(d)
        else:
            units = [_units(name, part, normalisation, heads or {}) for part in (d, w)]
            scale = units[1].norm(dim=1, keepdim=True) / (units[0].norm(dim=1, keepdim=True) + LI_EPSILON)
            result[name] = (units[0] * scale).reshape(d.shape)
    return result


def eigenvectors(krylov: Krylov, num: int = 1) -> tuple[list[Eigenvector], list[Eigenvector]]:
    """Approximate eigenvectors at both ends, from a Lanczos run that kept its basis.

    Args:
        krylov: The run.
        num: How many at either end.

    Returns:
        From the largest down, and from the smallest up. Signs: positive component along the start vector.

    Raises:
        ValueError: If the run kept no basis, or is too short for so many.
    """
    if krylov.basis is None:
        raise ValueError("Eigenvectors need the basis of the Lanczos run, got none. Run it with with_basis=True.")
    if 2 * num > len(krylov.alphas):
        raise ValueError(
            f"Eigenvectors at both ends need at least {2 * num} Lanczos steps for {num} each, "
            f"got {len(krylov.alphas)}. Take more steps."
        )
    found = ritz(krylov)
    _, small = np.linalg.eigh(krylov.matrix)
    last = len(krylov.alphas) - 1
    places = [*(last - rank for rank in range(num)), *range(num)]
    vectors = combined(small[:, places].T, krylov.basis)

    def at(place: int, vector: Tensor) -> Eigenvector:
        vector = vector / vector.norm() * (1 if small[0, place] >= 0 else -1)
        residual, converged = float(found.residuals[place]), bool(found.converged[place])
        return Eigenvector(float(found.values[place]), residual, converged, vector)

    both = [at(place, vector) for place, vector in zip(places, vectors, strict=True)]
    return both[:num], both[num:]


def cosine(one: Float64[Tensor, " parameter"], two: Float64[Tensor, " parameter"]) -> float:
    """Cosine of the angle between two directions.

    Args:
        one: A direction.
        two: Another.

    Returns:
        Between -1 and 1; NaN if one has no length.
    """
    return float(one @ two / (one.norm() * two.norm()))


def _units(name: str, tensor: Tensor, normalisation: str, heads: Mapping[str, int]) -> Tensor:
    """The tensor as (unit, entry): the parts that are normalised each by itself."""
    module, _, _ = name.rpartition(".")
    if module in heads and (normalisation == "layer" or tensor.ndim < 2):
        return tensor.reshape(3 * heads[module], -1)  # timm's order: q, k, v, then heads
    if normalisation == "layer" or tensor.ndim < 2:
        return tensor.reshape(1, -1)
    if name.rpartition(".")[2] in _TOKENS:
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.reshape(tensor.shape[0], -1)


def _orthogonal(name: str, direction: Tensor, against: Tensor, normalisation: str, heads: Mapping[str, int]) -> Tensor:
    """Part of the direction that is orthogonal to another within each unit of more than one entry."""
    kind = "layer" if normalisation == "none" else normalisation
    d, other = (_units(name, part.double(), kind, heads) for part in (direction, against))
    square = (other * other).sum(dim=1, keepdim=True)
    share = torch.where(square > 0, (d * other).sum(dim=1, keepdim=True) / square.clamp_min(1e-300), 0.0)
    return (d - share * other if d.shape[1] > 1 else d).reshape(direction.shape)
