"""Where the patches of a model lie in its images, and what of an attention operation concerns them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssat_probe.placement import INSTEAD, PADDING, PATCH, PREFIX, Layout, lay_out
from ssat_probe.watch import Attention

Queries = Literal["patch", "cls", "prefix", "all"]
Keys = Literal["patch", "all"]


@dataclass(frozen=True)
class Rows:
    """Rows of attention, those of one image together whatever windows they were computed in."""

    block: int
    "Transformer block, 0 next to the input."
    rows: Tensor
    "(batch, head, query, key): as in `Attention`; keys that do not count are -inf, or weights of 0."
    has_scores: bool
    "True for scores before softmax, False for weights after it."
    is_valid: Tensor | None
    "True for keys that count for a query, broadcasts against (batch, head, query, key); None means all."
    num_prefix: int
    "Keys that are no patches, in front of those that are."
    regions: Tensor
    "(query,): queries of one region share their keys; 0 for all where there are no windows."
    num_regions: int
    "Of the whole operation."
    num_windows: int
    "Of an image."
    stride: tuple[int, int]
    "Pixels between neighbouring patches."
    query_places: Tensor
    "(query, 2): centres in pixels, NaN for tokens that are no patches; float64."
    window_places: Tensor
    "(window, key, 2): centres of the keys of each window."
    windows: Tensor
    "(query,): window of each query."

    @property
    def key_places(self) -> Float[Tensor, "#query key 2"]:
        """Centres of the keys of each query in pixels, NaN for tokens that are no patches; float64."""
        return self.window_places[self.windows] if self.num_windows > 1 else self.window_places

    @property
    def distances(self) -> Float[Tensor, "query key"]:
        """Distances between the centres of queries and keys in pixels, float64; NaN where one is no patch."""
        return (self.query_places[:, None] - self.key_places).norm(dim=-1).expand(self.rows.shape[2:])

    def distances_with(self, patch: int) -> Float[Tensor, "query key"]:
        """Distances as if patches were of another size.

        Args:
            patch: Height and width in pixels.

        Returns:
            As ``distances``.
        """
        scale = patch / torch.tensor(self.stride, dtype=torch.float64, device=self.rows.device)
        steps = (self.query_places[:, None] - self.key_places) * scale
        return steps.norm(dim=-1).expand(self.rows.shape[2:])

    def by_region(self, values: Float[Tensor, "batch head query value"]) -> Float[Tensor, "batch head region value"]:
        """Sums over the queries of each region.

        Args:
            values: Of each query.

        Returns:
            For all regions of the operation, 0 for those without a query among these.
        """
        sums = values.new_zeros(*values.shape[:2], self.num_regions, values.shape[3])
        return sums.index_add_(2, self.regions, values)


def arranged(seen: Attention, queries: Queries = "patch", keys: Keys = "patch") -> Rows:
    """Rows of some kinds of tokens, with the masks and places that the windows of the model imply.

    Args:
        seen: An operation or a chunk of its queries.
        queries: Patches; the class token; all tokens in front of the patches; or all tokens. Padding never.
        keys: Patches, or all tokens. Padding never counts as a key, nor does another region of a shifted window.

    Returns:
        The rows; perhaps none of this chunk.

    Raises:
        ValueError: If nobody knows where the tokens lie.
    """
    if isinstance(seen.place, str):
        raise ValueError(seen.place)
    layout = lay_out(seen.place, len(seen.rows), seen.num_queries, seen.rows.shape[3])
    chunk = seen.first_query, seen.first_query + seen.rows.shape[2]
    cut = _cut(layout, queries, keys, chunk, seen.rows.device)
    first_key, num_windows = layout.num_prefix if keys == "patch" else 0, len(layout.query_kinds)
    rows = _by_image(seen.rows, num_windows)[:, :, cut.wanted, first_key:]
    is_valid = cut.is_valid
    if seen.is_valid is not None:
        whole = seen.is_valid.expand(*seen.is_valid.shape[:2], *seen.rows.shape[2:])
        inner = _by_image(whole, num_windows)[:, :, cut.wanted, first_key:]
        is_valid = inner if is_valid is None else inner & is_valid
    if is_valid is not None:
        rows = rows.masked_fill(~is_valid, -torch.inf if seen.has_scores else 0)
    return Rows(
        seen.block, rows, seen.has_scores, is_valid, layout.num_prefix - first_key, cut.regions,
        layout.num_regions, num_windows, seen.place.stride, cut.query_places, cut.window_places, cut.windows,
    )  # fmt: skip


@dataclass(frozen=True)
class _Cut:
    """What a layout says of some kinds of tokens; the same for all images."""

    wanted: Tensor | slice
    is_valid: Tensor | None
    regions: Tensor
    query_places: Tensor
    window_places: Tensor
    windows: Tensor


@lru_cache(maxsize=2)  # of an operation, whose chunks of images are alike
def _cut(layout: Layout, queries: Queries, keys: Keys, chunk: tuple[int, int], device: torch.device) -> _Cut:
    some, first_key = slice(*chunk), layout.num_prefix if keys == "patch" else 0
    kinds = layout.query_kinds[:, some]
    wanted = _run(_wanted(layout.query_kinds, queries)[:, some].flatten())
    counts = None
    if layout.num_regions > 1 or (layout.key_kinds == PADDING).any():
        same = layout.query_regions[:, some, None] == layout.key_regions[:, None]
        counts = (same & (layout.key_kinds != PADDING)[:, None]).flatten(0, 1)[wanted][:, first_key:]
        counts = None if counts.all() else counts.to(device)[None, None]
    return _Cut(
        wanted, counts,
        layout.query_regions[:, some].flatten()[wanted].to(device),
        layout.query_places[:, some].flatten(0, 1)[wanted].to(device),
        layout.key_places[:, first_key:].to(device),
        torch.arange(len(kinds)).repeat_interleave(kinds.shape[1])[wanted].to(device),
    )  # fmt: skip


def _wanted(kinds: Tensor, queries: Queries) -> Tensor:
    """(window, query): which queries are of a kind."""
    if queries == "cls":
        return (kinds == PREFIX) & (torch.arange(kinds.shape[1]) == 0)
    return kinds != PADDING if queries == "all" else kinds == (PATCH if queries == "patch" else PREFIX)


def _run(wanted: Tensor) -> Tensor | slice:
    """As a slice, which copies nothing, if they follow one another."""
    places = wanted.nonzero()[:, 0].tolist()
    is_run = bool(places) and places[-1] - places[0] + 1 == len(places)
    return slice(places[0], places[-1] + 1) if is_run else wanted


def _by_image(rows: Tensor, num_windows: int) -> Tensor:
    """(image * window, head, query, key) to (image, head, window * query, key)."""
    if num_windows == 1:
        return rows
    rows = rows if len(rows) > 1 else rows.expand(num_windows, -1, -1, -1)
    return rows.unflatten(0, (-1, num_windows)).transpose(1, 2).flatten(2, 3)


def grid(model: nn.Module, img_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of patches.

    Args:
        model: Says so in ``grid`` or ``patch_embed``, as timm's models do, or in ``image_size`` and ``patch_size``, as
            torchvision's do.
        img_size: Height and width of the images shown, where they may differ from those that the model was made for.

    Returns:
        Whole numbers; a model that does not say is a ValueError.
    """
    embed = getattr(model, "patch_embed", None)
    if img_size is not None and getattr(model, "grid", None) is None and hasattr(embed, "dynamic_feat_size"):
        return _pair(embed.dynamic_feat_size(img_size), model, "its grid of patches")  # type: ignore[union-attr]
    found = getattr(model, "grid", None) or getattr(embed, "grid_size", None)
    side, patch = getattr(model, "image_size", None), getattr(model, "patch_size", None)
    if found is None and isinstance(side, int) and isinstance(patch, int):
        found = (side // patch, side // patch)
    return _pair(found, model, "its grid of patches in 'grid' or 'patch_embed.grid_size'")


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a patch.

    Args:
        model: Says so in ``patch_size`` or, as timm's Vision Transformers do, in ``patch_embed.patch_size``.

    Returns:
        Pixels; a model that does not say is a ValueError.
    """
    found = getattr(model, "patch_size", None) or getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return _pair(found, model, "the size of its patches in 'patch_size' or 'patch_embed.patch_size'")


def distances(grid: tuple[int, int], patch_size: tuple[int, int]) -> Float[Tensor, "query key"]:
    """Distances between the centres of all pairs of patches.

    Args:
        grid: Rows and columns of patches.
        patch_size: Height and width of a patch in pixels.

    Returns:
        Pixels of the model's input, float64; patches in raster order, 0 on the diagonal.

    Example:
        >>> distances((1, 3), (2, 2))[0]
        tensor([0., 2., 4.], dtype=torch.float64)
    """
    rows = torch.arange(grid[0], dtype=torch.float64) * patch_size[0]
    columns = torch.arange(grid[1], dtype=torch.float64) * patch_size[1]
    centres = torch.cartesian_prod(rows, columns).reshape(-1, 2)
    return (centres[:, None] - centres[None]).norm(dim=-1)


def _pair(found: object, model: nn.Module, what: str) -> tuple[int, int]:
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise ValueError(
            f"The model must say {what}, got a {type(model).__name__} with {found!r}. {INSTEAD} In Python, "
            "it can be set on the model."
        )
    return int(found[0]), int(found[1])
