"""Time and memory of the probes of attention and features, against the plain forward pass and two usual ways.

Run: make benchmark-probes (or: python analyses/benchmarks/probes.py). Takes seven minutes; nothing to download.
Fresh weights: what is timed does not depend on what a model has learnt. All ways see the same images, and the usual
ones give the same mean entropy (checked). Seconds are medians of the ratio to a plain pass right before, over repeats
that take turns, with their range, beside the target where there is one ("plain" against itself says how far to trust
them); memory is the largest sum of live tensors, minus that of the plain forward pass, over two batches. Writes
probes.csv, .json, .md, .png and .pdf into figures/benchmark_probes.
"""

import copy
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from pandas import DataFrame
from scipy import special, stats
from timm.utils import AttentionExtract
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ssat_probe import capture, observation
from ssat_probe.probes import attention, heads, histogram, repetition, similarity, variance
from ssat_probe.table import write_atomically

OUT = Path(__file__).parents[2] / "figures" / "benchmark_probes"
MODELS = {"vit_tiny_patch16_224": (64, 16), "swin_tiny_patch4_window7_224": (16, 8)}
"Images and batch size of each."
REPEATS = 7
TARGETS = {"attention": 1.6, "variance": 1.1}
"Times the plain pass that was aimed at, on the ViT."


class Shown:
    """What a probe needs of a subject: a model and images."""

    fingerprint = setting = ""
    checkpoint = SimpleNamespace(label="fresh")

    def __init__(self, name: str, num_images: int, batch_size: int) -> None:
        torch.manual_seed(0)
        self.model = timm.create_model(name).eval()
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(num_images, 3, 224, 224, generator=generator)
        self.batch_size = batch_size

    @property
    def num_images(self) -> int:
        """All of them."""
        return len(self.images)

    def batches(self) -> Iterator[SimpleNamespace]:
        """Images with their numbers."""
        for ids in torch.arange(len(self.images)).split(self.batch_size):
            yield SimpleNamespace(images=self.images[ids], ids=ids)


def plain(shown: Shown) -> None:
    """The forward pass, fused where the model can."""
    with torch.no_grad():
        for batch in shown.batches():
            shown.model(batch.images)


def entropy_and_kurtosis(shown: Shown) -> float:
    """The probe `attention`: eleven measures with spread and bootstrap."""
    return float(attention.Probe(keys="all", queries="all").measure(shown)["entropy"].mean())  # type: ignore[arg-type]


def all_of_attention(shown: Shown) -> float:
    """The probes `attention`, `heads` and `histogram` one after another."""
    found = entropy_and_kurtosis(shown)
    for probe in (heads.Probe(), histogram.Probe()):
        probe.measure(shown)  # type: ignore[arg-type]
    return found


def of_variance(shown: Shown) -> None:
    """The probe `variance`."""
    variance.Probe().measure(shown)  # type: ignore[arg-type]


def of_repetition(shown: Shown) -> None:
    """The probe `repetition`, on models whose blocks attend over the same keys."""
    repetition.Probe().measure(shown)  # type: ignore[arg-type]


def of_similarity(shown: Shown) -> None:
    """The probe `similarity`, of the model with itself."""
    similarity.Probe().measure(shown)  # type: ignore[arg-type]


def with_timm(shown: Shown) -> float:
    """timm's AttentionExtract on unfused blocks (fused ones give it nothing), then numpy and scipy."""
    modules = [module for module in shown.model.modules() if hasattr(module, "fused_attn")]
    before = [module.fused_attn for module in modules]
    for module in modules:
        module.fused_attn = False
    values: list[float] = []
    try:
        extract = AttentionExtract(shown.model, method="hook")
        for batch in shown.batches():
            with torch.no_grad():
                maps = extract(batch.images)
            values.append(float(np.mean([_by_numpy(weights.numpy()) for weights in maps.values()])))
        for hook in extract.hooks._handles if hasattr(extract.hooks, "_handles") else ():
            hook.remove()
    finally:
        for module, is_fused in zip(modules, before, strict=True):
            module.fused_attn = is_fused
        for module in shown.model.modules():
            module._forward_hooks.clear()
    return float(np.mean(values))


def storing_all(shown: Shown) -> float:
    """Keep the maps of all blocks of a batch, then measure them one after another."""
    values: list[float] = []
    for batch in shown.batches():
        kept: list[capture.Attention] = []
        with torch.no_grad(), capture.attention(shown.model, kept.append):
            shown.model(batch.images)
        values.append(float(np.mean([_by_numpy(seen.rows.softmax(-1).numpy()) for seen in kept])))
    return float(np.mean(values))


def _by_numpy(weights: np.ndarray) -> float:
    stats.kurtosis(weights, axis=-1)
    return float(special.entr(weights).sum(-1).mean())


