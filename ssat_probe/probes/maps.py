"""Attention maps as images: single heads, their mean, and rollout."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.table import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.capture import Attention
    from ssat_probe.drawing import Series
    from ssat_probe.subject import Subject

# Sides of the pictures of the images in the table, in pixels at most.
_MOST_PIXELS = 64

# What a page can hold.
_MOST_ROWS, _MOST_HEADS = 8, 6


@dataclass(frozen=True)
class Probe:
    """Attention maps as images: single heads, their mean, and rollout."""

    images: tuple[int, ...] = (0, 1)
    "Which images, by their place in the sample."
    block: int = -1
    "Block whose heads are shown; negative ones count from the end."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("image", "", "place of the image in the sample"),
        Column("kind", "", "head, mean (of the heads), rollout (through all blocks), or red, green, blue of the image"),
        Column("block", "", "transformer block, 0 next to the input; the last one for rollout; -1 for colours"),
        Column("head", "", "attention head within the block; -1 for all and for colours"),
        Column("row", "", "of the grid of patches; of the scaled image for colours"),
        Column("column", "", "of the grid of patches; of the scaled image for colours"),
        Column("value", "", "attention x number of patches: 1 is uniform; colours from 0 to 1"),
        Column("query", "", "cls: of the class token; patches: mean over the patch tokens, where there is none"),
    )
    policy: ClassVar[str] = "queries cls, else patch; keys patch, renormalised"

    def measure(self, subject: "Subject") -> "DataFrame":
        """One row per image, map and patch.

        Args:
            subject: Its model is in eval mode and attends over the whole image in every block.

        Returns:
            The columns of this probe.

        Raises:
            ValueError: If an image or the block does not exist.
        """
        from pandas import concat

        from ssat_probe import capture, geometry

        count, depth = subject.num_images, len(capture.blocks(subject.model))
        for what, value, low, high in (
            *(("images", image, 0, count) for image in self.images),
            ("block", self.block, -depth, depth),
        ):
            if not low <= value < high:
                raise ValueError(f"{what} must lie between {low} and {high - 1}, got {value}; choose another.")
        parts = {}
        for batch in subject.batches():
            for place, image in enumerate(batch.ids.tolist()):
                if image in self.images:
                    seen = _Maps(subject.model, self.block % depth, geometry.grid(subject.model))
                    parts[image] = seen.table(image, batch.images[place][None], subject)
        return concat([parts[image] for image in dict.fromkeys(self.images)], ignore_index=True)

    def draw(self, table: "DataFrame") -> "Figure":
        """A row per line and image: the image, rollout, mean and the first heads, on one scale of colours.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            At most eight rows; of several seeds the first.
        """
        from matplotlib.colors import PowerNorm

        from ssat_probe import drawing

        drawn = drawing.series(table)
        images = list(table["image"].unique())[: max(1, _MOST_ROWS // len(drawn))]
        pairs = [(one, image) for image in images for one in drawn][:_MOST_ROWS]
        heads = [head for head in table["head"].unique() if head >= 0][:_MOST_HEADS]
        kinds = [("rollout", -1), ("mean", -1), *(("head", head) for head in heads)]
        maps = table[table["kind"].isin(["rollout", "mean", "head"])]
        norm = PowerNorm(0.5, 0, max(2.0, float(maps["value"].quantile(0.995))))
        width = drawing.PAGE_WIDTH
        with drawing.style():
            side = width / (len(kinds) + 1.6)
            figure, axes = drawing.panels(len(pairs), len(kinds) + 1, width=width, height=side * (len(pairs) + 0.25))
            for place, (one, image) in enumerate(pairs):
                first, *others = axes[place * (len(kinds) + 1) : (place + 1) * (len(kinds) + 1)]
                rows = one.table[one.table["checkpoint"] == one.table["checkpoint"].iloc[0]]
                rows = rows[rows["image"] == image]
                _picture(first, rows, one, image)
                for ax, (kind, head) in zip(others, kinds, strict=True):
                    shown = _map(ax, rows[(rows["kind"] == kind) & (rows["head"] == head)], norm)
                    ax.set_ylabel(f"head {head}" if kind == "head" else kind)
            bar = figure.colorbar(shown, ax=axes, shrink=min(1, 2.5 / len(pairs)), aspect=30, pad=0.01)
            bar.set_label("attention / uniform attention")
            query = {"cls": "class token", "patches": "mean over patch tokens"}
            blocks = ", ".join(map(str, sorted(maps.loc[maps["kind"] == "head", "block"].unique())))
            note = f"queries: {' or '.join(query[name] for name in table['query'].unique())}; heads of block {blocks}"
            drawing.legend_below(figure, note)
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """Where the maps peak.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            One row per checkpoint and image, at most three per checkpoint.
        """
        from pandas import DataFrame

        rows: list[dict[str, Any]] = []
        for checkpoint, one in table.groupby("checkpoint", sort=False):
            for image, maps in list(one.groupby("image", sort=False))[:3]:
                row: dict[str, Any] = {"checkpoint": checkpoint, "image": image}
                for kind in ("rollout", "mean"):
                    top = maps[maps["kind"] == kind].nlargest(1, "value").iloc[0]
                    row |= {f"{kind} peaks at": f"{top['row']}, {top['column']}", f"{kind} there": top["value"]}
                rows.append(row)
        return DataFrame(rows)


class _Maps:
    """Attention of one image: that of one block, and rollout through all."""

    def __init__(self, model: Any, block: int, grid: tuple[int, int]) -> None:
        from ssat_probe import capture

        self._model, self._block, self._grid = model, block, grid
        self._prefix = capture.num_prefix_tokens(model)
        self._rollout: Tensor | None = None
        self._weights: Tensor | None = None
        self._last = len(capture.blocks(model)) - 1

    def table(self, image: int, pixels: "Tensor", subject: "Subject") -> "DataFrame":
        """Rows of one image."""
        import torch
        from pandas import concat

        from ssat_probe import capture
        from ssat_probe.images import denormalise

        with torch.no_grad(), capture.attention(self._model, self._take):
            self._model(pixels)
        assert self._weights is not None
        assert self._rollout is not None
        query = "cls" if self._prefix else "patches"
        parts = [
            ("rollout", self._last, -1, self._of_query(self._rollout)),
            ("mean", self._block, -1, self._of_query(self._weights.mean(0))),
            *(("head", self._block, head, self._of_query(one)) for head, one in enumerate(self._weights)),
        ]
        colours = denormalise(pixels, subject.checkpoint.facts).clamp(0, 1)[0].double().cpu()
        factor = max(1, -(-max(colours.shape[1:]) // _MOST_PIXELS))
        colours = torch.nn.functional.avg_pool2d(colours, factor, ceil_mode=True).expand(3, -1, -1)
        parts += [(name, -1, -1, one) for name, one in zip(("red", "green", "blue"), colours, strict=True)]
        return concat([_long(image, *part, query) for part in parts], ignore_index=True)

    def _take(self, seen: "Attention") -> None:
        import torch

        from ssat_probe.measures.rollout import with_block

        size = self._prefix + self._grid[0] * self._grid[1]
        if tuple(seen.rows.shape[2:]) != (size, size):
            raise ValueError(
                "Attention maps need every block to attend from all tokens to all tokens of one grid, got "
                f"{seen.rows.shape[2]} queries and {seen.rows.shape[3]} keys in {seen.name}; use heads or histogram."
            )
        weights = (seen.rows.softmax(-1) if seen.has_scores else seen.rows).double()
        below = torch.eye(size, dtype=weights.dtype, device=weights.device)[None]
        self._rollout = with_block(below if self._rollout is None else self._rollout, weights)
        if seen.block == self._block:
            self._weights = weights[0]

    def _of_query(self, weights: "Tensor") -> "Tensor":
        """(query, key) to (row, column), renormalised over the patches, in units of uniform attention."""
        weights = weights.reshape(weights.shape[-2:])[:, self._prefix :]
        chosen = weights[0] if self._prefix else weights.mean(0)
        return (chosen / chosen.sum() * len(chosen)).reshape(self._grid).cpu()


def _long(image: int, kind: str, block: int, head: int, values: "Tensor", query: str) -> "DataFrame":
    import numpy as np
    from pandas import DataFrame

    rows, columns = np.indices(values.shape)
    place = {"image": image, "kind": kind, "block": block, "head": head, "row": rows.ravel(), "column": columns.ravel()}
    return DataFrame({**place, "value": values.numpy().ravel(), "query": query})


def _picture(ax: "Axes", rows: "DataFrame", one: "Series", image: int) -> None:
    """The image, framed in the colour of its line."""
    import numpy as np

    colours = [_square(rows[rows["kind"] == name]) for name in ("red", "green", "blue")]
    ax.imshow(np.stack(colours, -1), interpolation="nearest")
    ax.plot([], [], color=one.look.colour, linewidth=3, label=one.label)
    ax.set_ylabel(f"image {image}")
    _frame(ax, one.look.colour, 2.5)


def _map(ax: "Axes", rows: "DataFrame", norm: Any) -> "AxesImage":
    shown = ax.imshow(_square(rows), cmap="magma", norm=norm, interpolation="nearest")
    _frame(ax, "0.3", 0.4)
    return shown


def _frame(ax: "Axes", colour: str, width: float) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set(visible=True, color=colour, linewidth=width)


def _square(rows: "DataFrame") -> Any:
    return rows.pivot_table(index="row", columns="column", values="value").to_numpy()
