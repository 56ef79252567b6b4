"""Images per second of a training step, against the same arithmetic written plainly, and what a step waits for.

Run: make benchmark-training, or a part of it: python analyses/benchmarks/training.py
step32|step224|data|compiled|channels. Nothing to download; 11 to 20 minutes on 2 free cores; each
part prints its progress.

step32, step224: one SSAT step (forward, backward, AdamW) of ViT-T/4 at 32 pixels and ViT-T/16 at 224, batch 64. Ours is
the objective of the package under autocast, with the kernels of attention that a training would choose; the plain ways
share its weights and its arithmetic (checked: the losses agree to 1e-4 in float32), but make each pass by itself,
forward and backward, write attention out with its matrix of weights, let AdamW go parameter by parameter, and leave
memory to the allocator. Also: the plain way with memory kept as ours keeps it, which says how much of the gain that is,
ours with torch's fused kernel of attention, a step of training from scratch, and one product of matrices by itself in
both precisions, which says how much a processor can gain by bfloat16. Each way is in a process of its own, since the
allocator is the process's; the products are in this one.
compiled: the same at 32 pixels with --compile, whose attention is in products (as on every CPU), and in torch's fused
kernel; the blocks are compiled before the first turn.
channels: one step of CvT-13 at 64 pixels, patches of 4, from scratch, with and without --channels-last, and in bfloat16
with torch's fused kernel of attention.
data: share of a step's time at 32 pixels that is spent on reading and changing images, under the paper's augmentation.

Ways take turns, a step each; a number is the median over the turns of the ratio within one, with its quartiles. Results
are in figures/benchmark_training/<part>.json, and the ratios of all parts in training.csv, .md, .png and .pdf there.
"""

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pandas import DataFrame

from ssat_probe import objectives, registry
from ssat_probe.augmentation import augment
from ssat_probe.execution import Execution, keeping_memory, prepare
from ssat_probe.images import ArrayImages, Facts
from ssat_probe.kernel import Attention
from ssat_probe.loading import batches
from ssat_probe.models.vit import VARIANTS
from ssat_probe.network import build_encoder, resolve
from ssat_probe.recipe import Recipe
from ssat_probe.table import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AS_USUAL = Execution()
OUT = Path("figures") / "benchmark_training"
SIZES = {"step32": ((32, 32), (4, 4)), "step224": ((224, 224), (16, 16)), "channels": ((64, 64), (4, 4))}
SIZES["compiled"] = SIZES["step32"]
TURNS = {"step32": 21, "step224": 11, "data": 21, "compiled": 21, "channels": 11}
"Many short turns: the speed of a machine drifts over seconds, and a ratio is taken within one turn."
NAMES = {"step32": "32 px", "step224": "224 px", "compiled": "32 px, compiled", "channels": "CvT-13, 64 px"}
TARGETS = {
    "plain bf16 / ours bf16": ("at least", 1.15),
    "plain fp32 / ours bf16": ("at least", 3.0),
    "ours bf16 / scratch bf16": ("at most", 1.4),
    "plain bf16 / compiled bf16": ("at least", 1.15),
    "plain fp32 / compiled bf16": ("at least", 3.0),
    "compiled bf16 / scratch compiled bf16": ("at most", 1.4),
}


def facts_of(img_size: tuple[int, int]) -> Facts:
    """Of images that nobody has seen."""
    return Facts(tuple("abcdefghij"), img_size, 3, (0.5,) * 3, (0.25,) * 3, True, "", "", "")


