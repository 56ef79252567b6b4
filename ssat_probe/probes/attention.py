"""Entropy and kurtosis of the attention weights, per block and head."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ssat_probe.registry import known
from ssat_probe.table import Column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor, nn

    from ssat_probe.capture import Attention
    from ssat_probe.drawing import Series
    from ssat_probe.subject import Subject

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

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("block", "", "transformer block, 0 next to the input"),
        Column("head", "", "attention head within the block; heads have no common order across models"),
        Column("entropy", "nat", "entropy of a row of attention weights, mean over queries, then images"),
        Column("entropy_sd", "nat", "standard deviation of the entropy over images"),
        Column("entropy_normalised", "", "entropy / log(number of valid keys): 0 one key, 1 uniform"),
        Column("entropy_normalised_sd", "", "standard deviation of the normalised entropy over images"),
        Column("kurtosis", "", "excess kurtosis of a row (population moments), mean over defined rows, then images"),
        Column("kurtosis_sd", "", "standard deviation of the kurtosis over images"),
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
    )

    def measure(self, subject: "Subject") -> "DataFrame":
        """One row per block and head.

        Args:
            subject: Its model is in eval mode and has ``blocks`` and ``num_prefix_tokens``.

        Returns:
            The columns of this probe.
        """
        import torch
        from pandas import DataFrame

        from ssat_probe import capture

        model = subject.model
        chosen = _chosen(self.blocks, len(capture.blocks(model)))
        queries = _tokens(model, known(self.queries, ("patch", "cls", "all"), "queries"))
        keys = _tokens(model, known(self.keys, ("patch", "all"), "keys"))
        running: dict[int, _Running] = {block: _Running() for block in chosen}

        def reduce(seen: "Attention") -> None:
            running[seen.block].add(_rows(seen, queries, keys))

        errors: dict[int, float] | None = None
        num_images = 0
        with torch.no_grad():
            for batch in subject.batches():
                with capture.attention(model, reduce, only=chosen, is_checked=errors is None) as checked:
                    model(batch.images)
                errors = dict(checked) if errors is None else errors
                num_images += len(batch.images)
        rows = [
            {"block": block, "head": head, **values, "keys": self.keys, "queries": self.queries}
            | {"num_images": num_images, "self_check": (errors or {})[block]}
            for block in chosen
            for head, values in enumerate(running[block].rows())
        ]
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


class _Running:
    """Means over images of everything about one block."""

    _WITH_SD = ("entropy", "entropy_normalised", "kurtosis", "kurtosis_normalised")

    def __init__(self) -> None:
        from ssat_probe.measures.statistics import StreamingMean

        names = (column.name for column in Probe.columns[2:14])
        self._means = {name: StreamingMean() for name in names if not name.endswith("_sd")}

    def add(self, rows: "dict[str, Tensor]") -> None:
        """Take in one batch: per name, (batch, head)."""
        for name, values in rows.items():
            self._means[name].add(values)

    def rows(self) -> list[dict[str, float]]:
        """Per head, the mean of each name and the standard deviations."""
        result: list[dict[str, float]] = []
        for head in range(len(self._means["entropy"].mean)):
            values = {name: float(mean.mean[head]) for name, mean in self._means.items()}
            values |= {f"{name}_sd": float(self._means[name].sd[head]) for name in self._WITH_SD}
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
