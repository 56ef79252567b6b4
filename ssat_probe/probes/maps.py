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
    from ssat_probe.geometry import Rows
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
    "Block whose heads are shown; negative ones count from the end. It may attend in windows or to coarser keys."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("image", "", "place of the image in the sample"),
        Column("kind", "", "head, mean (of the heads), rollout (through all blocks), or red, green, blue of the image"),
        Column("block", "", "transformer block, 0 next to the input; the last one for rollout; -1 for colours"),
        Column("head", "", "attention head within the block; -1 for all and for colours"),
        Column(
            "row", "", "of the grid of keys in the image, coarser where the block pools them; of the image for colours"
        ),
        Column("column", "", "likewise"),
        Column("value", "", "attention x number of these keys: 1 is uniform; colours from 0 to 1"),
        Column("query", "", "cls: of the class token; patches: mean over the patch tokens, where there is none"),
        Column("no_rollout", "", "why there is no rollout; empty where there is"),
    )
    policy: ClassVar[str] = "queries cls, else patch; keys patch, renormalised"

    def measure(self, subject: "Subject") -> "DataFrame":
        """One row per image, map and patch.

        Args:
            subject: Its model is in eval mode.

        Returns:
            The columns of this probe.

        Raises:
            ValueError: If an image or the block does not exist, or nobody knows where the block's keys lie.
        """
        from pandas import concat

        from ssat_probe import capture

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
                    seen = _Maps(subject.model, self.block % depth)
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
        maps = table[table["kind"].isin(["rollout", "mean", "head"])]
        kinds = [(kind, -1) for kind in ("rollout", "mean") if kind in set(maps["kind"])]
        kinds += [("head", head) for head in heads]
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
                    mine = rows[(rows["kind"] == kind) & (rows["head"] == head)]
                    if mine.empty:  # of a checkpoint that has it not, beside one that has
                        ax.set_axis_off()
                        continue
                    shown = _map(ax, mine, norm)
                    ax.set_ylabel(f"head {head}" if kind == "head" else kind)
            bar = figure.colorbar(shown, ax=axes, shrink=min(1, 2.5 / len(pairs)), aspect=30, pad=0.01)
            bar.set_label("attention / uniform attention")
            query = {"cls": "class token", "patches": "mean over patch tokens"}
            blocks = ", ".join(map(str, sorted(maps.loc[maps["kind"] == "head", "block"].unique())))
            note = f"queries: {' or '.join(query[name] for name in table['query'].unique())}; heads of block {blocks}"
            reasons = [reason for reason in table["no_rollout"].dropna().unique() if reason]
            drawing.legend_below(figure, note + "".join(f"; no rollout: {reason}" for reason in reasons[:1]))
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
                    if kind not in set(maps["kind"]):
                        row |= {f"{kind} peaks at": f"none: {maps['no_rollout'].iloc[0]}"}
                        continue
                    top = maps[maps["kind"] == kind].nlargest(1, "value").iloc[0]
                    row |= {f"{kind} peaks at": f"{top['row']}, {top['column']}", f"{kind} there": top["value"]}
                rows.append(row)
        return DataFrame(rows)


class _Maps:
    """Attention of one image: that of one block, and rollout through all where they attend as it asks for."""

    def __init__(self, model: Any, block: int) -> None:
        from ssat_probe import capture

        self._model, self._block = model, block
        of_class = capture.blocks_with(model, "cls") if capture.has_class_token(model) else ()
        self._of_class, self._last = block in of_class, len(capture.blocks(model)) - 1
        self._rollout: Tensor | None = None
        self._why_not = ""
        self._maps: Tensor | None = None
        self._num_prefix = 0

    def table(self, image: int, pixels: "Tensor", subject: "Subject") -> "DataFrame":
        """Rows of one image."""
        import torch
        from pandas import concat

        from ssat_probe import capture
        from ssat_probe.images import denormalise

        with torch.no_grad(), capture.attention(self._model, self._take):
            self._model(pixels)
        assert self._maps is not None
        parts = [
            ("mean", self._block, -1, _in_units_of_uniform(self._maps.mean(0))),
            *(("head", self._block, head, _in_units_of_uniform(one)) for head, one in enumerate(self._maps)),
        ]
        if self._rollout is not None and not self._why_not:
            rolled = self._rollout[0, :, self._num_prefix :]
            rolled = rolled[0] if self._of_class else rolled[self._num_prefix :].mean(0)
            parts.insert(0, ("rollout", self._last, -1, _in_units_of_uniform(rolled.reshape(self._maps.shape[1:]))))
        colours = denormalise(pixels, subject.checkpoint.facts).clamp(0, 1)[0].double().cpu()
        factor = max(1, -(-max(colours.shape[1:]) // _MOST_PIXELS))
        colours = torch.nn.functional.avg_pool2d(colours, factor, ceil_mode=True).expand(3, -1, -1)
        parts += [(name, -1, -1, one) for name, one in zip(("red", "green", "blue"), colours, strict=True)]
        query = "cls" if self._of_class else "patches"
        return concat([_long(image, *part, query) for part in parts], ignore_index=True).assign(
            no_rollout=self._why_not
        )

    def _take(self, seen: "Attention") -> None:
        import torch

        from ssat_probe import geometry
        from ssat_probe.measures.rollout import with_block

        if seen.block == self._block:
            rows = geometry.arranged(seen, "cls" if self._of_class else "patch", "all")
            self._maps, self._num_prefix = _over_the_image(rows), rows.num_prefix
        parts, _, queries, keys = seen.rows.shape
        size = queries if self._rollout is None else self._rollout.shape[-1]
        if (parts, queries, keys) != (1, size, size):
            where = f"{parts} windows of {queries} queries" if parts > 1 else f"{queries} queries"
            self._why_not = self._why_not or (
                "it needs every block to attend from all tokens to all tokens of one grid, and "
                f"{seen.name} has {where} and {keys} keys"
            )
        if not self._why_not:
            weights = (seen.rows.softmax(-1) if seen.has_scores else seen.rows).double()
            below = torch.eye(size, dtype=weights.dtype, device=weights.device)[None]
            self._rollout = with_block(below if self._rollout is None else self._rollout, weights)


def _over_the_image(rows: "Rows") -> "Tensor":
    """(head, row, column): attention that each key gets from all queries, keys of all windows where they lie."""
    import torch

    weights = (rows.rows.softmax(-1) if rows.has_scores else rows.rows).double()[0, :, :, rows.num_prefix :]
    places = rows.key_places[:, rows.num_prefix :].expand(*weights.shape[1:], 2)
    counts = torch.ones(weights.shape[1:], dtype=torch.bool, device=weights.device)
    if rows.is_valid is not None:  # padding lies nowhere
        counts = rows.is_valid.expand(*rows.rows.shape)[0, :, :, rows.num_prefix :].any(0)
    numbers, sides = torch.zeros_like(counts, dtype=torch.long), []
    for axis in (0, 1):
        known = places[..., axis][counts].unique()
        sides.append(len(known))
        numbers = numbers * len(known) + torch.searchsorted(known, places[..., axis].contiguous())
    found = weights.new_zeros(len(weights), sides[0] * sides[1])
    return found.index_add_(1, numbers[counts], weights[:, counts]).unflatten(1, sides)


def _in_units_of_uniform(weights: "Tensor") -> "Tensor":
    """Renormalised over the keys of the map, times their number."""
    return (weights / weights.sum() * weights.numel()).cpu()


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