class Step:
    """One way to make a step of the optimiser."""

    def __init__(
        self, part: str, method: Any, *, is_plain: bool, is_bf16: bool, execution: Execution = AS_USUAL
    ) -> None:
        img_size, patch_size = SIZES[part]
        model = "cvt_13" if part == "channels" else "vit_tiny"
        recipe = Recipe(method=method, model=model, img_size=img_size, patch_size=patch_size, batch_size=64)
        facts = facts_of(img_size)
        recipe = resolve(recipe, facts)
        encoder = build_encoder(recipe, facts)
        behind = objectives.behind_encoder(recipe, facts, encoder)
        name = objectives.name_of(recipe, "train")
        self.objective = registry.load("objectives", name).Objective(recipe, encoder, behind)
        prepare(self.objective, execution)
        if is_plain:
            for module in self.objective.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False
        options: dict[str, Any] = {"foreach": False} if is_plain else {"fused": True}
        self.optimiser = torch.optim.AdamW(self.objective.parameters(), lr=1e-4, **options)
        self.is_bf16, self.is_plain, self.attention = (
            is_bf16,
            is_plain,
            Attention("fused" if is_plain else execution.kernel()),
        )
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(64, 3, *img_size, generator=generator)
        self.arguments = (
            images.contiguous(memory_format=torch.channels_last) if execution.channels_last else images,
            torch.randint(0, 10, (64,), generator=generator),
            torch.rand(64, encoder.num_tokens, generator=generator),
        )

    def loss(self) -> float:
        """Of the batch, its gradient added to those of the parameters."""
        terms: list[Callable[[], torch.Tensor]] = [lambda: self.objective(*self.arguments).total]
        if self.is_plain:  # one pass after the other
            weight = self.objective.weight
            terms = [
                lambda: weight * self.objective.supervised(*self.arguments).total,
                lambda: (1 - weight) * self.objective.task(*self.arguments).total,
            ]
        found = 0.0
        for term in terms:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16), self.attention.step():
                loss = term()
            loss.backward()
            found += float(loss.detach())
        return found

    def __call__(self) -> None:
        """Make it."""
        self.loss()
        self.optimiser.step()
        self.optimiser.zero_grad()


class Apart:
    """One way, in a process of its own."""

    def __init__(self, part: str, method: str, keeps_memory: bool, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, part, method, keeps_memory, options, torch.get_num_threads()), daemon=True
        )
        self.process.start()
        self.first_loss: float = self.connection.recv()
        self.kernels: dict[str, str] = {}

    def __call__(self, steps: int) -> float:
        """Seconds of so many steps."""
        self.connection.send(steps)
        seconds, self.kernels = self.connection.recv()
        return seconds


def serve(connection: Any, part: str, method: str, keeps_memory: bool, options: dict[str, Any], threads: int) -> None:
    """Make steps when asked to, until the other end is closed."""
    torch.set_num_threads(threads)
    with keeping_memory() if keeps_memory else nullcontext():
        way = Step(part, method, **options)
        connection.send(way.loss())
        with suppress(EOFError):
            while True:
                connection.send((seconds_of(way, connection.recv()), way.attention.chosen))


def seconds_of(way: Callable[[], None], steps: int) -> float:
    """Seconds of so many steps."""
    started = time.perf_counter()
    for _ in range(steps):
        way()
    return time.perf_counter() - started


def in_turns(part: str, ways: dict[str, Callable[[int], float]]) -> dict[str, list[float]]:
    """Seconds of a step of each way, in turns, after two steps that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(2)
    for turn in range(TURNS[part]):
        for name, way in ways.items():
            seconds[name].append(way(1))
        print(f"turn {turn + 1} of {TURNS[part]}", file=sys.stderr, flush=True)
    return seconds


def quartiles(values: list[float]) -> dict[str, float]:
    """Of all turns: a quarter of them is below, half of them, three quarters."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": median, "high": high}


def ratio(seconds: dict[str, list[float]], first: str, second: str) -> dict[str, Any]:
    """Of two ways, within each turn."""
    values = [one / other for one, other in zip(seconds[first], seconds[second], strict=True)]
    found: dict[str, Any] = quartiles(values)
    if target := TARGETS.get(f"{first} / {second}"):
        found["target"] = " ".join(map(str, target))
        found["met"] = found["median"] >= target[1] if target[0] == "at least" else found["median"] <= target[1]
    return found


def aimed_at(kinds: Collection[str]) -> list[list[str]]:
    """Pairs of these ways whose ratio has an aim."""
    return [name.split(" / ") for name in TARGETS if set(name.split(" / ")) <= set(kinds)]


def step(part: str) -> dict[str, Any]:
    """All ways of a step at one size."""
    ours, plain = {"is_plain": False, "is_bf16": True}, {"is_plain": True, "is_bf16": True}
    kinds = {  # the method, whether memory is kept, and the options of a step; what is divided stands side by side
        "scratch bf16": ("scratch", True, ours),
        "ours bf16": ("ssat", True, ours),
        "plain bf16": ("ssat", False, plain),
        "plain fp32": ("ssat", False, plain | {"is_bf16": False}),
        "plain bf16, memory kept": ("ssat", True, plain),
        "ours bf16, fused kernel": ("ssat", True, ours | {"execution": Execution(attention="fused")}),
        "ours fp32": ("ssat", True, ours | {"is_bf16": False}),
    }
    pairs = [
        *aimed_at(kinds),
        ("plain bf16, memory kept", "ours bf16"),
        ("ours bf16, fused kernel", "ours bf16"),
        ("ours fp32", "ours bf16"),
        ("product fp32", "product bf16"),
    ]
    return compared(part, kinds, pairs, ("ours fp32", "plain fp32"), products(part))


