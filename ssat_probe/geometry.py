"""Where the patches of a model lie in its images."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def grid(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of patches.

    Args:
        model: Says so in ``grid`` or, as timm's Vision Transformers do, in ``patch_embed.grid_size``.

    Returns:
        Whole numbers; a model that does not say is a ValueError.
    """
    found = getattr(model, "grid", None) or getattr(getattr(model, "patch_embed", None), "grid_size", None)
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
            f"The model must say {what}, got a {type(model).__name__} with {found!r}. Set it on the model."
        )
    return int(found[0]), int(found[1])
