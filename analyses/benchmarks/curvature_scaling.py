"""Part 5: cost of a product against images and parameters; peak memory against Lanczos steps."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curvature_models import Row, Task, alternating, memory, nano, random_vectors
from matplotlib.axes import Axes
from pandas import DataFrame

from ssat_probe.measures.lanczos import lanczos
from ssat_probe.models import vit

IMAGES, WIDTHS, STEPS, REPEATS = (64, 128, 256), (16, 32, 64, 128), (1, 40, 80, 120), 3
MEMORY_WIDTH = 128  # of the model whose memory is measured: 0.8 million parameters


def measure() -> Iterator[Row]:
    """Seconds per product by number of images and of parameters, GiB by number of steps."""
    whole = nano(max(IMAGES))
    parts = [Task("vit_nano", whole.model, whole.images[:num], whole.labels[:num]) for num in IMAGES]
    yield from _timed("images", {len(one.images): one for one in parts})
    wide = [_of_width(dim) for dim in WIDTHS]
    yield from _timed("parameters", {one.operator.size: one for one in wide})
    for steps in STEPS:
        done = subprocess.run([sys.executable, str(Path(__file__)), str(steps)], capture_output=True, check=True)
        found = json.loads(done.stdout)
        for way in ("measured", "basis"):
            row = {"model": "vit", "way": way, "quantity": "GiB", "repeat": 0, "against": "steps", "size": steps}
            yield row | {"value": found[way]}


def _timed(against: str, tasks: dict[int, Task]) -> Iterator[Row]:
    """Fresh products, in turns over the sizes."""
    operators = {str(size): task.operator for size, task in tasks.items()}
    vectors = {name: random_vectors(operator.size)[0] for name, operator in operators.items()}
    ways: dict[str, Any] = {
        name: lambda operator=operator, vector=vectors[name]: operator.product(vector)
        for name, operator in operators.items()
    }
    for name, repeat, seconds in alternating(ways, REPEATS):
        row = {"model": "vit", "way": "fresh", "quantity": "seconds", "repeat": repeat, "against": against}
        yield row | {"size": int(name), "value": seconds}


def _of_width(dim: int, num_images: int = 64) -> Task:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": (8, 8), "patch_size": (2, 2), "channels": 1, "num_classes": 10}
    model = vit.Model(**sizes, dim=dim, depth=4, heads=4, mlp_ratio=4).eval()
    return Task(f"dim {dim}", model, torch.randn(num_images, 1, 8, 8), torch.randint(10, (num_images,)))


def _run(steps: int) -> dict[str, float]:
    """In a process of its own: peak memory of a run above what was held before, and what the basis alone takes."""
    task = _of_width(MEMORY_WIDTH, 8)
    operator, before = task.operator, memory()
    lanczos(operator.product, operator.size, steps, precision=operator.precision)
    return {"measured": (memory(is_peak=True) - before) / 2**30, "basis": 8 * steps * operator.size / 2**30}


def ratios(table: DataFrame) -> Iterator[tuple[str, str, str, list[float], str]]:
    """Exponent of the growth with images and parameters; memory over the basis at the largest number of steps."""
    for against in ("images", "parameters"):
        rows = table[table["against"] == against]
        slopes = [
            float(np.polyfit(np.log(group["size"]), np.log(group["value"]), 1)[0])
            for _, group in rows.groupby("repeat")
        ]
        yield "scaling", f"exponent of the cost in {against}", "vit", slopes, "1" if against == "images" else ""
    wide = table[table["against"] == "steps"].pivot_table(index="size", columns="way", values="value")
    growth = wide.loc[max(STEPS)] - wide.loc[min(STEPS)]
    what = f"memory from {min(STEPS)} to {max(STEPS)} steps / growth of the basis"
    yield "scaling", what, "vit", [float(growth["measured"] / growth["basis"])], ""


def draw(ax: Axes, table: DataFrame) -> None:
    """Each relative to its largest size."""
    for against, rows in table.groupby("against", sort=False):
        quantity = "memory" if against == "steps" else "seconds"
        for way, group in rows.groupby("way"):
            means = group.groupby("size")["value"].median()
            label = "its basis alone" if way == "basis" else f"{quantity} against {against}"
            style = "x:" if way == "basis" else "o-"
            largest = means.iloc[-1] if against != "steps" else rows[rows["way"] == "measured"]["value"].max()
            ax.plot(means.index / means.index[-1], means / largest, style, label=label)
    sizes = np.array([1 / 120, 1])
    ax.plot(sizes, sizes, color="black", linewidth=0.8, label="linear")
    ax.set(xscale="log", yscale="log", xlabel="size / largest", ylabel="cost / largest", title="Growth")


if __name__ == "__main__":
    print(json.dumps(_run(int(sys.argv[1]))))
