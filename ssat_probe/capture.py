"""What happened inside a forward pass: attention and features, by block, without touching the model.

    with capture.attention(model, reduce):
        model(images)

hands every block's attention to ``reduce``, one at a time, whichever kernel computed it; nothing is stored.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from ssat_probe import geometry
from ssat_probe.anatomy import (
    Block,
    Site,
    blocks,
    blocks_with,
    find_blocks,
    has_class_token,
    num_prefix_tokens,
    places_after_attention,
    sites,
)
from ssat_probe.placement import INSTEAD, Place, Tracker, output_grid
from ssat_probe.watch import Attention, AttentionWatch

__all__ = [
    "Attention",
    "Site",
    "attention",
    "blocks",
    "blocks_with",
    "features",
    "has_class_token",
    "num_prefix_tokens",
    "sites",
]


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
        most_weights: Weights handed over at a time, in chunks of images and, within a large image, of queries, which
            bounds the memory; 0 means a whole operation.

    Yields:
        Largest absolute error of that comparison by block, filled while the model runs. NaN where the product with
        the values could not be seen.

    Raises:
        ValueError: If the model is in training mode; if a block did not attend exactly once; if the comparison fails.
            The sentence names the block.
    """
    if model.training:
        raise ValueError("Attention must be captured in eval mode, got a model in training mode. Call model.eval().")
    found = find_blocks(model)
    expected = tuple(only) or tuple(range(len(found)))
    names = {found[block].name: block for block in expected}
    errors: dict[int, float] = {}
    with ExitStack() as stack:
        mode = AttentionWatch(reduce, names, errors, is_checked, most_weights)
        for name, module in model.named_modules():
            _follow(stack, module, name, mode.callers)
        _track(stack, model, found, mode.places.__setitem__)
        stack.enter_context(mode)
        yield errors
    for name, block in names.items():
        if mode.counts[block] != 1:
            raise ValueError(
                f"{name} must attend exactly once per forward pass, got {mode.counts[block]} attention operations"
                f"{_hint(mode, block)}. {INSTEAD}"
            )


def _hint(mode: AttentionWatch, block: int) -> str:
    """Why a block may not have attended once."""
    if mode.counts[block]:
        return "; the model ran more than once, or its blocks attend more than once, as those of TNT"
    if block in mode.others:
        return f"; its softmax has {len(mode.others[block])} axes {mode.others[block]}, not batch, head, query and key"
    return "; it mixes tokens without a softmax, or the model is compiled or did not run"


