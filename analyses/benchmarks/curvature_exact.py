"""Part 3: the exact spectrum of a small ViT on 256 images, against torch.autograd.functional.hessian."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from curvature_models import Row, Task, memory, small
from matplotlib.axes import Axes
from pandas import DataFrame
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

WAYS = ("exact", "functional.hessian", "functional.hessian, vectorised")
MEMORY = 12 * 2**30  # address space that a way may take; the vectorised one asks for more
SECONDS = 420  # that a way may take
REPEATS = 1


def measure() -> Iterator[Row]:
    """Seconds and peak memory of each way, each in a process of its own, in turns."""
    spectra: dict[str, list[float]] = {}
    for repeat in range(REPEATS):
        for way in WAYS:
            found = _in_process(way)
            spectra[way] = found.pop("spectrum", [])
            if not spectra[way]:
                print(f"{way}: {found['reason']}")
                found = {"seconds": float("nan"), "peak_memory": float("nan")}
            for quantity, value in found.items():
                yield {"model": "small", "way": way, "quantity": quantity, "repeat": repeat, "value": value}
    right = np.array(spectra["exact"])
    for way, values in spectra.items():
        if values and len(right):
            np.testing.assert_allclose(values, right, atol=1e-9 * np.abs(right).max(), err_msg=way)


def _in_process(way: str) -> dict[str, object]:
    command = [sys.executable, str(Path(__file__)), way]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"reason": f"more than {SECONDS} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"reason": f"does not fit into {MEMORY / 2**30:.0f} GiB ({said[-1][:90] if said else 'killed'})"}
    return json.loads(done.stdout.splitlines()[-1])


def _run(way: str) -> dict[str, object]:
    """In a process of its own: the spectrum, seconds and peak memory above what was held before."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    task = small()
    task.gradient()
    before, started = memory(), time.perf_counter()
    if way == "exact":
        from ssat_probe.measures.exact import exact_spectrum

        values = exact_spectrum(task.operator).eigenvalues
    else:
        matrix = _functional(task, is_vectorised=way.endswith("vectorised"))
        values = torch.linalg.eigvalsh(matrix).numpy()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_memory": (memory(is_peak=True) - before) / 2**30, "spectrum": values.tolist()}


def _functional(task: Task, is_vectorised: bool) -> torch.Tensor:
    names, values = zip(*task.parameters.items(), strict=True)
    sizes = [value.numel() for value in values]

    def loss(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split(sizes)
        named = {n: part.view_as(value) for n, part, value in zip(names, parts, values, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            return torch.nn.functional.cross_entropy(functional_call(task.model, named, (task.images,)), task.labels)

    start = torch.cat([value.detach().reshape(-1) for value in values])
    return torch.autograd.functional.hessian(loss, start, vectorize=is_vectorised)


def ratios(table: DataFrame) -> Iterator[tuple[str, str, str, list[float], str]]:
    """Time and memory of the faster peer that fits, over ours."""
    for quantity, target in (("seconds", "≥ 2"), ("peak_memory", "")):
        wide = table[table["quantity"] == quantity].pivot_table(index="repeat", columns="way", values="value")
        for way in wide.columns.drop("exact") if "exact" in wide else ():
            values = (wide[way] / wide["exact"]).tolist()
            yield "exact", f"{quantity.replace('_', ' ')}: {way} / exact", "small", values, target


def draw(ax: Axes, table: DataFrame) -> None:
    """Seconds of each way, with its memory beside."""
    wide = table.pivot_table(index="way", columns="quantity", values="value", dropna=False).reindex(list(WAYS))
    ax.barh(range(len(WAYS)), wide["seconds"].fillna(0), color="C0")
    for place, (_, row) in enumerate(wide.iterrows()):
        text = f" {row['peak_memory']:.1f} GiB" if np.isfinite(row["seconds"]) else " does not fit"
        ax.text(np.nan_to_num(row["seconds"]), place, text, va="center", fontsize=7)
    ax.set_yticks(range(len(WAYS)), WAYS)
    ax.invert_yaxis()
    ax.margins(x=0.35)
    ax.set(xlabel="seconds", title="Exact spectrum, 256 images")


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1])))
