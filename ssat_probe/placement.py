"""Where the queries and keys of an attention operation lie in the image: windows, padding, coarser keys, prefix."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

PATCH, PREFIX, PADDING = 0, 1, 2
"Kinds of tokens."

INSTEAD = (
    "Probe its features instead, with variance, tokens, spectrum or similarity; `describe --data` says which apply."
)
"What to do where attention has no places."

_QUERY_POOLS, _KEY_POOLS = ("pool_q", "conv_proj_q"), ("pool_k", "pool", "sr", "conv_proj_k")
"What attention does to the grid of its queries and keys: MViT, PVT v2 (both forms), CvT."


@dataclass(frozen=True)
class Place:
    """Where a block stands in a forward pass."""

    name: str
    "Of the block."
    module: nn.Module
    "The block."
    attention: nn.Module | None
    "Its attention."
    batch: int
    "Images in the batch."
    grid: tuple[int, int]
    "Rows and columns of patches that enter the block."
    stride: tuple[int, int]
    "Pixels of the image between neighbouring patches that enter the block."
    num_prefix: int
    "Tokens in front of the patches."
    layouts: "dict[tuple[int, int], Layout]" = field(default_factory=dict, compare=False, repr=False)
    "Laid out already, by numbers of queries and keys: the chunks of an operation share one."

    @property
    def windows(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Size and shift of the windows in which the block attends; None if it does not."""
        return _window(self.module)

    @property
    def has_axis_of_windows(self) -> bool:
        """Whether its attention gives windows an axis of their own, behind that of the images, as Twins does."""
        return getattr(self.attention, "ws", None) is not None


@dataclass(frozen=True, eq=False)
class Layout:
    """What every query and key of an operation is."""

    query_kinds: Tensor
    "(window, query): ``PATCH``, ``PREFIX`` or ``PADDING``."
    key_kinds: Tensor
    "(window, key)."
    query_places: Tensor
    "(window, query, 2): centres in pixels, row and column, from the first patch of the image; float64."
    key_places: Tensor
    "(window, key, 2)."
    query_regions: Tensor
    "(window, query): queries of one region share their keys; numbered over all windows."
    key_regions: Tensor
    "(window, key): a query attends to the keys of its own region alone."

    @cached_property
    def num_prefix(self) -> int:
        """Keys that are no patches, in front of those that are."""
        return int((self.key_kinds[0] == PREFIX).sum())

    @cached_property
    def num_regions(self) -> int:
        """Of the whole operation."""
        return int(self.query_regions.max()) + 1


def lay_out(place: Place, rows: int, queries: int, keys: int) -> Layout:
    """Layout of an operation in its block.

    Args:
        place: Where the block stands.
        rows: Length of the operation's first axis: images times windows.
        queries: Length of its query axis.
        keys: Length of its key axis.

    Returns:
        The layout.

    Raises:
        ValueError: If these numbers are not what the block's geometry says; then nobody knows which token is which.
    """
    windows = place.windows
    found = place.layouts.get((queries, keys))
    found = found or (_windowed(place, *windows) if windows else _whole(place, queries, keys))
    place.layouts[queries, keys] = found
    shape = (place.batch * len(found.query_kinds), found.query_kinds.shape[1], found.key_kinds.shape[1])
    if shape != (rows, queries, keys):
        raise ValueError(_misfit(place, (rows, queries, keys)))
    return found


def _misfit(place: Place, shape: tuple[int, int, int]) -> str:
    return (
        f"{place.name} must attend over the {place.grid[0]} x {place.grid[1]} patches of each image and "
        f"{place.num_prefix} tokens before them, or over windows of them as Swin does, got {shape[0]} x {shape[1]} "
        f"queries x {shape[2]} keys for {place.batch} images. Attention over channels or unknown windows has no "
        f"places in the image. {INSTEAD}"
    )


def _window(block: nn.Module) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Size and shift of windows: a block has both in timm's Swin and SwinV2, its attention a size in Twins."""
    size, shift = getattr(block, "window_size", None), getattr(block, "shift_size", None)
    if size is None and (groups := getattr(getattr(block, "attn", None), "ws", None)) is not None:
        size, shift = groups, 0  # Chu et al. (2021, Twins), Sec. 3.2: locally grouped, never shifted
    if size is None or shift is None:
        return None
    pairs = [(value, value) if isinstance(value, int) else (int(value[0]), int(value[1])) for value in (size, shift)]
    return pairs[0], pairs[1]


