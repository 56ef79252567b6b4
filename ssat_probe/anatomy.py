"""Parts of a model: its transformer blocks and stages, its tokens, the sites of its residual stream."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

ATTENTION_NAMES = ("attn", "self_attention", "attention", "self_attn")
"What the attention of a block is called: timm; torchvision; Hugging Face; torch."

MLP_NAMES = ("mlp", "ffn", "feed_forward")

CLASS_TOKEN_NAMES = ("cls_token", "class_token", "cls_token_0")
"timm; torchvision; the first of the two branches of CrossViT."

SECOND_NORM_NAMES = ("norm2", "ln_2", "layernorm_after")


@dataclass(frozen=True)
class Block:
    """A transformer block of a model."""

    index: int
    "0 next to the input."
    name: str
    "Of the module within the model, such as ``layers.1.blocks.0``."
    module: nn.Module
    stage: int
    "0 next to the input; blocks of one stage lie in one container and share their grid."

    @property
    def attention(self) -> nn.Module | None:
        """The module that attends, where it bears a usual name."""
        return _child(self.module, ATTENTION_NAMES)

    @property
    def has_patches(self) -> bool:
        """Whether patches attend here; in class attention (Touvron et al., 2021, CaiT) the class token alone does."""
        return "ClassAtt" not in type(self.attention).__name__

    @property
    def pools(self) -> bool:
        """Whether the block itself goes to a coarser grid, as those of Fan et al. (2021, MViT) do."""
        return getattr(self.attention, "pool_q", None) is not None


@dataclass(frozen=True)
class Site:
    """A place in the residual stream."""

    index: int
    "0 for ``embed``, then in the order of the forward pass."
    block: int
    "Transformer block, 0 next to the input; -1 for ``embed``, and the block that follows for ``merge``."
    name: Literal["embed", "merge", "attention", "mlp"]
    "Before the first block, before the first block of a later stage, after the attention of a block, after its MLP."
    stage: int = 0
    "0 next to the input."


def find_blocks(model: nn.Module) -> list[Block]:
    """Transformer blocks of a model, first to last: modules with an attention and an MLP of usual names.

    Args:
        model: Of timm, torchvision or ours; or one that has its blocks in ``model.blocks``, whatever they hold.

    Returns:
        At least one.

    Raises:
        ValueError: If there are none.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_block = _child(module, ATTENTION_NAMES) is not None and _child(module, MLP_NAMES) is not None
        if is_block and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    listed = getattr(model, "blocks", None)
    if not found and isinstance(listed, nn.Sequential | nn.ModuleList):
        found = {f"blocks.{name}": module for name, module in listed.named_children()}
    if not found:
        raise ValueError(
            f"The model must have transformer blocks: modules with attention ({', '.join(ATTENTION_NAMES)}) and MLP "
            f"({', '.join(MLP_NAMES)}), or a list in 'blocks'; got a {type(model).__name__} without. "
            "Probe a Vision Transformer."
        )
    stages = list(dict.fromkeys(name.rpartition(".")[0] for name in found))
    return [
        Block(index, name, module, stages.index(name.rpartition(".")[0]))
        for index, (name, module) in enumerate(found.items())
    ]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Modules of the transformer blocks, first to last.

    Args:
        model: As for `find_blocks`.

    Returns:
        At least one; a model without is a ValueError.
    """
    return [block.module for block in find_blocks(model)]


def blocks_with(model: nn.Module, queries: str) -> tuple[int, ...]:
    """Blocks that have queries of a kind.

    Args:
        model: As for `find_blocks`.
        queries: ``patch``, ``cls`` or ``all``.

    Returns:
        Numbers of blocks.

    Raises:
        ValueError: If no block has such queries.
    """
    found = find_blocks(model)
    by_class_attention = any(not block.has_patches for block in found)
    if queries == "cls" and by_class_attention:
        return tuple(block.index for block in found if not block.has_patches)
    if queries == "cls" and not has_class_token(model):
        raise ValueError(
            f"queries 'cls' needs a model with a class token, got a {type(model).__name__} without. "
            "Use queries 'patch' or 'all'."
        )
    if queries == "cls":
        return tuple(block.index for block in found if num_prefix_tokens(model, block.stage))
    return tuple(block.index for block in found if block.has_patches or queries == "all")


def has_class_token(model: nn.Module) -> bool:
    """Whether a class token runs through the blocks or is made at the end.

    Args:
        model: Of timm or torchvision, or ours.

    Returns:
        True if so.
    """
    holders = [model, *(child for name, child in model.named_children() if name.startswith("stage"))]
    return any(getattr(holder, name, None) is not None for holder in holders for name in CLASS_TOKEN_NAMES)


def num_prefix_tokens(model: nn.Module, stage: int = 0) -> int:
    """Number of tokens in front of the patch tokens in the blocks: class, distillation and register tokens.

    Args:
        model: Says so in ``num_prefix_tokens``, as timm's Vision Transformers do, or stage by stage, as CvT, in whose
            last one a class token joins; or has or lacks a class token as torchvision's and as hierarchical models.
        stage: 0 next to the input.

    Returns:
        0 or more; 0 where the class token joins in class attention alone.

    Raises:
        ValueError: If the model does not say.
    """
    count = getattr(model, "num_prefix_tokens", None)
    if isinstance(count, tuple):
        return int(count[stage])
    if not isinstance(count, int):
        if not any(hasattr(model, name) for name in CLASS_TOKEN_NAMES) and not _is_hierarchical(model):
            raise ValueError(
                f"The model must say in 'num_prefix_tokens' how many tokens precede the patches, got a "
                f"{type(model).__name__} with {count!r}. Set it on the model."
            )
        count = int(has_class_token(model))
    return 0 if count and any(not block.has_patches for block in _blocks_if_any(model)) else count


def sites(model: nn.Module) -> list[Site]:
    """All sites of the residual stream of the patches, in the order of the forward pass.

    Args:
        model: As for `find_blocks`.

    Returns:
        ``embed``, two per block whose patches attend, and a ``merge`` before each later stage unless its first block
        goes to the coarser grid itself.
    """
    found = [Site(0, -1, "embed")]
    stage = 0
    for block in find_blocks(model):
        if not block.has_patches:
            continue
        if block.stage != stage and not block.pools:
            found.append(Site(len(found), block.index, "merge", block.stage))
        stage = block.stage
        found.append(Site(len(found), block.index, "attention", stage))
        found.append(Site(len(found), block.index, "mlp", stage))
    return found


def places_after_attention(block: nn.Module) -> list[nn.Module]:
    """Modules of a block of which the first to run gets the residual stream after the attention.

    Args:
        block: A transformer block.

    Returns:
        Its second norm and its MLP; fewer than two where these are not there.
    """
    names = (SECOND_NORM_NAMES, MLP_NAMES)
    return [place for place in (_child(block, usual) for usual in names) if place is not None]


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    # Asked of every module in every pass: named_children() takes twenty times as long.
    children = module._modules
    return next((children[name] for name in names if children.get(name) is not None), None)


def _blocks_if_any(model: nn.Module) -> list[Block]:
    try:
        return find_blocks(model)
    except ValueError:
        return []


def _is_hierarchical(model: nn.Module) -> bool:
    """Whether the model has windows, several stages or, as Hiera, strided queries: no token precedes the patches."""
    found = _blocks_if_any(model)
    has_windows = bool(found) and (hasattr(found[0].module, "window_size") or hasattr(found[0].attention, "q_stride"))
    return has_windows or (bool(found) and found[-1].stage > 0)
