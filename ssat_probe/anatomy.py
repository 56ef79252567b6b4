"""Parts of a model: its transformer blocks, its tokens, the sites of its residual stream."""

from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Site:
    """A place in the residual stream."""

    index: int
    "0 for ``embed``, then two per block."
    block: int
    "Transformer block, 0 next to the input; -1 for ``embed``."
    name: Literal["embed", "attention", "mlp"]
    "Before the first block, after the attention of a block, after its MLP."


def blocks(model: nn.Module) -> list[nn.Module]:
    """Transformer blocks of a model, first to last.

    Args:
        model: Has its blocks in ``model.blocks``, as timm's Vision Transformers have.

    Returns:
        At least one module.

    Raises:
        ValueError: If there are none.
    """
    found = getattr(model, "blocks", None)
    if not isinstance(found, nn.Sequential | nn.ModuleList) or len(found) == 0:
        raise ValueError(
            f"The model must hold its transformer blocks in 'blocks', got a {type(model).__name__} without. "
            "Probe a Vision Transformer."
        )
    return list(found)


def num_prefix_tokens(model: nn.Module) -> int:
    """Number of tokens in front of the patch tokens: class, distillation and register tokens.

    Args:
        model: Says so in ``num_prefix_tokens``, as timm's Vision Transformers do.

    Returns:
        0 or more.

    Raises:
        ValueError: If the model does not say.
    """
    count = getattr(model, "num_prefix_tokens", None)
    if not isinstance(count, int):
        raise ValueError(
            f"The model must say in 'num_prefix_tokens' how many tokens precede the patches, got a "
            f"{type(model).__name__} with {count!r}. Set it on the model."
        )
    return count


def sites(model: nn.Module) -> list[Site]:
    """All sites of the residual stream, in the order of the forward pass.

    Args:
        model: Has its blocks in ``model.blocks``.

    Returns:
        1 + 2 × number of blocks.
    """
    result = [Site(0, -1, "embed")]
    for block in range(len(blocks(model))):
        result += [Site(2 * block + 1, block, "attention"), Site(2 * block + 2, block, "mlp")]
    return result