@contextmanager
def features(
    model: nn.Module, reduce: Callable[[Site, Tensor], None], *, with_prefix: bool = False
) -> Iterator[dict[Site, tuple[int, int]]]:
    """Hand the patch tokens of the residual stream at every site to ``reduce`` while the model runs once.

    The stream after a block's attention is the input of its second norm or of its MLP, whichever runs first: the
    former where norms stand before, the latter where they stand after. Hooks are gone when the context ends.

    Args:
        model: In eval mode.
        reduce: Gets a site and its patch tokens (batch, token, dim), in the order of the forward pass; maps of
            (batch, row, column, dim) are flattened.
        with_prefix: Class and register tokens too, in front of the patch tokens.

    Yields:
        Rows and columns of the patches by site, filled while the model runs; without sites whose grid nobody knows.

    Raises:
        ValueError: If the model is in training mode; if a block has no state between attention and MLP; if a site was
            not passed exactly once. The sentence names the block.
    """
    if model.training:
        raise ValueError("Features must be captured in eval mode, got a model in training mode. Call model.eval().")
    found = [block for block in find_blocks(model) if block.has_patches]
    by_place: dict[tuple[int, str], Site] = {(site.block, site.name): site for site in sites(model)}
    grids: dict[Site, tuple[int, int]] = {}
    counts: Counter[Site] = Counter()
    widths = {block.index: _widths(block.module) for block in found}
    widths[-1] = widths[found[0].index]
    stages = {block.stage for block in found}
    skipped = {stage: 0 if with_prefix else num_prefix_tokens(model, stage) for stage in stages}

    def take(site: Site, tokens: Any) -> None:
        if site.name == "attention" and counts[site]:
            return  # the later of second norm and MLP
        counts[site] += 1
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        if tokens.ndim == 4 and tokens.shape[-1] not in widths[site.block] and tokens.shape[1] in widths[site.block]:
            tokens = tokens.movedim(1, -1)  # as convolutions have it
        tokens = (tokens.flatten(1, 2) if tokens.ndim == 4 else tokens)[:, skipped[site.stage] :]
        if len(tokens) != (tracker.num_images or len(tokens)):
            raise ValueError(
                f"Features at site {site.name!r} of block {site.block} must have a row for each of the "
                f"{tracker.num_images} images, got {len(tokens)} rows. Blocks that run on parts of images, as those of "
                "MobileViT, have no features of an image."
            )
        if not (tokens.sum().isfinite() or tokens.isfinite().all()):  # the sum is quicker, and may overflow
            raise ValueError(
                f"Features at site {site.name!r} of block {site.block} must be finite, got NaN or infinity. "
                "Check the weights."
            )
        reduce(site, tokens)

    def note(block: int, place: Place | str) -> None:
        if isinstance(place, Place):
            known = {(-1, "embed"): place.grid, (block, "merge"): place.grid}
            known |= {(block, name): output_grid(place) for name in ("attention", "mlp")}
            for at in known.keys() & by_place.keys():
                grids.setdefault(by_place[at], known[at])

    with ExitStack() as stack:
        tracker = _track(stack, model, found, note)
        _before(stack, found[0].module, by_place[-1, "embed"], take)
        for block in found:
            after = places_after_attention(block.module)
            if len(after) < 2:
                raise ValueError(
                    f"{block.name} must have 'norm2' and 'mlp' after its attention, got a "
                    f"{type(block.module).__name__} without. Blocks that run attention and MLP side by side have no "
                    "state in between."
                )
            if (block.index, "merge") in by_place:
                _before(stack, block.module, by_place[block.index, "merge"], take)
            for module in after:
                _before(stack, module, by_place[block.index, "attention"], take)
            _after(stack, block.module, by_place[block.index, "mlp"], take)
        yield grids
    for site in by_place.values():
        if counts[site] != 1:
            raise ValueError(
                f"Site {site.name!r} of block {site.block} must be passed exactly once per forward pass, got "
                f"{counts[site]} times. Run the model once within the context."
            )


def _track(
    stack: ExitStack, model: nn.Module, found: Sequence[Block], note: Callable[[int, Place | str], None]
) -> Tracker:
    """Say of each block, just before it runs, where it stands, or why nobody knows."""
    tracker, prefix_of = Tracker(partial(geometry.grid, model)), cache(partial(num_prefix_tokens, model))
    stack.callback(model.register_forward_pre_hook(lambda _, args: tracker.see_images(args)).remove)
    for block in found:

        def hook(_: nn.Module, args: tuple[Any, ...], block: Block = block) -> None:
            try:
                prefix = prefix_of(block.stage)
                note(block.index, tracker.see_block(block.name, block.module, block.attention, args, prefix))
            except ValueError as error:
                note(block.index, str(error))

        stack.callback(block.module.register_forward_pre_hook(hook).remove)
    return tracker


def _widths(block: nn.Module) -> set[int]:
    """Channels of the residual stream of a block, as its norms have them."""
    norms = [norm for norm in block.children() if isinstance(norm, nn.LayerNorm | nn.BatchNorm2d)]
    return {norm.normalized_shape[-1] if isinstance(norm, nn.LayerNorm) else norm.num_features for norm in norms}


def _follow(stack: ExitStack, module: nn.Module, name: str, callers: list[str]) -> None:
    """Keep the name of the running module on top of ``callers``."""
    stack.callback(module.register_forward_pre_hook(lambda *_: callers.append(name)).remove)

    def leave(*_: Any) -> None:
        # Also called where another pre-hook failed before ours: then the module never got onto the stack.
        if name in callers:
            del callers[len(callers) - 1 - callers[::-1].index(name) :]

    stack.callback(module.register_forward_hook(leave, always_call=True).remove)


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
