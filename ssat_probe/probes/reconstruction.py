"""Reconstruction as pictures: image, what is visible of it, and what the decoder makes of that."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.table import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.subject import Batch, Subject

# Sides of the pictures in the table, in pixels at most.
_MOST_PIXELS = 64

# What a page can hold.
_MOST_ROWS = 8

_GREY = 0.5
"Of hidden patches in the picture of what is visible."


@dataclass(frozen=True)
class Probe:
    """Reconstruction as pictures: image, what is visible of it, and what the decoder makes of that."""

    images: tuple[int, ...] = (0, 1, 2)
    "Which images, by their place in the sample; their masks depend on them alone."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("image", "", "place of the image in the sample"),
        Column("kind", "", "original, visible (hidden patches grey), or predicted (visible patches as they are)"),
        Column("channel", "", "0, 1, 2 for red, green, blue; 0 alone for grey images"),
        Column("row", "", "of the image, scaled down to 64 pixels at most"),
        Column("column", "", "of the image, scaled down to 64 pixels at most"),
        Column("value", "", "colour from 0 to 1; what lies outside is cut off"),
        Column("hidden", "", "share of the pixel that lies in hidden patches"),
    )

    def measure(self, subject: "Subject") -> "DataFrame":
        """One row per image, picture, channel and pixel.

        Args:
            subject: Without a decoder there is no prediction.

        Returns:
            The columns of this probe.

        Raises:
            ValueError: If an image does not exist.
        """
        from pandas import concat

        from ssat_probe.subject import Batch

        for image in self.images:
            if not 0 <= image < subject.num_images:
                raise ValueError(
                    f"images must lie between 0 and {subject.num_images - 1}, got {image}; choose another."
                )
        parts: dict[int, DataFrame] = {}
        for batch in subject.batches():
            for place, image in enumerate(batch.ids.tolist()):
                if image in self.images:
                    one = Batch(*(values[place][None] for values in (batch.images, batch.labels, batch.ids)))
                    parts[image] = _pictures(subject, one, image)
        return concat([parts[image] for image in dict.fromkeys(self.images)], ignore_index=True)

    def draw(self, table: "DataFrame") -> "Figure":
        """A row per line and image: the pictures side by side.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            At most eight rows, of checkpoints from the first to the last and of the first images, and a word on what is
            not drawn; of several seeds the first.
        """
        import numpy as np

        from ssat_probe import drawing

        everything, every_image = drawing.series(table), list(table["image"].unique())
        places = np.linspace(0, len(everything) - 1, min(len(everything), _MOST_ROWS)).round().astype(int)
        drawn = [everything[place] for place in places]
        images = every_image[: max(1, _MOST_ROWS // len(drawn))]
        pairs = [(one, image) for image in images for one in drawn]
        kinds = list(table["kind"].unique())
        side = min(1.5, drawing.PAGE_WIDTH / len(kinds))
        with drawing.style():
            size = {"width": side * len(kinds) + 0.4, "height": side * len(pairs)}
            figure, axes = drawing.panels(len(pairs), len(kinds), **size)
            for place, (one, image) in enumerate(pairs):
                rows = one.table[one.table["checkpoint"] == one.table["checkpoint"].iloc[0]]
                rows = rows[rows["image"] == image]
                for ax, kind in zip(axes[place * len(kinds) :], kinds, strict=False):
                    picture = rows[rows["kind"] == kind]
                    # Without a decoder there is none; the place stays as a picture of nothing.
                    ax.imshow(_square(picture) if len(picture) else [[[1.0] * 3]], interpolation="nearest")
                    ax.set_ylabel(kind if len(picture) else "no decoder")
                    _frame(ax)
                axes[place * len(kinds)].plot([], [], color=one.look.colour, linewidth=3, label=one.label)
                axes[place * len(kinds)].set_ylabel(f"image {image}")
                for spine in axes[place * len(kinds)].spines.values():
                    spine.set(color=one.look.colour, linewidth=2.5)
            note = "left to right: " + ", ".join(kinds)
            if len(pairs) < len(everything) * len(every_image):
                note += f"; {len(drawn)} of {len(everything)} lines, {len(images)} of {len(every_image)} images"
            drawing.legend_below(figure, note)
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """How far the predicted colours are from those that were hidden.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            One row per checkpoint.
        """
        from pandas import DataFrame

        rows: list[dict[str, Any]] = []
        places = ["image", "channel", "row", "column"]
        for checkpoint, one in table.groupby("checkpoint", sort=False):
            whole = one[one["hidden"] == 1]
            true, predicted = (
                whole[whole["kind"] == kind].set_index(places)["value"] for kind in ("original", "predicted")
            )
            error = float((true - predicted).abs().mean()) if len(predicted) else float("nan")
            rows.append({"checkpoint": checkpoint, "mean difference of colour in hidden pixels": error})
        return DataFrame(rows)


def _pictures(subject: "Subject", batch: "Batch", image: int) -> "DataFrame":
    """Rows of one image, which is alone in its batch."""
    import torch
    from pandas import concat

    from ssat_probe.images import denormalise
    from ssat_probe.losses import reconstructed
    from ssat_probe.patches import patchify, unpatchify

    recipe, mask = subject.checkpoint.recipe, subject.masks(batch)
    images, grid = batch.images, subject.model.grid
    whole = {"original": images, "visible": images}
    if subject.decoder is not None:
        with torch.no_grad():
            whole["predicted"] = reconstructed(subject.model, subject.decoder, images, mask, recipe.norm_pix)
    patch_size = tuple(size // count for size, count in zip(images.shape[2:], grid, strict=True))
    hidden = mask.to(images.device)[:, :, None].expand_as(patchify(images, patch_size))
    is_hidden = unpatchify(hidden.to(images.dtype), patch_size, grid)  # of each channel the same
    parts = []
    for kind, values in whole.items():
        colours = denormalise(values, subject.checkpoint.facts).clamp(0, 1)
        colours = torch.where(is_hidden > 0, torch.full_like(colours, _GREY), colours) if kind == "visible" else colours
        parts.append(_long(image, kind, _scaled(colours), _scaled(is_hidden)))
    return concat(parts, ignore_index=True)


def _scaled(values: "Tensor") -> "Tensor":
    """(1, channel, height, width) to (channel, row, column) of a picture."""
    import torch

    factor = max(1, -(-max(values.shape[2:]) // _MOST_PIXELS))
    return torch.nn.functional.avg_pool2d(values.double().cpu(), factor, ceil_mode=True)[0]


def _long(image: int, kind: str, colours: "Tensor", hidden: "Tensor") -> "DataFrame":
    import numpy as np
    from pandas import DataFrame

    channels, rows, columns = np.indices(colours.shape)
    place = {"image": image, "kind": kind, "channel": channels.ravel(), "row": rows.ravel(), "column": columns.ravel()}
    return DataFrame({**place, "value": colours.numpy().ravel(), "hidden": hidden.numpy().ravel()})


def _square(rows: "DataFrame") -> Any:
    """(row, column, colour) of a picture; grey in all three colours."""
    import numpy as np

    channels = [
        one.pivot_table(index="row", columns="column", values="value").to_numpy() for _, one in rows.groupby("channel")
    ]
    return np.stack(channels * (1 if len(channels) == 3 else 3), -1)


def _frame(ax: "Axes") -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set(visible=True, color="0.3", linewidth=0.4)
