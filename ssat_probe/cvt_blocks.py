"""Parts of CvT (Wu et al., 2021): overlapping embeddings, and blocks whose attention projects by convolutions."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn

from ssat_probe.masked_convolution import Visible, keys_seen, shown


class Embedding(nn.Module):
    """Overlapping convolution, then a norm of each token."""

    def __init__(self, in_dim: int, dim: int, stride: tuple[int, int]) -> None:
        """Make it with fresh weights.

        Args:
            in_dim: Channels that come in.
            dim: Channels that go out.
            stride: In rows and columns; the kernel is 2 * stride - 1 wide, at least 3.
        """
        super().__init__()
        kernel = tuple(max(3, 2 * step - 1) for step in stride)
        padding = tuple(max(1, step // 2) for step in stride)
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, padding)  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(dim)

    def forward(self, maps: Tensor) -> Tensor:
        """A map with one column per stride.

        Args:
            maps: (batch, channel, row, column).

        Returns:
            (batch, channel, row, column).
        """
        return self.norm(self.proj(maps).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Attention with convolutional projections, then an MLP, each on a normed copy and added."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int | float, drop_path: float) -> None:
        """Make the block with fresh weights.

        Args:
            dim: Width.
            heads: Attention heads.
            mlp_ratio: Width of the hidden layer of the MLP in units of ``dim``.
            drop_path: Chance to skip a branch in training.
        """
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        tokens: Float[Tensor, "batch token dim"],
        grid: tuple[int, int],
        counts: bool,
        visible: Visible | None = None,
    ) -> Float[Tensor, "batch token dim"]:
        """Tokens after the block.

        Args:
            tokens: A class token in front if there is one more than the grid has places.
            grid: Rows and columns.
            counts: Batch norms take this pass into their running statistics.
            visible: Places that convolutions and queries look at; none for all.

        Returns:
            As many tokens.
        """
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), grid, counts, visible))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class Attention(nn.Module):
    """Self-attention whose queries, keys and values come from depth-wise convolutions; keys on every second place."""

    def __init__(self, dim: int, heads: int) -> None:
        """Make it with fresh weights.

        Args:
            dim: Width.
            heads: Attention heads.
        """
        super().__init__()
        self.num_heads = heads
        self.scale = dim**-0.5
        "Of the whole width, not of a head's: as in Microsoft's code, whose weights need it."
        self.conv_proj_q, self.conv_proj_k, self.conv_proj_v = (Projection(dim, stride) for stride in (1, 2, 2))
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        tokens: Float[Tensor, "batch token dim"],
        grid: tuple[int, int],
        counts: bool,
        visible: Visible | None = None,
    ) -> Float[Tensor, "batch token dim"]:
        """What each token takes from the keys.

        Args:
            tokens: A class token in front if there is one more than the grid has places.
            grid: Rows and columns.
            counts: Batch norms take this pass into their running statistics.
            visible: Places that convolutions and queries look at; none for all.

        Returns:
            As many tokens.
        """
        num_prefix = tokens.shape[1] - grid[0] * grid[1]
        class_token, maps = tokens[:, :num_prefix], shown(tokens[:, num_prefix:].mT.unflatten(2, grid), visible)
        heads = []
        for name in ("q", "k", "v"):
            projected = getattr(self, f"conv_proj_{name}")(maps, counts).flatten(2).mT
            projected = getattr(self, f"proj_{name}")(torch.cat([class_token, projected], dim=1))
            heads.append(projected.unflatten(2, (self.num_heads, -1)).transpose(1, 2))
        q, k, v = heads
        out = F.scaled_dot_product_attention(q, k, v, keys_seen(visible, num_prefix), scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))


class Projection(nn.Module):
    """Depth-wise 3x3 convolution and batch norm."""

    def __init__(self, dim: int, stride: int) -> None:
        """Make it with fresh weights.

        Args:
            dim: Channels.
            stride: 2 keeps every second row and column.
        """
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, 1, bias=False, groups=dim)
        self.bn = nn.BatchNorm2d(dim)

    def forward(
        self, maps: Float[Tensor, "batch channel in_row in_column"], counts: bool
    ) -> Float[Tensor, "batch channel row column"]:
        """The map after both.

        Args:
            maps: Tokens as a map.
            counts: Take this pass into the running statistics; in training its own statistics are used either way.

        Returns:
            Tokens as a map.
        """
        self.bn.track_running_stats = counts  # asked in training alone; there it uses the pass's own in any case
        return self.bn(self.conv(maps))


class Mlp(nn.Module):
    """Two linear maps around x · sigmoid(1.702 x), the quick GELU of Microsoft's code."""

    def __init__(self, dim: int, hidden: int) -> None:
        """Make it with fresh weights.

        Args:
            dim: Width.
            hidden: Width in between.
        """
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """Each token by itself.

        Args:
            tokens: Normed.

        Returns:
            As many tokens.
        """
        hidden = self.fc1(tokens)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))