class Peak(TorchDispatchMode):
    """Largest sum of the bytes of live tensors that were made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run, and count what it made."""
        result = func(*args, **(kwargs or {}))
        for one in tree_flatten(result)[0]:
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in self._seen:
                    self._seen.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        return result

    def _gone(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


def peak_bytes(way: Callable[[Shown], Any], shown: Shown) -> int:
    """Of two batches, so that what is kept from one to the next counts."""
    few = copy.copy(shown)
    few.images = shown.images[: 2 * shown.batch_size]
    with Peak() as peak:
        way(few)
    return peak.peak


def timed(way: Callable[[Shown], Any], shown: Shown) -> tuple[float, Any]:
    """Seconds, and what it gave."""
    started = time.perf_counter()
    found = way(shown)
    return time.perf_counter() - started, found


def measured(name: str, num_images: int, batch_size: int) -> dict[str, Any]:
    """Ratios of all ways to the plain forward pass."""
    shown = Shown(name, num_images, batch_size)
    ways: dict[str, Callable[[Shown], Any]] = {
        "plain": plain, "attention": entropy_and_kurtosis, "attention, heads, histogram": all_of_attention,
        "variance": of_variance, "repetition": of_repetition, "similarity": of_similarity,
        "timm AttentionExtract + numpy": with_timm, "storing all maps": storing_all,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    entropies: dict[str, float] = {}
    for _ in range(REPEATS):
        for label, way in list(ways.items()):
            base, _ = timed(plain, shown)  # right before, so that what ran earlier enters neither
            try:
                taken, found = timed(way, shown)
            except (ValueError, RuntimeError, AttributeError, IndexError) as error:
                print(f"{name}, {label}: {error}", file=sys.stderr)
                del ways[label]
                continue
            seconds[label].append(taken)
            ratios[label].append(taken / base)
            if isinstance(found, float):
                entropies[label] = found
    for label in ("timm AttentionExtract + numpy", "storing all maps"):
        if label in entropies and "window" not in name:  # timm's maps of windows hold no masks
            np.testing.assert_allclose(entropies[label], entropies["attention"], rtol=1e-3)
    peaks = {label: peak_bytes(way, shown) for label, way in ways.items()}
    rows = {}
    for label in ways:
        rows[label] = {"target": TARGETS[label]} if label in TARGETS else {}
        rows[label] |= {
            "times_plain": round(statistics.median(ratios[label]), 2),
            "range": [round(min(ratios[label]), 2), round(max(ratios[label]), 2)],
            "ms_per_image": round(1000 * statistics.median(seconds[label]) / num_images, 1),
            "mb_above_plain": round((peaks[label] - peaks["plain"]) / 2**20, 1),
        }
    # A chunk is what is looked at of one block at a time; an image's single query may be more.
    shared = {"images": num_images, "batch_size": batch_size, "threads": torch.get_num_threads()}
    return {"model": name, **shared, "mb_of_a_chunk": observation.MOST_WEIGHTS * 4 / 2**20, **rows}


def table_of(found: list[dict[str, Any]]) -> DataFrame:
    """One row per model and way."""
    rows = []
    for one in found:
        for way, seen in one.items():
            if isinstance(seen, dict):
                least, most = seen["range"]
                row = {"model": one["model"], "way": way, "times_plain": seen["times_plain"]}
                row |= {"least": least, "most": most, "target": seen.get("target", np.nan)}
                rows.append(row | {name: seen[name] for name in ("ms_per_image", "mb_above_plain")})
    return DataFrame(rows)


def markdown(table: DataFrame) -> str:
    """Times the plain pass, median (least to most), and memory above it."""
    lines = ["| way | model | time | memory | target of time |", "|---|---|---|---|---|"]
    for row in table.itertuples():
        spread = f"{row.times_plain:.2f} ({row.least:.2f} to {row.most:.2f})"
        target = "" if np.isnan(row.target) else f"at most {row.target}"
        lines.append(f"| {row.way} | {row.model} | {spread} | {row.mb_above_plain:.1f} MB | {target} |")
    return "\n".join(lines) + "\n"


def draw(table: DataFrame, mb_of_a_chunk: float) -> Figure:
    """Time and memory of each way, a mark per model; bars from least to most."""
    ways = list(dict.fromkeys(table["way"]))[::-1]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True, layout="constrained")
    for place, (model, one) in enumerate(table.groupby("model", sort=False)):
        ys = np.array([ways.index(way) for way in one["way"]]) + 0.2 * (0.5 - place)
        spread = [one["times_plain"] - one["least"], one["most"] - one["times_plain"]]
        look = {"fmt": "os"[place], "color": ("#0072b2", "#d55e00")[place], "label": str(model)}
        axes[0].errorbar(one["times_plain"], ys, xerr=spread, capsize=2, **look)
        axes[1].plot(one["mb_above_plain"].clip(lower=0), ys, "os"[place], color=look["color"])
    aims = table.dropna(subset="target").drop_duplicates("way")
    for row in aims.itertuples():
        axes[0].plot([row.target] * 2, ways.index(row.way) + np.array([-0.4, 0.4]), color="black", label="aim")
    axes[1].axvline(mb_of_a_chunk, color="black")
    axes[0].set_yticks(range(len(ways)), ways)
    axes[0].set_xscale("log")
    axes[0].set_xticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
    axes[0].minorticks_off()
    axes[1].set_xscale("symlog", linthresh=1)
    axes[1].set_xlim(-0.1, 2 * table["mb_above_plain"].max())
    axes[0].set(xlabel="time / plain forward pass", title="Time: median, least to most")
    axes[1].set(xlabel="memory above the plain pass [MB]", title="Memory; line: one chunk of queries")
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def write(found: list[dict[str, Any]]) -> None:
    """Numbers, table and figure into ``figures/benchmark_probes``."""
    OUT.mkdir(parents=True, exist_ok=True)
    table = table_of(found)
    write_atomically(OUT / "probes.json", json.dumps(found, indent=1) + "\n")
    write_atomically(OUT / "probes.csv", table.to_csv(index=False))
    write_atomically(OUT / "probes.md", markdown(table))
    figure = draw(table, found[0]["mb_of_a_chunk"])
    for ending in ("png", "pdf"):
        figure.savefig(OUT / f"probes.{ending}", dpi=130)
    plt.close(figure)


def main() -> None:
    """Measure one model after the other, and write everything after each."""
    found = []
    for name, (num_images, batch_size) in MODELS.items():
        found.append(measured(name, num_images, batch_size))
        write(found)
    print((OUT / "probes.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
