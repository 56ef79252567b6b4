"""Where attention heads look: class-token sink, distance, collapse, diversity."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.table import Column, with_difference, with_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.capture import Attention
    from ssat_probe.subject import Subject

_SPREAD = (
    Column("mass_to_prefix", "", "attention of patch tokens to class and register tokens: the sink"),
    Column("effective_keys", "", "exp(entropy over the patches): number of keys a patch attends to"),
    Column("distance", "px", "attention distance between patches, weights renormalised over the patches"),
    Column("nmi", "", "normalised mutual information of query and key: 0 all queries alike (collapse), at most 1"),
    Column("divergence", "nat", "KL from the mean head; mean over heads: Jensen-Shannon; undefined for one head"),
)
_PAIRED = ("mass_to_prefix", "distance", "nmi", "divergence")


@dataclass(frozen=True)
class Probe:
    """Where attention heads look: class-token sink, distance, collapse, diversity."""

    untrained_twin: bool = False
    "Also measure the untrained network of the same architecture and seed, as a reference."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("block", "", "transformer block, 0 next to the input"),
        Column("head", "", "attention head within the block; heads have no common order across models"),
        *(column for one in _SPREAD for column in with_spread(one)),
        *(column for one in _SPREAD if one.name in _PAIRED for column in with_difference(one)),
        Column("mass_prefix_to_prefix", "", "attention of class and register tokens to themselves; undefined without"),
        Column("entropy_all", "nat", "entropy over all keys = the three parts below"),
        Column("entropy_groups", "nat", "part of the choice between prefix tokens and patches"),
        Column("entropy_prefix", "nat", "part of the choice among prefix tokens: 0 for a class token alone"),
        Column("entropy_patch", "nat", "part of the choice among patches"),
        Column("distance_normalised", "", "distance / distance of uniform attention"),
        Column("distance_uniform", "px", "distance of uniform attention"),
        Column("distance_probing_vits", "px", "distance without renormalisation (parity probing_vits)"),
        Column("information", "nat", "mutual information of query and key"),
        Column("key_entropy", "nat", "entropy of the mean row: how evenly keys are attended to"),
        Column("divergence_normalised", "", "divergence / largest Jensen-Shannon divergence; undefined for one head"),
        Column("kl", "nat", "KL from the other heads, mean; undefined for one head or disjoint heads"),
        Column("num_images", "", "number of images"),
    )

    def measure(self, subject: "Subject") -> "DataFrame":
        """One row per block and head; queries are patch tokens.

        Args:
            subject: Its model is in eval mode and has ``blocks``, ``num_prefix_tokens`` and a grid.

        Returns:
            The columns of this probe.
        """
        return self._table(_Seen(subject), None)

    def between(self, subjects: "Iterator[tuple[str, Subject]]") -> "list[DataFrame]":
        """As `measure` for each subject, with differences to the first.

        Args:
            subjects: Labels and subjects.

        Returns:
            Their tables.
        """
        seen = [_Seen(subject) for _, subject in subjects]
        return [self._table(one, seen[0] if one is not seen[0] else None) for one in seen]

    def _table(self, seen: "_Seen", first: "_Seen | None") -> "DataFrame":
        from pandas import DataFrame

        paired = first.statistics if first is not None and first.is_comparable(seen) else {}
        spread = [column.name for column in _SPREAD]
        plain = [column.name for column in self.columns if column.name in seen.names and column.name not in spread]
        rows = []
        for block, one in seen.statistics.items():
            differences = one.differences(_PAIRED, paired.get(block))
            means = {name: one.mean(name).tolist() for name in plain}
            for head in range(len(one.mean("nmi"))):
                row: dict[str, Any] = {"block": block, "head": head, "num_images": seen.num_images, **differences}
                row |= {name: values[head] for name, values in means.items()}
                for name in spread:
                    row |= one.spread(name, head)
                row["distance_normalised"] = row["distance"] / row["distance_uniform"]
                rows.append(row)
        return DataFrame(rows)[[column.name for column in self.columns]]

    def draw(self, table: "DataFrame") -> "Figure":
        """Six measures over the blocks: lines are means over heads.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            Six panels.
        """
        from matplotlib.ticker import MaxNLocator

        from ssat_probe import drawing

        titles = {
            "mass_to_prefix": ("mass on class token", "Sink"),
            "entropy_patch": ("entropy among patches [nat]", "Spatial part of the entropy"),
            "effective_keys": ("exp(entropy)", "Effective number of keys"),
            "distance": ("distance [px]", "Attention distance"),
            "nmi": ("NMI", "Dependence on the query"),
            "divergence_normalised": ("JSD / largest", "Diversity of heads"),
        }
        with drawing.style():
            figure, axes = drawing.panels(2, 3, height=4.4)
            for ax, (name, (label, title)) in zip(axes, titles.items(), strict=True):
                drawn = drawing.lines_with_band(ax, table, "block", name)
                ax.xaxis.set_major_locator(MaxNLocator(integer=True))
                if name in ("mass_to_prefix", "nmi", "divergence_normalised"):
                    drawing.keep_within(ax, 0, 1)
                drawing.label_axes(ax, "block", label, title)
            for distance in table["distance_uniform"].round(6).unique()[:3]:
                axes[3].axhline(distance, color="0.5", linewidth=1, label="uniform attention")
            drawing.legend_below(figure, drawing.band_note(drawn))
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """Mean over heads.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            One row per checkpoint and block.
        """
        names = ["mass_to_prefix", "effective_keys", "distance", "distance_normalised", "nmi", "divergence_normalised"]
        return table.groupby(["checkpoint", "block"], sort=False)[names].mean().reset_index()


class _Seen:
    """What one checkpoint gave, by block; entries are heads."""

    def __init__(self, subject: "Subject") -> None:
        import torch

        from ssat_probe import capture, geometry
        from ssat_probe.measures.bootstrap import ImageStatistics

        model = subject.model
        self._prefix = capture.num_prefix_tokens(model)
        self._distances = geometry.distances(geometry.grid(model), geometry.patch_size(model))
        self.statistics = {block: ImageStatistics() for block in range(len(capture.blocks(model)))}
        self.images = getattr(subject, "fingerprint", "")
        self.num_images = 0
        self.names: set[str] = set()
        with torch.no_grad():
            for batch in subject.batches():

                def reduce(seen: "Attention", ids: "Tensor" = batch.ids) -> None:
                    found = _measures(seen, self._prefix, self._distances)
                    self.names = set(found)
                    self.statistics[seen.block].add(ids, found)

                with capture.attention(model, reduce, is_checked=self.num_images == 0):
                    model(batch.images)
                self.num_images += len(batch.images)

    def is_comparable(self, other: "_Seen") -> bool:
        """Whether differences to another checkpoint are paired: the same images and as many blocks."""
        return self.images == other.images and self.statistics.keys() == other.statistics.keys()


def _measures(seen: "Attention", prefix: int, distances: "Tensor") -> "dict[str, Tensor]":
    """Each measure per image and head: mean over the patch queries."""
    import torch

    from ssat_probe.measures import heads as measures

    log_all = measures.log_weights(seen.rows, are_scores=seen.has_scores)
    patch_rows = seen.rows[:, :, prefix:, prefix:]
    log_patch = measures.log_weights(patch_rows, are_scores=seen.has_scores)
    parts = measures.entropy_parts(log_all[:, :, prefix:], prefix)
    own = log_all[:, :, :prefix, :prefix].double().exp().sum(-1).mean(-1)  # NaN without prefix tokens
    distance = measures.mean_distance(log_patch, distances)
    divergence = measures.divergence(log_patch)
    bound = measures.divergence_bound(divergence.shape[1], log_patch.shape[-1])
    rows = {
        "mass_to_prefix": parts["mass"],
        "effective_keys": torch.special.entr(log_patch.double().exp()).sum(-1).exp(),
        "distance": distance,
        "divergence": divergence,
        "entropy_all": parts["all"],
        "entropy_groups": parts["groups"],
        "entropy_prefix": parts["prefix"],
        "entropy_patch": parts["patch"],
        "distance_uniform": measures.uniform_distance(log_patch, distances),
        "distance_probing_vits": distance * (1 - parts["mass"]),
        "divergence_normalised": divergence / bound if bound else divergence,
        "kl": measures.mean_kl(log_patch),
    }
    per_head = measures.mutual_information(log_patch)
    return {name: values.nanmean(-1) for name, values in rows.items()} | per_head | {"mass_prefix_to_prefix": own}
