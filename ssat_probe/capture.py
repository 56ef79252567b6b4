"""What happened inside a forward pass: attention and features, by block, without touching the model.

    with capture.attention(model, reduce):
        model(images)

hands every block's attention to ``reduce``, one at a time, whichever kernel computed it; nothing is stored.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ssat_probe.anatomy import Site, blocks, num_prefix_tokens, sites
from ssat_probe.watch import Attention, AttentionWatch

__all__ = ["Attention", "Site", "attention", "blocks", "features", "num_prefix_tokens", "sites"]


@contextmanager
def attention(
    model: nn.Module,
    reduce: Callable[[Attention], None],
    *,
    only: Sequence[int] = (),
    is_checked: bool = True,
    most_weights: int = 0,
) -> Iterator[dict[int, float]]:
    """Hand the attention of every block to ``reduce`` while the model runs once within the context.

    Sees fused and unfused attention: ``F.scaled_dot_product_attention``, every softmax over the last axis of a
    (batch, head, query, key) tensor, and ``nn.MultiheadAttention``. Hooks and modes are gone when the context ends,
    however it ends. Does not see inside compiled or scripted models, nor kernels from outside torch.

    Args:
        model: In eval mode.
        reduce: Gets one operation at a time, in the order of the forward pass; what it does not keep is freed.
        only: Blocks to capture; empty means every block.
        is_checked: Compare weights @ values with what the operation itself returned. Costs another attention.
        most_weights: Weights handed over at a time, in chunks of queries, which bounds the memory; 0 means a whole
            operation.

    Yields:
        Largest absolute error of that comparison by block, filled while the model runs. NaN where the product with
        the values could not be seen.

    Raises:
        ValueError: If the model is in training mode; if a block did not attend exactly once; if the comparison fails.
            The sentence names the block.
    """
    if model.training:
        raise ValueError("Attention must be captured in eval mode, got a model in training mode. Call model.eval().")
    modules = blocks(model)
    expected = tuple(only) or tuple(range(len(modules)))
    known = {module: name for name, module in model.named_modules()}
    names = {known[modules[block]]: block for block in expected}
    errors: dict[int, float] = {}
    with ExitStack() as stack:
        mode = AttentionWatch(reduce, names, errors, is_checked, most_weights)
        for name, module in model.named_modules():
            _follow(stack, module, name, mode.callers)
        stack.enter_context(mode)
        yield errors
    for name, block in names.items():
        if mode.counts[block] != 1:
            raise ValueError(
                f"{name} must attend exactly once per forward pass, got {mode.counts[block]} attention "
                "operations. Run the model once, not compiled, with attention from torch."
            )


@contextmanager
def features(model: nn.Module, reduce: Callable[[Site, Tensor], None], *, with_prefix: bool = False) -> Iterator[None]:
    """Hand the patch tokens of the residual stream at every site to ``reduce`` while the model runs once.

    The stream after a block's attention is the input of its ``norm2`` or of its ``mlp``, whichever runs first: the
    former where norms stand before, the latter where they stand after. Hooks are gone when the context ends.

    Args:
        model: In eval mode.
        reduce: Gets a site and its patch tokens (batch, token, dim), in the order of the forward pass.
        with_prefix: Class and register tokens too, in front of the patch tokens.

    Yields:
        Nothing.

    Raises:
        ValueError: If the model is in training mode; if a block has no state between attention and MLP; if a site was
            not passed exactly once. The sentence names the block.
    """
    if model.training:
        raise ValueError("Features must be captured in eval mode, got a model in training mode. Call model.eval().")
    first = 0 if with_prefix else num_prefix_tokens(model)
    counts: Counter[Site] = Counter()

    def take(site: Site, tokens: Any) -> None:
        if site.name == "attention" and counts[site]:
            return  # the later of norm2 and mlp
        counts[site] += 1
        tokens = (tokens[0] if isinstance(tokens, tuple) else tokens)[:, first:]
        if not tokens.isfinite().all():
            raise ValueError(
                f"Features at site {site.name!r} of block {site.block} must be finite, got NaN or infinity. "
                "Check the weights."
            )
        reduce(site, tokens)

    with ExitStack() as stack:
        embed, *after = sites(model)
        for index, block in enumerate(blocks(model)):
            places = [getattr(block, name) for name in ("norm2", "mlp") if hasattr(block, name)]
            if len(places) < 2:
                raise ValueError(
                    f"blocks.{index} must have 'norm2' and 'mlp' after its attention, got a {type(block).__name__} "
                    "without. Blocks that run attention and MLP side by side have no state in between."
                )
            if index == 0:
                _before(stack, block, embed, take)
            for place in places:
                _before(stack, place, after[2 * index], take)
            _after(stack, block, after[2 * index + 1], take)
        yield
    for site in sites(model):
        if counts[site] != 1:
            raise ValueError(
                f"Site {site.name!r} of block {site.block} must be passed exactly once per forward pass, got "
                f"{counts[site]} times. Run the model once within the context."
            )


def _follow(stack: ExitStack, module: nn.Module, name: str, callers: list[str]) -> None:
    """Keep the name of the running module on top of ``callers``."""
    before = module.register_forward_pre_hook(lambda *_: callers.append(name))
    stack.callback(before.remove)

    def leave(*_: Any) -> None:
        callers.pop()

    after = module.register_forward_hook(leave, always_call=True)
    stack.callback(after.remove)


def _before(stack: ExitStack, module: nn.Module, site: Site, take: Callable[[Site, Any], None]) -> None:
    """Take the first input of the module at this site."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        take(site, args[0])

    stack.callback(module.register_forward_pre_hook(hook).remove)


def _after(stack: ExitStack, module: nn.Module, site: Site, take: Callable[[Site, Any], None]) -> None:
    """Take the output of the module at this site."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        take(site, output)

    stack.callback(module.register_forward_hook(hook).remove)
