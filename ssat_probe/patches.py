"""Images as tokens: patches, fixed positions, masks, and what an encoder hands to a decoder."""

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What an encoder makes of a batch of images; decoders and losses look at nothing else."""

    tokens: Float[Tensor, "batch token dim"]
    "Patch tokens after the final norm, in raster order; only the visible ones of a masked pass."
    class_token: Float[Tensor, "batch dim"] | None
    "Class token after the final norm."
    grid: tuple[int, int]
    "Rows and columns of the full grid of patches."
    visible_ids: Int[Tensor, "batch token"] | None
    "Raster index of each token; none where there is a token for every patch."
    hidden: Bool[Tensor, "batch token"] | None = None
    "True at the tokens of hidden patches, where these have tokens in a masked pass."

    @property
    def seen(self) -> Float[Tensor, "batch visible dim"]:
        """Tokens of the visible patches."""
        if self.hidden is None:
            return self.tokens
        return taken(self.tokens, visible_ids_of(self.hidden).to(self.tokens.device))

    @property
    def summary(self) -> Float[Tensor, "batch dim"]:
        """The image in one vector: the class token, or the mean of the visible patches where there is none."""
        return self.seen.mean(dim=1) if self.class_token is None else self.class_token

    @cached_property
    def hidden_ids(self) -> Int[Tensor, "batch hidden"]:
        """Raster index of each patch without a token, ascending."""
        ids = self.visible_ids
        if ids is None:
            return torch.empty(len(self.tokens), 0, dtype=torch.long, device=self.tokens.device)
        hidden = torch.ones(len(ids), self.grid[0] * self.grid[1], dtype=torch.int8, device=ids.device)
        ranked = hidden.scatter(1, ids, 0).argsort(dim=1, descending=True, stable=True)
        return ranked[:, : hidden.shape[1] - ids.shape[1]]


def patchify(
    images: Float[Tensor, "batch channel height width"], patch_size: tuple[int, ...]
) -> Float[Tensor, "batch token value"]:
    """Patches in raster order; within a patch pixels are outer and channels inner.

    Args:
        images: Height and width are multiples of the patch's.
        patch_size: Height and width of a patch in pixels.

    Returns:
        One row of ``height * width * channel`` values per patch.

    References:
        He et al. (2022), https://arxiv.org/abs/2111.06377: the layout of its targets.
    """
    height, width = patch_size
    return rearrange(images, "b c (row p) (column q) -> b (row column) (p q c)", p=height, q=width)


def unpatchify(
    patches: Float[Tensor, "batch token value"], patch_size: tuple[int, ...], grid: tuple[int, int]
) -> Float[Tensor, "batch channel height width"]:
    """Inverse of ``patchify``.

    Args:
        patches: In raster order.
        patch_size: Height and width of a patch in pixels.
        grid: Rows and columns of patches.

    Returns:
        The images.
    """
    (p, q), (rows, columns) = patch_size, grid
    return rearrange(patches, "b (row column) (p q c) -> b c (row p) (column q)", p=p, q=q, row=rows, column=columns)


def grid_of(img_size: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of patches of an image.

    Args:
        img_size: Height and width in pixels.
        patch_size: Height and width of a patch in pixels.

    Returns:
        The grid.

    Raises:
        ValueError: If the patch does not divide the image.
    """
    if any(size % patch for size, patch in zip(img_size, patch_size, strict=True)):
        raise ValueError(
            f"patch_size must divide the image of {img_size[0]}x{img_size[1]} pixels, "
            f"got {patch_size[0]}x{patch_size[1]}; choose another patch_size or img_size."
        )
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]


def num_masked(num_tokens: int, mask_ratio: float) -> int:
    """Number of hidden patches, ``round(num_tokens * mask_ratio)``: exact, where truncation is a float trap.

    Args:
        num_tokens: Patches of the image.
        mask_ratio: Share to hide, in (0, 1).

    Returns:
        Between 1 and ``num_tokens - 1``.

    Raises:
        ValueError: If no patch would stay visible, or none would be hidden.
    """
    masked = round(num_tokens * mask_ratio)
    if not 1 <= masked <= num_tokens - 1:
        state = "visible" if masked else "masked"
        between = f"one between {1 / num_tokens:.3g} and {1 - 1 / num_tokens:.3g} or " if num_tokens > 1 else ""
        raise ValueError(
            f"mask_ratio must leave at least one visible and one masked token of {num_tokens}, "
            f"got {mask_ratio}, which leaves no {state} one; choose {between}a smaller patch_size."
        )
    return masked


def random_mask(noise: Float[Tensor, "batch token"], mask_ratio: float) -> Bool[Tensor, "batch token"]:
    """Mask of each image: True where the patch is hidden; the same count in every row.

    Args:
        noise: Uniform numbers; the patches with the largest ones are hidden.
        mask_ratio: Share to hide, in (0, 1).

    Returns:
        True at hidden patches.
    """
    ranks = noise.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks >= noise.shape[1] - num_masked(noise.shape[1], mask_ratio)


def visible_ids_of(mask: Bool[Tensor, "batch token"]) -> Int[Tensor, "batch visible"]:
    """Raster indices of the visible patches of each image, ascending.

    Args:
        mask: True at hidden patches; the same count in every row.

    Returns:
        One row of indices per image.
    """
    num_visible = int((~mask[0]).sum())
    return mask.int().argsort(dim=1, stable=True)[:, :num_visible]


def taken(
    rows: Float[Tensor, "batch token dim"], ids: Int[Tensor, "batch chosen"]
) -> Float[Tensor, "batch chosen dim"]:
    """Some rows of each image, as `torch.gather` would take them number by number.

    Args:
        rows: Of all tokens.
        ids: Which are wanted of each image.

    Returns:
        Those, in this order.
    """
    first = torch.arange(len(rows), device=ids.device)[:, None] * rows.shape[1]
    return rows.flatten(0, 1).index_select(0, (ids + first).flatten()).unflatten(0, ids.shape)


def sincos_positions(dim: int, grid: tuple[int, int], with_class_token: bool) -> Float[Tensor, "token dim"]:
    """Fixed two-dimensional sine-cosine position embeddings, the column before the row.

    The first half of the channels encodes the column and the second half the row; each half holds the sines and
    then the cosines of ``position / 10000^(k / (dim / 4))``. The class token's embedding is zero.

    Args:
        dim: Width of the embedding, a multiple of 4.
        grid: Rows and columns.
        with_class_token: Put a row of zeros in front.

    Returns:
        One row per token, in raster order, float32 (computed in float64).

    Raises:
        ValueError: If ``dim`` is not a multiple of 4.

    References:
        Vaswani et al. (2017), Sec. 3.5; He et al. (2022), whose layout this is.
    """
    if dim % 4:
        raise ValueError(
            f"The width of sine-cosine positions must be a multiple of 4, got {dim}; choose another width."
        )
    rate = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    halves = []
    for position in (column, row):
        angle = position.reshape(-1, 1) * rate
        halves += [angle.sin(), angle.cos()]
    table = torch.cat(halves, dim=1).float()
    return torch.cat([torch.zeros(1, dim), table]) if with_class_token else table
