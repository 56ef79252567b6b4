"""Entropy and kurtosis of the attention weights, per block and head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ssat_probe.paired import Paired
from ssat_probe.registry import known
from ssat_probe.table import Column, with_difference, with_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.capture import Attention
    from ssat_probe.drawing import Series
    from ssat_probe.geometry import Rows
    from ssat_probe.observation import Observation, Sum, Values
    from ssat_probe.subject import Subject

_MEASURES = (
    Column("entropy", "nat", "entropy of a row of attention weights, mean over queries, then images"),
    Column("entropy_normalised", "", "entropy / log(number of valid keys): 0 one key, 1 uniform"),
    Column("effective_keys", "", "exp(entropy), mean over queries: number of keys that a query attends to"),
    Column("kurtosis", "", "excess kurtosis of a row (population moments); undefined where all weights are equal"),
    Column("kurtosis_median", "", "its median over the rows of an image; undefined where all weights are equal"),
    Column("kurtosis_iqr", "", "its interquartile range over the rows of an image; undefined where they are equal"),
    Column("kurtosis_normalised", "", "kurtosis between its bounds for that number of keys: 0 lowest, 1 one-hot; "
        "undefined where all weights are equal"),
    Column("skew", "", "skewness of a row: positive for spikes, negative for holes; undefined where all are equal"),
    Column("kurtosis_scores", "", "excess kurtosis of a row before softmax; undefined if equal or unknown"),
    Column("kurtosis_map", "", "excess kurtosis over queries and keys together; undefined where all are equal"),
    Column("kurtosis_received", "", "excess kurtosis over the keys of the attention that they receive (parity "
        "thought_anchors); undefined where all are equal"),
)  # fmt: skip
_PAIRED = ("entropy", "entropy_normalised", "kurtosis", "kurtosis_normalised")

# Dots of single heads are drawn for at most this many lines; beyond, they hide the lines.
_MOST_LINES_WITH_DOTS = 4


@dataclass(frozen=True)
class Probe(Paired):
    """Entropy and kurtosis of the attention weights, per block and head."""

    queries: Literal["patch", "cls", "all"] = "patch"
    "Queries to average over: the patch tokens, the class token alone, or all tokens."
    keys: Literal["patch", "all"] = "patch"
    "Keys that a row spreads over: the patch tokens, renormalised, or all tokens, as the model uses them."
    blocks: tuple[int, ...] = ()
    "Blocks to measure, 0 next to the input; empty means every block."
    untrained_twin: bool = True
    "Also measure the untrained network of the same architecture and seed, as a reference; =false leaves it out."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("block", "", "transformer block, 0 next to the input"),
        Column("head", "", "attention head within the block; heads have no common order across models"),
        *(column for one in _MEASURES for column in with_spread(one)),
        Column("undefined", "", "fraction of rows without kurtosis, because their weights are equal up to rounding"),
        Column("num_keys", "", "mean number of valid keys of a row"),
        Column("keys", "", "keys that a row spreads over: patch tokens (renormalised) or all"),
        Column("queries", "", "queries averaged over: patch tokens, class token or all"),
        Column("num_images", "", "number of images"),
        Column("self_check", "", "largest |captured weights @ values - output of the operation| on the first batch"),
        *(column for one in _MEASURES if one.name in _PAIRED for column in with_difference(one)),
    )

    @property
    def policy(self) -> str:
        """Of what the measures are taken."""
        return f"queries {self.queries}, keys {self.keys}"

    def observe(self, subject: "Subject") -> "Observation":
        """Means over the images."""
        from ssat_probe import capture, geometry, observation

        known(self.queries, ("patch", "cls", "all"), "queries")
        known(self.keys, ("patch", "all"), "keys")
        blocks = _chosen(self.blocks, capture.blocks_with(subject.model, self.queries))

        def rows(seen: "Attention") -> "dict[str, Tensor | Sum]":
            return _rows(geometry.arranged(seen, self.queries, self.keys))

        return observation.of_attention(subject, rows, _finished, blocks)

    def tabulate(self, seen: "Observation", first: "Observation | None") -> "DataFrame":
        """One row per block and head."""
        from pandas import DataFrame

        shared = {"keys": self.keys, "queries": self.queries, "num_images": seen.num_images}
        rows: list[dict[str, Any]] = []
        for block, one in seen.statistics.items():
            same = {"block": block, "self_check": seen.errors[block], **shared}
            same |= one.differences(_PAIRED, first.statistics[block] if first else None)
            for head in range(len(one.mean("entropy"))):
                row = same | {"head": head, "num_keys": float(one.mean("num_keys")[head])}
                for measure in _MEASURES:
                    row |= one.spread(measure.name, head)
                rows.append(row | {"undefined": row["kurtosis_undefined"]})
        return DataFrame(rows)[[column.name for column in self.columns]]

    def draw(self, table: "DataFrame") -> "Figure":
        """Normalised entropy and kurtosis over the blocks: lines over heads and seeds, a dot per head.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            Two panels.
        """
        from matplotlib.ticker import MaxNLocator

        from ssat_probe import drawing

        column = {column.name: column for column in self.columns}
        with drawing.style():
            figure, (left, right) = drawing.panels(1, 2)
            left.axhline(1, color="0.5", linewidth=1, label="uniform attention")
            for ax, name in ((left, "entropy_normalised"), (right, "kurtosis")):
                drawn = drawing.lines_with_band(ax, table, "block", name)
                note = "; ".join(part for part in (drawing.band_note(drawn), _dots(ax, drawn, name)) if part)
                ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            drawing.keep_within(left, 0, 1)
            drawing.label_axes(left, column["block"], "entropy / log(number of keys)", "Attention entropy")
            drawing.label_axes(right, column["block"], "excess kurtosis", "Attention kurtosis")
            if table["kurtosis"].max() > 20:
                right.set_yscale("symlog", linthresh=1)
            drawing.legend_below(figure, note)
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """Mean over heads.

        Args:
            table: What `measure` gave, for one or more checkpoints.

        Returns:
            One row per checkpoint and block.
        """
        names = ["entropy", "entropy_normalised", "kurtosis", "kurtosis_normalised", "skew", "undefined"]
        return table.groupby(["checkpoint", "block"], sort=False)[names].mean().reset_index()


def _rows(seen: "Rows") -> "dict[str, Tensor | Sum]":
    """Sums over the keys per image, head and query of a chunk."""
    from ssat_probe.measures import attention as measures
    from ssat_probe.observation import Sum

    sums = measures.row_sums(seen.rows if seen.has_scores else seen.rows.log(), seen.is_valid)
    # Windows have keys of their own, so that neither a map of all queries and keys nor a sum per key is one thing.
    received = sums.pop("received").double() * (1.0 if seen.num_windows == 1 else float("nan"))
    if not seen.has_scores:
        sums["scores_second"] = sums["scores_second"] * float("nan")
    num_keys = measures.num_keys(seen.rows, seen.is_valid).expand(sums["total"].shape)
    return {**sums, "received": Sum(received), "num_keys": num_keys}


def _finished(values: "Values") -> "tuple[Values, Values]":
    """Per image and head: means over the queries, and what takes all of them together."""
    from ssat_probe.measures import attention as measures
    from ssat_probe.measures.statistics import quantiles_of_defined
    from ssat_probe.observation import over_queries

    received, num_keys = values["received"], values["num_keys"]
    of_rows = measures.measures_of_sums(values, num_keys)
    second, fourth = of_rows.pop("second"), of_rows.pop("fourth")
    of_rows["num_keys"] = num_keys.double()
    of_rows["entropy_normalised"] = measures.normalised_entropy(of_rows["entropy"], num_keys)
    of_rows["effective_keys"] = of_rows["entropy"].exp()
    of_rows["kurtosis_normalised"] = measures.normalised_kurtosis(of_rows["kurtosis"], num_keys)
    means, undefined = over_queries(of_rows)
    low, median, high = quantiles_of_defined(of_rows["kurtosis"], (0.25, 0.5, 0.75))
    is_defined = (~of_rows["kurtosis"].isnan()).any(-1) & received.isfinite().all(-1)
    over_map = fourth.mean(-1) / second.mean(-1).where(is_defined, float("nan")).square() - 3
    more = {"kurtosis_median": median, "kurtosis_iqr": high - low, "kurtosis_map": over_map}
    more |= {"kurtosis_received": measures.kurtosis_of(received / received.sum(-1, keepdim=True))}
    return {**means, **more}, {**undefined, "kurtosis_median": undefined["kurtosis"]}


def _chosen(blocks: Sequence[int], possible: Sequence[int]) -> tuple[int, ...]:
    """The blocks to measure, each once, in the order of the model."""
    outside = [block for block in blocks if block not in possible]
    if outside:
        raise ValueError(f"blocks must lie between {possible[0]} and {possible[-1]} for this model, got {outside[0]}.")
    return tuple(sorted(set(blocks))) or tuple(possible)


def _dots(ax: "Axes", drawn: "Sequence[Series]", name: str) -> str:
    """One dot per head, a little aside of its line; what they are, for the legend."""
    if len(drawn) > _MOST_LINES_WITH_DOTS:
        return ""
    for i, one in enumerate(drawn):
        aside = 0.14 * (i - (len(drawn) - 1) / 2)
        ax.scatter(
            one.table["block"] + aside, one.table[name], s=5, color=one.look.colour, alpha=0.5, linewidth=0, zorder=1.5
        )
    return "dots: single heads"