def products(part: str) -> dict[str, Callable[[int], float]]:
    """Thirty times the product of the first layer of an MLP, which needs no new memory, by dtype."""
    (height, width), (row, column) = SIZES[part]
    tokens, dim = 64 * (1 + height // row * (width // column)), VARIANTS["vit_tiny"]["dim"]
    ways: dict[str, Callable[[int], float]] = {}
    for name, dtype in (("product fp32", torch.float32), ("product bf16", torch.bfloat16)):
        inputs, weights = torch.randn(tokens, dim).to(dtype), torch.randn(dim, 4 * dim).to(dtype)
        multiply = partial(torch.mm, inputs, weights, out=inputs.new_empty(tokens, 4 * dim))
        ways[name] = lambda steps, multiply=multiply: seconds_of(multiply, 30 * steps)
    return ways


def compiled() -> dict[str, Any]:
    """A step of compiled blocks."""
    ours: dict[str, Any] = {"is_plain": False, "is_bf16": True}
    plain, is_compiled = ours | {"is_plain": True}, ours | {"execution": Execution(compile=True)}
    kinds = {
        "scratch compiled bf16": ("scratch", True, is_compiled),
        "compiled bf16": ("ssat", True, is_compiled),
        "plain bf16": ("ssat", False, plain),
        "plain fp32": ("ssat", False, plain | {"is_bf16": False}),
        "not compiled bf16": ("ssat", True, ours),
        "compiled bf16, fused kernel": ("ssat", True, ours | {"execution": Execution(compile=True, attention="fused")}),
    }
    pairs = [*aimed_at(kinds), ("not compiled bf16", "compiled bf16"), ("compiled bf16, fused kernel", "compiled bf16")]
    return compared("compiled", kinds, pairs)


def channels() -> dict[str, Any]:
    """A step of a network of convolutions in either order of memory, and with torch's own kernel of attention."""
    fused = {"is_plain": False, "is_bf16": True, "execution": Execution(attention="fused")}
    kinds: dict[str, Any] = {"channels first bf16, fused kernel": ("scratch", True, fused)}
    for name, is_bf16 in (("bf16", True), ("fp32", False)):
        options: dict[str, Any] = {"is_plain": False, "is_bf16": is_bf16}
        kinds[f"channels first {name}"] = ("scratch", True, options)
        kinds[f"channels last {name}"] = ("scratch", True, options | {"execution": Execution(channels_last=True)})
    pairs = [(f"channels first {name}", f"channels last {name}") for name in ("bf16", "fp32")]
    pairs.append(("channels first bf16, fused kernel", "channels first bf16"))
    return compared("channels", kinds, pairs)


def compared(
    part: str,
    kinds: dict[str, tuple],
    pairs: list[Any],
    alike: tuple[str, str] | None = None,
    others: Mapping[str, Callable[[int], float]] | None = None,
) -> dict[str, Any]:
    """Time ways in turns, two of which are first made sure to compute the same, and others; and ratios of pairs."""
    ways = {name: Apart(part, *kind) for name, kind in kinds.items()}
    if alike is not None:
        losses = [ways[name].first_loss for name in alike]
        assert abs(losses[0] - losses[1]) < 1e-4 * abs(losses[1]), f"the ways differ: {losses}"
    seconds = in_turns(part, {**ways, **(others or {})})
    return {
        "kernels": {name: way.kernels for name, way in ways.items()},
        "images_per_s": {name: 64 / statistics.median(seconds[name]) for name in ways},
        "seconds": seconds,
        "ratios": {f"{one} / {other}": ratio(seconds, one, other) for one, other in pairs},
    }


def data() -> dict[str, Any]:
    """Reading and changing images, as a share of the whole step."""
    facts, generator = facts_of((32, 32)), torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images = ArrayImages(pixels, np.zeros(5000))
    order = np.random.default_rng(0).permutation(5000)

    def changed() -> None:
        for loaded in batches(images, [order[:64]]):
            augment(loaded[0], "strong", facts, generator)

    made = Step("step32", "ssat", is_plain=False, is_bf16=True)
    seconds = in_turns("data", {"images": partial(seconds_of, changed), "step": partial(seconds_of, made)})
    share: dict[str, Any] = quartiles(
        [one / (one + other) for one, other in zip(seconds["images"], seconds["step"], strict=True)]
    )
    return {"seconds": seconds, "share": share | {"target": "at most 0.05", "met": share["median"] <= 0.05}}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "step32": lambda: step("step32"), "step224": lambda: step("step224"), "data": data,
    "compiled": compiled, "channels": channels,
}  # fmt: skip


