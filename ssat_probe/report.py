"""Report: a folder of tables and figures as one self-contained HTML page."""

import base64
import html
import json
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame

from ssat_probe import registry
from ssat_probe.comparison import RULE, readable, rounded
from ssat_probe.probe import IDENTITY
from ssat_probe.table import read_table, write_atomically

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.86rem; margin: 0.8rem 0; }
th, td { border-bottom: 1px solid #d9d9d9; padding: 0.3rem 0.7rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; } td { font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } img { max-width: 100%; } .quiet { color: #555; font-size: 0.88rem; }
pre { background: #f4f4f4; padding: 0.8rem; overflow-x: auto; font-size: 0.82rem; }
.supported { color: #00664b; font-weight: 600; } .contradicted { color: #a33b00; font-weight: 600; }
.inconclusive { color: #555; font-weight: 600; } summary { cursor: pointer; }
"""


def write_report(folder: Path | str) -> Path:
    """Make ``report.html`` in a folder of results.

    Args:
        folder: Holds what probes and an analysis wrote.

    Returns:
        The page: one file, which needs no other and no network.

    Raises:
        FileNotFoundError: If the folder holds no result of a probe.
    """
    folder = Path(folder)
    records = _records(folder)
    if not records:
        raise FileNotFoundError(
            f"{folder} must hold results of probes, got none; run a probe with --out {folder} first."
        )
    analysis = _json(folder / "analysis.json")
    parts = [
        _head(folder, analysis, records),
        _verdicts(folder),
        _compared(folder),
        _overview(folder, "sweep", "Sweep", "Measures over the axes of the sweep"),
        _overview(folder, "tradeoff", "Trade-off", "Measures over each other"),
        *(_figure(folder, name, records[name]) for name in records),
        _runs(analysis),
        _provenance(analysis, records),
    ]
    title = html.escape(analysis.get("title", folder.name))
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )
    return write_atomically(folder / "report.html", page)


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    """How each table was made, by its name, in the order of the probes; an analysis may measure one probe twice."""
    order = (*registry.names("probes"), *registry.names("relations"))
    found = {path.stem: _json(path) for path in sorted(folder.glob("*.json"))}
    found = {name: record for name, record in found.items() if record.get("probe") in order}
    return dict(sorted(found.items(), key=lambda item: order.index(item[1]["probe"])))


def _head(folder: Path, analysis: dict[str, Any], records: dict[str, Any]) -> str:
    """Title, when and where it was made, how to make it again."""
    title = html.escape(analysis.get("title", folder.name))
    versions = next(iter(records.values()))["versions"]
    facts = [f"ssat-probe {versions['ssat-probe']}", f"torch {versions['torch']}", f"Python {versions['python']}"]
    if not analysis:
        return f"<h1>{title}</h1><p class='quiet'>{html.escape(', '.join(facts))}</p>"
    seconds = analysis["seconds"]
    took = "not finished yet" if seconds is None else f"{seconds / 60:.1f} minutes on {analysis['cores']} cores"
    facts = [f"made {analysis['date']}", f"last run took {took}", *facts]
    of_file = "" if analysis["name"] == "mechanisms" else f" analyses/{analysis['name']}.yaml"
    command = analysis.get("command", f"ssat-probe reproduce{of_file}")  # earlier records leave it out
    return (
        f"<h1>{title}</h1><p class='quiet'>{html.escape(', '.join(facts))}</p>"
        f"<p>Every number and figure below comes from models trained by this command, which makes them again: "
        f"<code>{html.escape(command)}</code></p>"
    )


def _verdicts(folder: Path) -> str:
    """The claims with their verdicts, and the rule."""
    path = folder / "claims.csv"
    if not path.is_file() or not path.read_text(encoding="utf-8").strip():  # an analysis may claim nothing
        return ""
    table = read_table(path)
    rows = []
    for _, row in table.iterrows():
        effect = f"{row['effect']:+.4g} [{row['low']:+.4g}, {row['high']:+.4g}]"
        cells = [row["claim"], row["role"], row["measure"], row["difference"], effect, row["num_seeds"]]
        verdict = html.escape(str(row["verdict"]))
        rows.append(_cells(cells) + f"<td class='{verdict}'>{verdict}</td>")
    heads = ["claim", "role", "measure", "difference", "effect [95 % interval]", "seeds", "verdict"]
    return (
        "<h2>Claims</h2><p>The paper's claims, tested on these models and these data; a verdict here says nothing "
        "about other data, models or budgets.</p>" + _table(heads, rows) + f"<p class='quiet'>Rule: {html.escape(RULE)}"
        " The primary measure decides; secondary ones stand beside it, uncorrected for their number.</p>"
    )


def _compared(folder: Path) -> str:
    """Methods side by side."""
    path = folder / "comparison.csv"
    if not path.is_file():
        return ""
    table = read_table(path)
    seeds = sorted(set(table["num_seeds"]) - {0})
    return (
        "<h2>Comparison</h2>"
        + _frame(readable(table))
        + f"<p class='quiet'>Mean [95 % t interval] over {' or '.join(map(str, seeds))} seeds; - where not defined. "
        "The reconstruction error of SSL+FT uses the decoder as pre-training left it.</p>"
    )


def _overview(folder: Path, name: str, title: str, description: str) -> str:
    """A figure of the analysis itself, where there is one."""
    path = folder / f"{name}.png"
    if not path.is_file():
        return ""
    image = base64.b64encode(path.read_bytes()).decode()
    return (
        f"<h2>{title}</h2><img alt='{description}' src='data:image/png;base64,{image}'>"
        f"<p class='quiet'>Table: comparison.csv; vector figure: {name}.pdf.</p>"
    )


def _figure(folder: Path, name: str, record: dict[str, Any]) -> str:
    """Figure of a probe, what its columns mean, and how it was measured."""
    chosen = record["probe"]
    is_probe = chosen in registry.names("probes")
    kind = "probes" if is_probe else "relations"
    module = registry.load(kind, chosen)
    columns = (*IDENTITY, *module.Probe.columns) if is_probe else module.Relation.columns
    image = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
    summary = registry.summary(kind, chosen)
    seen = record["checkpoints"]
    images = sorted({entry["num_images"] for entry in seen})
    how = (
        f"{len(seen)} checkpoints, {' or '.join(map(str, images))} images of {record['sample']['split']}, "
        f"{record['sample']['dtype']} on {record['device']}, {record['seconds']:.1f} s in all; "
        f"options {json.dumps(record['options'])}"
    )
    glossary = [_cells([c.name, c.unit, c.meaning]) for c in columns]
    return (
        f"<h2>{html.escape(name.replace('_', ' ').capitalize())}</h2><p>{html.escape(summary)}</p>"
        f"<img alt='{html.escape(summary)}' src='data:image/png;base64,{image}'>"
        f"<p class='quiet'>{html.escape(how)}. Table: {name}.csv; vector figure: {name}.pdf.</p>"
        f"<details><summary>Columns of {name}.csv</summary>{_table(['column', 'unit', 'meaning'], glossary)}</details>"
    )


def _runs(analysis: dict[str, Any]) -> str:
    """What the trainings share, and in what they differ."""
    if not analysis:
        return ""
    recipes = DataFrame(analysis["recipes"]).map(lambda value: "" if value is None else str(value))
    differs = [column for column in recipes if recipes[column].nunique() > 1]
    shared = recipes.drop(columns=differs).iloc[0]
    return (
        f"<h2>What was run</h2><p>{len(recipes)} trainings: "
        + html.escape("; ".join(f"{name} {', '.join(dict.fromkeys(recipes[name]))}" for name in differs))
        + ". All share:</p>"
        + _table(["field", "value"], [_cells([name, value]) for name, value in shared.items() if value != ""])
        + f"<details><summary>The analysis file</summary><pre>{html.escape(analysis['source'])}</pre></details>"
    )


def _provenance(analysis: dict[str, Any], records: dict[str, Any]) -> str:
    """Hashes of weights and images, and versions."""
    record = next(iter(records.values()))
    rows = [_cells([e["checkpoint"], e["hash"][:16], e["images"][:16]]) for e in record["checkpoints"]]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        "<h2>Provenance</h2><details><summary>Hashes and versions</summary>"
        + _table(["checkpoint", "sha256 of weights and recipe", "sha256 of images"], rows)
        + f"<p class='quiet'>{html.escape(versions)}</p></details>"
    )


def _frame(table: DataFrame) -> str:
    return _table(list(table.columns), [_cells(row) for row in rounded(table).to_numpy().tolist()])


def _table(heads: list[str], rows: list[str]) -> str:
    head = "".join(f"<th>{html.escape(str(name).replace('_', ' '))}</th>" for name in heads)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


def _cells(values: list[Any]) -> str:
    return "".join(f"<td>{html.escape('' if pd.isna(value) else str(value))}</td>" for value in values)


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content
