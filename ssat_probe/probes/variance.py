"""Variance of the feature maps over the depth of the network."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ssat_probe.table import Column

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.capture import Site
    from ssat_probe.subject import Subject

# Variances that span more than this factor are drawn on a logarithmic axis.
_WIDE_RANGE = 30


@dataclass(frozen=True)
class Probe:
    """Variance of the feature maps over the depth of the network."""

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("index", "", "place in the residual stream: 0 for embed, then two per block"),
        Column("block", "", "transformer block, 0 next to the input; -1 for embed"),
        Column("site", "", "embed, or after the attention or the mlp of a block"),
        Column("depth", "", "index / (number of sites - 1): 0 at the input, 1 at the end"),
        Column("variance", "activation²", "variance over the positions of an image, mean over channels and images"),
        Column("variance_sd", "activation²", "standard deviation of the variance over images"),
        Column("relative_variance", "", "share of the feature energy that differs over positions: 0 all equal, 1 all"),
        Column("relative_variance_sd", "", "standard deviation of the relative variance over images"),
        Column("gain", "log2", "log2(variance / variance at the site before); undefined at embed"),
        Column("num_images", "", "number of images"),
    )

    def measure(self, subject: "Subject") -> "DataFrame":
        """One row per site.

        Args:
            subject: Its model is in eval mode and has ``blocks`` and ``num_prefix_tokens``.

        Returns:
            The columns of this probe.
        """
        import torch
        from pandas import DataFrame

        from ssat_probe import capture
        from ssat_probe.measures.features import feature_map_variance, gain, relative_variance
        from ssat_probe.measures.statistics import StreamingMean

        sites = capture.sites(subject.model)
        variance = {site: StreamingMean() for site in sites}
        relative = {site: StreamingMean() for site in sites}

        def reduce(site: "Site", tokens: "Tensor") -> None:
            variance[site].add(feature_map_variance(tokens))
            relative[site].add(relative_variance(tokens))

        num_images = 0
        with torch.no_grad():
            for batch in subject.batches():
                with capture.features(subject.model, reduce):
                    subject.model(batch.images)
                num_images += len(batch.images)
        means = torch.stack([variance[site].mean for site in sites])
        table = DataFrame(
            {
                "index": [site.index for site in sites],
                "block": [site.block for site in sites],
                "site": [site.name for site in sites],
                "depth": [site.index / (len(sites) - 1) for site in sites],
                "variance": means.numpy(),
                "variance_sd": [float(variance[site].sd) for site in sites],
                "relative_variance": [float(relative[site].mean) for site in sites],
                "relative_variance_sd": [float(relative[site].sd) for site in sites],
                "gain": [float("nan"), *gain(means[:-1], means[1:]).tolist()],
                "num_images": num_images,
            }
        )
        return table[[column.name for column in self.columns]]

    def draw(self, table: "DataFrame") -> "Figure":
        """Variance and relative variance over normalised depth; grey where attention acts.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            Two panels.
        """
        from ssat_probe import drawing

        column = {column.name: column for column in self.columns}
        lasts = table.groupby("checkpoint")["index"].max()
        with drawing.style():
            figure, axes = drawing.panels(1, 2)
            for ax, name in zip(axes, ("variance", "relative_variance"), strict=True):
                if lasts.nunique() == 1:
                    last = int(lasts.iloc[0])
                    spans = [(step / last, (step + 1) / last) for step in range(0, last, 2)]
                    drawing.shade(ax, spans, "attention step")
                drawn = drawing.lines_with_band(ax, table, "depth", name)
                if table[name].max() > _WIDE_RANGE * table[name].min() > 0:
                    ax.set_yscale("log")
                ax.margins(x=0.02)
            drawing.keep_within(axes[1], 0, 1)
            label = f"variance [{column['variance'].unit}]"
            drawing.label_axes(axes[0], "normalised depth", label, "Feature-map variance")
            drawing.label_axes(axes[1], "normalised depth", "share of energy over positions", "Scale-free form")
            drawing.legend_below(figure, drawing.band_note(drawn))
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """First and last variance, and what attention and MLP do to it on average.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            One row per checkpoint.
        """
        from pandas import DataFrame

        rows = []
        for checkpoint, one in table.groupby("checkpoint", sort=False):
            one = one.sort_values("index")
            gains = one.groupby("site")["gain"].mean()
            rows.append(
                {
                    "checkpoint": checkpoint,
                    "variance at embed": one["variance"].iloc[0],
                    "variance at the end": one["variance"].iloc[-1],
                    "relative at embed": one["relative_variance"].iloc[0],
                    "relative at the end": one["relative_variance"].iloc[-1],
                    "gain per attention": gains["attention"],
                    "gain per mlp": gains["mlp"],
                }
            )
        return DataFrame(rows)