def table() -> DataFrame:
    """Ratios of the parts that have been run."""
    rows = []
    for part in PARTS:
        path = OUT / f"{part}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        ratios = dict(found.get("ratios", {}))
        if "share" in found:
            ratios["images and their changes / the whole step"] = found["share"]
        rows += [{"part": part, "ratio": name} | row for name, row in ratios.items()]
    return DataFrame(rows, columns=["part", "ratio", "median", "low", "high", "target", "met"])


def markdown(ratios: DataFrame) -> str:
    """As in the README."""
    lines = ["| part | ratio of the seconds of a step | median [quartiles] | target |", "|---|---|---|---|"]
    for row in ratios.itertuples():
        verdict = f"{row.target}: {'met' if row.met else 'missed'}" if isinstance(row.target, str) else ""
        lines.append(f"| {row.part} | {row.ratio} | {row.median:.3g} [{row.low:.3g}, {row.high:.3g}] | {verdict} |")
    return "\n".join(lines) + "\n"


def draw(ratios: DataFrame) -> "Figure":
    """A mark per ratio, bars between quartiles, and what was aimed at; the share of waiting is in the table alone."""
    from matplotlib import pyplot as plt

    shown = ratios[ratios["part"] != "data"].iloc[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.3 * len(shown)), layout="constrained")
    ys = np.arange(len(shown))
    spread = [shown["median"] - shown["low"], shown["high"] - shown["median"]]
    axes.errorbar(shown["median"], ys, xerr=spread, fmt="o", color="#0072b2", capsize=2, label="median, quartiles")
    for y, target in zip(ys, shown["target"], strict=True):
        if isinstance(target, str):
            bound = float(target.split()[-1])
            axes.plot([bound, bound], [y - 0.4, y + 0.4], color="black", label="aim")
            arrow = ">" if target.startswith("at least") else "<"
            axes.plot(bound, y + 0.4, arrow, color="black", markersize=4)
    axes.axvline(1, color="0.7", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_xticks([1, 1.5, 2, 3, 4], ["1", "1.5", "2", "3", "4"])
    axes.minorticks_off()
    named = [f"{NAMES[part]}: {ratio}" for part, ratio in zip(shown["part"], shown["ratio"], strict=True)]
    axes.set_yticks(ys, named)
    axes.set_xlabel("ratio of the seconds of a step")
    figure.suptitle("A training step, batch 64; arrows point to where the aim lies")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, frameon=False)
    return figure


def write() -> None:
    """Table and figure of all parts that have been run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ratios = table()
    write_atomically(OUT / "training.csv", ratios.to_csv(index=False))
    write_atomically(OUT / "training.md", markdown(ratios))
    figure = draw(ratios)
    for ending in ("png", "pdf"):
        figure.savefig(OUT / f"training.{ending}", dpi=130)
    plt.close(figure)


def machine() -> dict[str, Any]:
    """What the numbers hang on; the processor where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    processor = ", ".join(f"{key}{facts[key]}" for key in ("model name", "cpu family", "model") if key in facts)
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "processor": processor}


def main(names: list[str]) -> None:
    """Run some parts, or all."""
    for name in names or list(PARTS):
        if name not in PARTS:
            sys.exit(f"A part must be one of {', '.join(PARTS)}, got {name!r}.")
        found = PARTS[name]() | {"turns": TURNS[name], **machine()}
        OUT.mkdir(parents=True, exist_ok=True)
        write_atomically(OUT / f"{name}.json", json.dumps(found, indent=2) + "\n")
        write()
        print(json.dumps({key: value for key, value in found.items() if key != "seconds"}, indent=2))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1:])