def _windowed(place: Place, size: tuple[int, int], shift: tuple[int, int]) -> Layout:
    """Windows of a map that is shifted and padded: kinds, places and regions of their slots."""
    # Queries attend within the regions into which Liu et al. (2021, Swin), Fig. 4, cut a shifted map. To the model,
    # padded slots are keys as others, where no border of a region keeps them apart; to a measure they are none.
    rows, columns = place.grid
    padded = tuple(-(-length // step) * step for length, step in zip(place.grid, size, strict=True))
    numbers = torch.arange(rows * columns).reshape(rows, columns)
    slots = torch.full(padded, -1)
    back = (-shift[0], -shift[1])
    if getattr(place.module, "pads_first", False):
        slots[:rows, :columns] = numbers
        slots = slots.roll(back, (0, 1))
    else:
        slots[:rows, :columns] = numbers.roll(back, (0, 1))
    regions = torch.zeros(padded, dtype=torch.long)
    if any(shift):
        bands = [_bands(length, step, move) for length, step, move in zip(padded, size, shift, strict=True)]
        regions = bands[0][:, None] * 3 + bands[1][None]
    slots, regions = (_partition(one, size) for one in (slots, regions))
    regions = (regions + 9 * torch.arange(len(regions))[:, None]).unique(return_inverse=True)[1]
    kinds = torch.where(slots < 0, PADDING, PATCH)
    places = torch.stack([slots // columns, slots % columns], -1).double() * torch.tensor(place.stride)
    return Layout(kinds, kinds, places, places, regions, regions)


def _bands(length: int, size: int, shift: int) -> Tensor:
    """Three bands of an axis: all but the last window, what of the last one is next to it, what came around."""
    positions = torch.arange(length)
    return (positions >= length - size).long() + (positions >= length - shift).long() * (shift > 0)


def _partition(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(row, column) to (window, slot), both in raster order."""
    rows, columns = (length // step for length, step in zip(values.shape, size, strict=True))
    return values.reshape(rows, size[0], columns, size[1]).transpose(1, 2).reshape(rows * columns, -1)


def _whole(place: Place, queries: int, keys: int) -> Layout:
    """All patches at once; queries or keys on a coarser grid where the block pools them."""
    attention = place.attention
    query_places, key_places = (_centres(place, _pools(attention, names)) for names in (_QUERY_POOLS, _KEY_POOLS))
    prefix = keys - len(key_places)
    if queries == prefix:  # class attention: the patches are keys alone
        query_places = query_places[:0]
    elif prefix not in (0, place.num_prefix):
        raise ValueError(_misfit(place, (place.batch, queries, keys)))
    nowhere = torch.full((max(prefix, 0), 2), torch.nan, dtype=torch.float64)
    places = [torch.cat([nowhere, one])[None] for one in (query_places, key_places)]
    kinds = [torch.where(one[..., 0].isnan(), PREFIX, PATCH) for one in places]
    return Layout(*kinds, *places, *(torch.zeros_like(one) for one in kinds))


def _pools(attention: nn.Module | None, names: tuple[str, ...]) -> list[Any]:
    """What an attention module does to its grid under some names; CvT's convolutions lie in a projection."""
    found = [getattr(attention, name, None) for name in names]
    return [getattr(pool, "conv", pool) for pool in found]


def _centres(place: Place, pools: list[Any]) -> Tensor:
    """(patch, 2): centres in pixels after what pools the grid, in raster order."""
    axes = []
    for axis in (0, 1):
        centres = torch.arange(place.grid[axis], dtype=torch.float64)
        for pool in pools:
            centres = _pooled(centres, pool, axis)
        axes.append(centres * place.stride[axis])
    return torch.cartesian_prod(*axes).reshape(-1, 2)


def _pooled(centres: Tensor, pool: Any, axis: int) -> Tensor:
    """Centres of the windows of a convolution or pooling along an axis."""

    def of(value: Any) -> int:
        return int(value[axis] if isinstance(value, tuple | list) else value)

    length = len(centres)
    if isinstance(pool, nn.AdaptiveAvgPool2d):
        count = of(pool.output_size)
        bounds = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
        return torch.stack([centres[start:stop].mean() for start, stop in bounds])
    if not isinstance(pool, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return centres
    kernel, stride, padding = of(pool.kernel_size), of(pool.stride), of(pool.padding)
    if (kernel, stride, padding) == (1, 1, 0):
        return centres
    count = (length + 2 * padding - kernel) // stride + 1
    step = float(centres[1] - centres[0]) if length > 1 else 1.0
    inner = torch.arange(count, dtype=torch.float64) * stride + (kernel - 1) / 2 - padding
    return centres[0] + step * inner


def output_grid(place: Place) -> tuple[int, int]:
    """Rows and columns of patches that leave the block.

    Args:
        place: Where the block stands.

    Returns:
        Those of its queries.
    """
    sides = []
    for axis, length in enumerate(place.grid):
        centres = torch.zeros(length)
        for pool in _pools(place.attention, _QUERY_POOLS):
            centres = _pooled(centres, pool, axis)
        sides.append(len(centres))
    return sides[0], sides[1]


class Tracker:
    """Follows the grid of patches through the blocks of one forward pass."""

    def __init__(self, grid_of: Callable[[tuple[int, int]], tuple[int, int]]) -> None:
        """Before the forward pass.

        Args:
            grid_of: Rows and columns of patches of a model that is not hierarchical, by height and width of its
                images; may raise a ValueError.
        """
        self._grid_of = grid_of
        self._image: tuple[int, int, int] | None = None
        self._last: Place | None = None

    @property
    def num_images(self) -> int | None:
        """Images of the forward pass; None if its input is none."""
        return self._image[0] if self._image else None

    def see_images(self, args: tuple[Any, ...]) -> None:
        """Take note of the model's input.

        Args:
            args: Of its forward.
        """
        images = args[0] if args else None
        self._last = None
        self._image = None
        if isinstance(images, Tensor) and images.ndim == 4:
            self._image = len(images), images.shape[2], images.shape[3]

    def see_block(
        self, name: str, block: nn.Module, attention: nn.Module | None, args: tuple[Any, ...], num_prefix: int
    ) -> Place:
        """Where a block stands that is about to run.

        Args:
            name: Of the block.
            block: The module.
            attention: Its attention.
            args: Of its forward.
            num_prefix: Tokens in front of the patches.

        Returns:
            Its place; blocks run in the order of the forward pass.

        Raises:
            ValueError: If the model does not say where its patches lie.
        """
        kind = type(attention).__name__
        if "XCA" in kind or "Channel" in kind:
            raise ValueError(
                f"{name} must attend over patches, got {kind}, which attends over channels: these have no places in "
                f"the image. {INSTEAD}"
            )
        if self._image is None:
            raise ValueError(
                f"{name} must run within a forward pass over images (batch, channel, height, width) for the places of "
                "its tokens, got another input. Call the model itself."
            )
        batch, *size = self._image
        grid = _grid_of_call(block, args) or self._grid_of((size[0], size[1]))
        if not _fits(args[0] if args else None, grid, num_prefix):
            raise ValueError(
                f"{name} must get the {grid[0]} x {grid[1]} patches of its model row by row, got tokens of shape "
                f"{tuple(args[0].shape)}: nobody knows which is which. {INSTEAD}"
            )
        before, stride = (size, (1, 1)) if self._last is None else (self._last.grid, self._last.stride)
        steps = [step * -(-old // new) for step, old, new in zip(stride, before, grid, strict=True)]
        self._last = Place(name, block, attention, batch, grid, (steps[0], steps[1]), num_prefix)
        return self._last


def _fits(tokens: Any, grid: tuple[int, int], num_prefix: int) -> bool:
    """Whether tokens may be the patches of a grid in raster order: not those of the blocks of NesT, say."""
    if not isinstance(tokens, Tensor) or tokens.ndim not in (3, 4):
        return True
    if tokens.ndim == 4:
        return tokens.shape[1:3] == grid
    return tokens.shape[1] - grid[0] * grid[1] in (0, num_prefix)


def _grid_of_call(block: nn.Module, args: tuple[Any, ...]) -> tuple[int, int] | None:
    """Grid that a block is told, or that shows in its input of (batch, row, column, channel)."""
    for value in args[1:]:
        if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(side, int) for side in value):
            return value[0], value[1]
    tokens = args[0] if args else None
    if isinstance(tokens, Tensor) and tokens.ndim == 4 and _window(block) is not None:
        return tokens.shape[1], tokens.shape[2]
    return None
