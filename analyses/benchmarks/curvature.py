"""Curvature against its peers: products, eigenvalues, exact spectra, negative part, growth of the cost.

Run: make benchmark-curvature; parts: python analyses/benchmarks/curvature.py product eigenvalues exact negative scaling
With --keep, parts that stand in figures/benchmark_curvature already are not measured again: an interrupted run goes on.
Takes some 20 minutes on 2 free cores; nothing to download. Peers come with
pip install '.[benchmark]'; one that is missing or fails is left out with a line that says so, and a part that fails
leaves the others, and what stood there of it, alone; the exit status is then 1. Ways take turns within one process
tree. Writes curvature.csv, .md, .png and .json into figures/benchmark_curvature after every part; parts that were not
asked for keep what stands there.
"""

import datetime
import importlib
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import torch
from pandas import DataFrame

from ssat_probe.table import write_atomically

PARTS = ("product", "eigenvalues", "exact", "negative", "scaling")
OUT = Path(__file__).parents[2] / "figures" / "benchmark_curvature"


def module_of(part: str) -> Any:
    """Each part is a file: measure, ratios, draw."""
    return importlib.import_module(f"curvature_{part}")


def main(words: list[str]) -> None:
    """Measure the parts asked for and write everything after each of them."""
    parts = [word for word in words if word != "--keep"]
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise SystemExit(f"Parts must be among {', '.join(PARTS)} (and --keep), got {', '.join(unknown)}.")
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "curvature.csv"
    table = pd.read_csv(path) if path.is_file() else DataFrame({"part": []})
    record = json.loads((OUT / "curvature.json").read_text(encoding="utf-8")) if path.is_file() else {}
    failed = []
    for part in parts or PARTS:
        if "--keep" in words and part in record:
            print(f"{part}: stands there, of {record[part]['date']}")
            continue
        started = time.perf_counter()
        try:
            rows = [{"part": part} | row for row in module_of(part).measure()]
        except Exception:  # the other parts have nothing to do with it
            traceback.print_exc()
            failed.append(part)
            continue
        table = pd.concat([table[table["part"] != part], DataFrame(rows)], ignore_index=True)
        record[part] = machine() | {"seconds": round(time.perf_counter() - started, 1)}
        print(f"{part}: {record[part]['seconds']} s", flush=True)
        write(table, record)
    if len(table):
        write(table, record)
        print((OUT / "curvature.md").read_text(encoding="utf-8"))
    if failed:
        raise SystemExit(f"Failed, and left as they stood: {', '.join(failed)}.")


def write(table: DataFrame, record: dict[str, Any]) -> None:
    """Numbers, then what is made of them: a fault in a drawing loses none."""
    write_atomically(OUT / "curvature.csv", table.to_csv(index=False))
    write_atomically(OUT / "curvature.json", json.dumps(record, indent=2) + "\n")
    write_atomically(OUT / "curvature.md", markdown(table, record))
    draw(table)


def machine() -> dict[str, Any]:
    """When and on what."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def markdown(table: DataFrame, record: dict[str, Any]) -> str:
    """The README's table: median ratio and its spread over repeats."""
    lines = ["| part | ratio | model | median | least to most | target |", "|---|---|---|---|---|---|"]
    for part in PARTS:
        rows = table[table["part"] == part]
        for _, what, model, values, target in module_of(part).ratios(rows) if len(rows) else ():
            if not values:
                lines.append(f"| {part} | {what} | {model} | not reached | | {target} |")
                continue
            spread = f"{min(values):.3g} to {max(values):.3g} ({len(values)})" if len(values) > 1 else "one run"
            median = f"{pd.Series(values).median():.3g}"
            lines.append(f"| {part} | {what} | {model} | {median} | {spread} | {target} |")
    dates = sorted({entry["date"][:10] for entry in record.values()})
    where = next(iter(record.values()))
    threads = " or ".join(sorted({str(entry["threads"]) for entry in record.values()}))
    lines += ["", f"{' and '.join(dates)}, {where['machine']}, {threads} threads, torch {where['torch']}.", ""]
    return "\n".join(lines)


def draw(table: DataFrame) -> None:
    """One panel per part."""
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(3, 2, figsize=(10, 10), layout="constrained")
    for ax, part in zip(axes.flat, PARTS, strict=False):
        rows = table[table["part"] == part]
        ax.set_visible(len(rows) > 0)
        if len(rows):
            module_of(part).draw(ax, rows)
            handles, labels = ax.get_legend_handles_labels()
            unique = dict(zip(labels, handles, strict=True))
            if unique:
                ax.legend(unique.values(), unique.keys(), fontsize=6, frameon=False)
    axes.flat[-1].remove()
    figure.savefig(OUT / "curvature.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
