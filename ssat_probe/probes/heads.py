"""Where attention heads look: class-token sink, distance, collapse, diversity."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ssat_probe.paired import Paired
from ssat_probe.table import Column, with_difference, with_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from ssat_probe.capture import Attention
    from ssat_probe.observation import Observation, Sum, Values
    from ssat_probe.subject import Subject

_MEASURES = (
    Column("mass_to_prefix", "", "attention of patch tokens to class and register tokens: the sink"),
    Column("mass_prefix_to_prefix", "", "attention of class and register tokens to themselves; undefined without"),
    Column("entropy_all", "nat", "entropy over all keys = the three parts below"),
    Column("entropy_groups", "nat", "part of the choice between prefix tokens and patches"),
    Column("entropy_prefix", "nat", "part of the choice among prefix tokens: 0 for a class token alone"),
    Column("entropy_patch", "nat", "part of the choice among patches"),
    Column("effective_keys", "", "exp(entropy over the patches): number of keys a patch attends to"),
    Column("distance", "px", "attention distance between patches, weights renormalised over the patches"),
    Column("distance_normalised", "", "distance / distance of uniform attention"),
    Column("distance_probing_vits", "px", "distance without renormalisation (parity probing_vits)"),
    Column("distance_mae_lite", "px", "distance with 14 px a patch (parity mae_lite)"),
    Column("nmi", "", "normalised mutual information of query and key: 0 all queries alike (collapse), at most 1"),
    Column("nmi_cl_vs_mim", "", "the same with 1e-8 added to every weight (parity cl_vs_mim)"),
    Column("information", "nat", "mutual information of query and key"),
    Column("key_entropy", "nat", "entropy of the mean row: how evenly keys are attended to"),
    Column("divergence", "nat", "KL from the mean head; mean over heads: Jensen-Shannon; undefined for one head"),
    Column("divergence_normalised", "", "divergence / largest Jensen-Shannon divergence; undefined for one head"),
    Column("kl", "nat", "KL from the other heads, mean; undefined for one head or disjoint heads"),
    Column("kl_median", "nat", "its median over the queries; undefined likewise"),
)
_PAIRED = ("mass_to_prefix", "effective_keys", "distance", "nmi", "divergence")


@dataclass(frozen=True)
class Probe(Paired):
    """Where attention heads look: class-token sink, distance, collapse, diversity."""

    untrained_twin: bool = True
    "Also measure the untrained network of the same architecture and seed, as a reference; =false leaves it out."

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("block", "", "transformer block, 0 next to the input"),
        Column("head", "", "attention head within the block; heads have no common order across models"),
        *(column for one in _MEASURES for column in with_spread(one)),
        *(column for one in _MEASURES if one.name in _PAIRED for column in with_difference(one)),
        Column("mass_uniform", "", "attention of uniform attention to class and register tokens"),
        Column("keys_uniform", "", "number of patches: effective keys of uniform attention"),
        Column("distance_uniform", "px", "distance of uniform attention"),
        Column("num_images", "", "number of images"),
    )
    policy: ClassVar[str] = "queries patch, keys patch (mass and entropy_all: keys all)"

    def observe(self, subject: "Subject") -> "Observation":
        """Means over the images."""
        from ssat_probe import capture, observation

        return observation.of_attention(subject, _rows, _finished, capture.blocks_with(subject.model, "patch"))

    def tabulate(self, seen: "Observation", first: "Observation | None") -> "DataFrame":
        """One row per block and head; queries are patch tokens."""
        from pandas import DataFrame

        rows: list[dict[str, Any]] = []
        for block, one in seen.statistics.items():
            same = one.differences(_PAIRED, first.statistics[block] if first else None)
            same |= {"block": block, "num_images": seen.num_images}
            for head in range(len(one.mean("nmi"))):
                row = same | {"head": head}
                for measure in _MEASURES:
                    row |= one.spread(measure.name, head)
                references = ("mass_uniform", "keys_uniform", "distance_uniform")
                rows.append(row | {name: float(one.mean(name)[head]) for name in references})
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
            for ax, name in ((axes[0], "mass_uniform"), (axes[2], "keys_uniform"), (axes[3], "distance_uniform")):
                for uniform in table[name].round(6).unique()[:3] if name in table else ():
                    ax.axhline(uniform, color="0.5", linewidth=1, label="uniform attention")
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


def _rows(seen: "Attention") -> "dict[str, Tensor | Sum]":
    """Each measure per image, head and patch query of a chunk."""
    import torch

    from ssat_probe import geometry
    from ssat_probe.measures import heads as measures
    from ssat_probe.observation import Sum

    patches, own = (geometry.arranged(seen, queries, "all") for queries in ("patch", "prefix"))
    prefix = patches.num_prefix
    log_all = measures.log_weights(patches.rows, are_scores=seen.has_scores)
    log_patch = measures.log_weights(patches.rows[..., prefix:], are_scores=seen.has_scores)
    weights = log_patch.double().exp()
    parts = measures.entropy_parts(log_all, prefix)
    entropy = torch.special.entr(weights).sum(-1)
    distances = patches.distances[:, prefix:]
    distance, uniform = (of(log_patch, distances) for of in (measures.mean_distance, measures.uniform_distance))
    divergence = measures.divergence(log_patch)
    log_own = measures.log_weights(own.rows, are_scores=seen.has_scores).double()
    is_valid = ~log_all.isneginf()
    num_keys = is_valid[..., prefix:].sum(-1).double()
    bound = num_keys.clamp(max=divergence.shape[1]).log()
    # As their code: what is renormalised is cut from weights over all keys. It has no windows.
    cut = measures.floored(weights * (1 - parts["mass"])[..., None])
    floored = cut * (1 if patches.num_windows == 1 else torch.nan)
    counts = patches.regions.bincount(minlength=patches.num_regions)
    sums = {"": (weights, entropy), "_floored": (floored, torch.special.entr(floored).sum(-1))}
    return {
        "mass_to_prefix": parts["mass"],
        "mass_prefix_to_prefix": log_own[..., :prefix].exp().sum(-1),
        "entropy_all": parts["all"],
        "entropy_groups": parts["groups"],
        "entropy_prefix": parts["prefix"],
        "entropy_patch": parts["patch"],
        "effective_keys": entropy.exp(),
        "distance": distance,
        "distance_normalised": distance / uniform,
        "distance_probing_vits": distance * (1 - parts["mass"]),
        "distance_mae_lite": measures.mean_distance(log_patch, patches.distances_with(14)[:, prefix:]),
        "divergence": divergence,
        "divergence_normalised": divergence / bound.where(bound > 0, torch.nan),
        "kl": measures.mean_kl(log_patch),
        "mass_uniform": is_valid[..., :prefix].sum(-1).double() / is_valid.sum(-1),
        "keys_uniform": num_keys,
        "distance_uniform": uniform,
        "num_queries": Sum(counts.double().expand(len(weights), -1)),
        **{f"rows{kind}": Sum(patches.by_region(one)) for kind, (one, _) in sums.items()},
        **{f"entropies{kind}": Sum(patches.by_region(one[..., None])[..., 0]) for kind, (_, one) in sums.items()},
    }


def _finished(values: "Values") -> "tuple[Values, Values]":
    """Per image and head: means over the queries, and the information, which takes all of a region together."""
    from ssat_probe.measures.heads import information_of_regions
    from ssat_probe.measures.statistics import quantiles_of_defined
    from ssat_probe.observation import over_queries

    plain, like_cl_vs_mim = (
        information_of_regions(values[f"rows{kind}"], values[f"entropies{kind}"], values["num_queries"][0])
        for kind in ("", "_floored")
    )
    together = {"rows", "rows_floored", "entropies", "entropies_floored", "num_queries"}
    means, undefined = over_queries({name: value for name, value in values.items() if name not in together})
    median = {"kl_median": quantiles_of_defined(values["kl"], (0.5,))[0]}
    more = {**plain, **median, "nmi_cl_vs_mim": like_cl_vs_mim["nmi"]}
    return {**means, **more}, {**undefined, "kl_median": undefined["kl"]}
