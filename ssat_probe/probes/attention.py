"""Entropy and kurtosis of the attention weights, per block and head."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ssat_probe.registry import known
from ssat_probe.table import Column, with_difference, with_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor, nn

    from ssat_probe.capture import Attention
    from ssat_probe.drawing import Series
    from ssat_probe.measures.bootstrap import ImageStatistics
    from ssat_probe.subject import Subject

_ENTROPY = Column("entropy_normalised", "", "entropy / log(number of valid keys): 0 one key, 1 uniform")
_KURTOSIS = Column("kurtosis", "", "excess kurtosis of a row (population moments), mean over defined rows, then images")

# Dots of single heads are drawn for at most this many lines; beyond, they hide the lines.
_MOST_LINES_WITH_DOTS = 4


@dataclass(frozen=True)
class Probe:
    """Entropy and kurtosis of the attention weights, per block and head."""

    queries: Literal["patch", "cls", "all"] = "patch"
    "Queries to average over: the patch tokens, the class token alone, or all tokens."
    keys: Literal["patch", "all"] = "patch"
    "Keys that a row spreads over: the patch tokens, renormalised, or all tokens, as the model uses them."
    blocks: tuple[int, ...] = ()
    "Blocks to measure, 0 next to the input; empty means every block."
    untrained_twin: bool = False
    "Also measure the untrained network of the same architecture and seed, as a reference."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("block", "", "transformer block, 0 next to the input"),
        Column("head", "", "attention head within the block; heads have no common order across models"),
        Column("entropy", "nat", "entropy of a row of attention weights, mean over queries, then images"),
        Column("entropy_sd", "nat", "standard deviation of the entropy over images"),
        *with_spread(_ENTROPY)[:2],
        *with_spread(_KURTOSIS)[:2],
        Column("kurtosis_median", "", "excess kurtosis, median over the defined rows of an image, mean over images"),
        Column("kurtosis_normalised", "", "kurtosis between its bounds for that number of keys: 0 lowest, 1 one-hot"),
        Column("kurtosis_normalised_sd", "", "standard deviation of the normalised kurtosis over images"),
        Column("skew", "", "skewness of a row, mean over defined rows: positive for spikes, negative for holes"),
        Column("undefined", "", "fraction of rows without kurtosis, because their weights are equal up to rounding"),
        Column("num_keys", "", "mean number of valid keys of a row"),
        Column("keys", "", "keys that a row spreads over: patch tokens (renormalised) or all"),
        Column("queries", "", "queries averaged over: patch tokens, class token or all"),
        Column("num_images", "", "number of images"),
        Column("self_check", "", "largest |captured weights @ values - output of the operation| on the first batch"),
        *with_spread(_ENTROPY)[2:],
        *with_spread(_KURTOSIS)[2:],
        *with_difference(_ENTROPY),
        *with_difference(_KURTOSIS),
    )

    def measure(self, subject: "Subject") -> "DataFrame":
        """One row per block and head.

        Args:
            subject: Its model is in eval mode and has ``blocks`` and ``num_prefix_tokens``.

        Returns:
            The columns of this probe.
        """
        return self._table(self._seen(subject), None)

    def between(self, subjects: "Iterator[tuple[str, Subject]]") -> "list[DataFrame]":
        """As `measure` for each subject, with differences to the first.

        Args:
            subjects: Labels and subjects.

        Returns:
            Their tables.
        """
        seen = [self._seen(subject) for _, subject in subjects]
        return [self._table(one, seen[0] if one is not seen[0] else None) for one in seen]

    def _seen(self, subject: "Subject") -> "_Seen":
        import torch

        from ssat_probe import capture
        from ssat_probe.measures.bootstrap import ImageStatistics

        model = subject.model
        chosen = _chosen(self.blocks, len(capture.blocks(model)))
        queries = _tokens(model, known(self.queries, ("patch", "cls", "all"), "queries"))
        keys = _tokens(model, known(self.keys, ("patch", "all"), "keys"))
        running = {block: ImageStatistics() for block in chosen}
        errors: dict[int, float] | None = None
        num_images = 0
        with torch.no_grad():
            for batch in subject.batches():

                def reduce(seen: "Attention", ids: "Tensor" = batch.ids) -> None:
                    running[seen.block].add(ids, _rows(seen, queries, keys))

                with capture.attention(model, reduce, only=chosen, is_checked=errors is None) as checked:
                    model(batch.images)
                errors = dict(checked) if errors is None else errors
                num_images += len(batch.images)
        return _Seen(running, errors or {}, num_images, getattr(subject, "fingerprint", ""))

    def _table(self, seen: "_Seen", first: "_Seen | None") -> "DataFrame":
        from pandas import DataFrame

        is_paired = first is not None and first.images == seen.images and first.running.keys() == seen.running.keys()
        rows = []
        for block, one in seen.running.items():
            pair = first.running[block] if first is not None and is_paired else None
            shared: dict[str, Any] = {
                "block": block,
                "keys": self.keys,
                "queries": self.queries,
                "num_images": seen.num_images,
            }
            shared |= {"self_check": seen.errors[block]} | one.differences(("entropy_normalised", "kurtosis"), pair)
            rows += [shared | {"head": head} | values for head, values in enumerate(_by_head(one))]
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


@dataclass(frozen=True)
class _Seen:
    """What one checkpoint gave."""

    running: "dict[int, ImageStatistics]"
    errors: dict[int, float]
    num_images: int
    images: str


def _by_head(one: "ImageStatistics") -> list[dict[str, float]]:
    """Per head, the mean of each quantity, and the spread of four of them."""
    spread = ("entropy", "entropy_normalised", "kurtosis", "kurtosis_normalised")
    plain = ("kurtosis_median", "skew", "undefined", "num_keys")
    result = []
    for head in range(len(one.mean("entropy"))):
        values = {name: float(one.mean(name)[head]) for name in plain}
        for name in spread:
            values |= one.spread(name, head)
        result.append(values)
    return result


def _rows(seen: "Attention", queries: slice, keys: slice) -> "dict[str, Tensor]":
    """Each measure per image and head: mean over the queries for which it is defined."""
    from ssat_probe.measures import attention as measures
    from ssat_probe.measures.statistics import median_of_defined

    is_valid = None
    if seen.is_valid is not None:
        is_valid = seen.is_valid.expand(*seen.is_valid.shape[:2], *seen.rows.shape[2:])[:, :, queries, keys]
    rows = seen.rows[:, :, queries, keys]
    if seen.has_scores:
        weights = measures.weights_from_scores(rows, is_valid)
        entropy = measures.entropy_from_scores(rows, is_valid)
    else:
        weights = measures.renormalised(rows, is_valid)
        entropy = measures.entropy(weights, is_valid)
    num_keys = measures.num_keys(weights, is_valid).expand(entropy.shape)
    kurtosis, skew = measures.excess_kurtosis_and_skewness(weights, is_valid)
    return {
        "entropy": entropy.nanmean(-1),
        "entropy_normalised": measures.normalised_entropy(entropy, num_keys).nanmean(-1),
        "kurtosis": kurtosis.nanmean(-1),
        "kurtosis_median": median_of_defined(kurtosis),
        "kurtosis_normalised": measures.normalised_kurtosis(kurtosis, num_keys).nanmean(-1),
        "skew": skew.nanmean(-1),
        "undefined": kurtosis.isnan().double().mean(-1),
        "num_keys": num_keys.double().mean(-1),
    }


def _tokens(model: "nn.Module", policy: str) -> slice:
    """Positions of the tokens of a policy."""
    from ssat_probe import capture

    if policy == "all":
        return slice(None)
    if policy == "patch":
        return slice(capture.num_prefix_tokens(model), None)
    if getattr(model, "cls_token", None) is None:
        raise ValueError(
            f"queries 'cls' needs a model with a class token, got a {type(model).__name__} without. "
            "Use queries 'patch' or 'all'."
        )
    return slice(0, 1)


def _chosen(blocks: Sequence[int], count: int) -> tuple[int, ...]:
    """The blocks to measure, each once, in the order of the model."""
    outside = [block for block in blocks if not 0 <= block < count]
    if outside:
        raise ValueError(f"blocks must lie between 0 and {count - 1} for this model, got {outside[0]}.")
    return tuple(sorted(set(blocks))) or tuple(range(count))


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
