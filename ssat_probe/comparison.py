"""Compare methods over seeds, and judge claims by intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from ssat_probe.drawing import METHOD_LABELS
from ssat_probe.measures.statistics import paired_difference, t_interval, verdict
from ssat_probe.registry import known
from ssat_probe.table import write_atomically

RULE = (
    "supported: the 95 % t interval of the paired difference over seeds lies wholly on the claimed side of 0; "
    "contradicted: wholly on the other side; inconclusive: otherwise."
)


@dataclass(frozen=True)
class Measure:
    """A number per checkpoint: the mean of a column of a probe's table over the rows that a condition selects."""

    name: str
    probe: str
    "A probe, or cost."
    column: str
    where: str = ""
    "Condition on the rows, as pandas.DataFrame.query takes it; empty means all."
    unit: str = ""

    def of(self, table: DataFrame) -> Series:
        """Value of each checkpoint.

        Args:
            table: Of the probe.

        Returns:
            Indexed by checkpoint; NaN where it is not defined.

        Raises:
            ValueError: If the column or the condition does not fit the table.
        """
        known(self.column, map(str, table.columns), f"the columns of {self.probe}")
        try:
            rows = table.query(self.where) if self.where else table
        except Exception as error:  # pandas raises what numexpr, python and itself raise
            raise ValueError(
                f"The condition of measure {self.name!r} must select rows of {self.probe}, "
                f"got {self.where!r} ({error}); mend it."
            ) from error
        if rows.empty:
            raise ValueError(
                f"The condition of measure {self.name!r} must select rows of {self.probe}, "
                f"got none for {self.where!r}; see the columns of {self.probe}.csv."
            )
        if "epoch" in rows and (rows.groupby("checkpoint")["epoch"].nunique() > 1).any():
            raise ValueError(
                f"The condition of measure {self.name!r} must select one epoch of each run, got "
                f"{', '.join(map(str, sorted(rows['epoch'].unique())))}; add one, such as: and epoch == epoch.max()."
            )
        return rows.groupby("checkpoint", sort=False)[self.column].mean()


@dataclass(frozen=True)
class Claim:
    """A claim about two methods: the first one's measure is higher, or lower."""

    claim: str
    measure: str
    sign: int
    "+1 if the first is claimed to be higher, -1 if lower."
    methods: tuple[str, str] = ("ssat", "ssl_ft")
    role: str = "primary"
    "primary: decides; secondary: beside it."


def measure_from(name: str, values: Mapping[str, Any]) -> Measure:
    """Measure from an analysis file.

    Args:
        name: Its name there.
        values: probe, column, and perhaps where and unit.

    Returns:
        The measure; an unknown key is a ValueError.
    """
    for key in values:
        known(key, [field.name for field in fields(Measure)], f"the keys of measure {name!r}")
    return Measure(name=name, **values)


def claim_from(values: Mapping[str, Any], measures: Mapping[str, Measure]) -> Claim:
    """Claim from an analysis file.

    Args:
        values: claim, measure, sign, and perhaps methods and role.
        measures: Of the same file.

    Returns:
        The claim; an unknown key or measure is a ValueError.

    Raises:
        ValueError: If the sign is neither 1 nor -1.
    """
    for key in values:
        known(key, [field.name for field in fields(Claim)], "the keys of a claim")
    known(values.get("measure", ""), measures, "measures")
    if values.get("sign") not in (1, -1):
        raise ValueError(f"The sign of claim {values.get('claim')!r} must be 1 or -1, got {values.get('sign')!r}.")
    options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Claim(**options)


def compare(
    measures: Mapping[str, Measure], claims: Sequence[Claim], tables: Mapping[str, DataFrame], costs: DataFrame
) -> tuple[DataFrame, DataFrame]:
    """Methods side by side, and a verdict per claim.

    Args:
        measures: By name.
        claims: About them.
        tables: Of each probe, all checkpoints.
        costs: ``checkpoint``, ``model``, ``method``, ``seed``, ``seconds`` and ``images`` of every training.

    Returns:
        The comparison (method, measure, unit, mean, low, high, num_seeds) and the verdicts (claim, role, measure,
        difference, effect, low, high, num_seeds, verdict).
    """
    parts = [costs, *tables.values()]
    identity = pd.concat([one[["checkpoint", "method", "seed"]] for one in parts]).drop_duplicates()
    sources = {**tables, "cost": costs}
    values = identity.copy()
    for name, measure in measures.items():
        table = sources[known(measure.probe, sources, f"the probes of measure {name!r}")]
        values[name] = values["checkpoint"].map(measure.of(table))
        _check_settings(name, values, table)
        _check_unique(name, values)
    rows = []
    for method, group in values.groupby("method", sort=False):
        for name, measure in measures.items():
            defined = group[name].dropna().tolist()
            mean, low, high = t_interval(defined) if defined else (float("nan"),) * 3
            rows.append((method, name, measure.unit, mean, low, high, len(defined)))
    compared = DataFrame(rows, columns=["method", "measure", "unit", "mean", "low", "high", "num_seeds"])
    return compared, DataFrame([_judged(claim, values) for claim in claims])


def _check_settings(name: str, values: DataFrame, table: DataFrame) -> None:
    """Refuse to average over seeds that see the images at another size, on another grid or prepared otherwise."""
    if "setting" not in table:
        return
    settings = values["checkpoint"].map(table.drop_duplicates("checkpoint").set_index("checkpoint")["setting"])
    for method, group in settings[values[name].notna()].groupby(values["method"]):
        if len(seen := group.dropna().unique().tolist()) > 1:
            raise ValueError(
                f"Measure {name!r} must be of one setting for all seeds of {method}, got {' and '.join(seen)}; select "
                "one with its condition, such as where: setting.str.startswith('32x32')."
            )


def write(compared: DataFrame, verdicts: DataFrame, out: Path) -> None:
    """Write ``comparison.csv``, ``.md``, ``.tex`` and ``claims.csv``, ``.md``.

    Args:
        compared: From ``compare``.
        verdicts: From ``compare``.
        out: The folder.
    """
    wide = readable(compared)
    write_atomically(out / "comparison.csv", compared.to_csv(index=False))
    write_atomically(out / "comparison.md", markdown(wide))
    write_atomically(out / "comparison.tex", _latex(wide))
    write_atomically(out / "claims.csv", verdicts.to_csv(index=False))
    write_atomically(out / "claims.md", markdown(rounded(verdicts)) + f"\n{RULE}\n")


def readable(compared: DataFrame) -> DataFrame:
    """The comparison as people read it: a row per measure, a column per method, ``mean [low, high]``.

    Args:
        compared: From ``compare``.

    Returns:
        Text.
    """
    methods = list(dict.fromkeys(compared["method"]))
    rows = []
    for name, group in compared.groupby("measure", sort=False):
        unit = group["unit"].iloc[0]
        row = {"measure": f"{name} [{unit}]" if unit and not pd.isna(unit) else name}
        for method in methods:
            one = group[group["method"] == method].iloc[0]
            row[METHOD_LABELS.get(method, method)] = _interval(one["mean"], one["low"], one["high"])
        rows.append(row)
    return DataFrame(rows)


def rounded(table: DataFrame) -> DataFrame:
    """Numbers to four significant digits, as text.

    Args:
        table: Any.

    Returns:
        A copy.
    """
    return table.map(lambda value: f"{value:.4g}" if isinstance(value, float) else str(value))


def markdown(table: DataFrame) -> str:
    """A table in Markdown.

    Args:
        table: Text cells.

    Returns:
        Lines, with one at the end.
    """
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def _check_unique(name: str, values: DataFrame) -> None:
    """A measure must give one number per method and seed: not one for each of two models."""
    defined = values[values[name].notna()]
    if defined.duplicated(["method", "seed"]).any():
        raise ValueError(
            f"Measure {name!r} must give one number per method and seed, got one for each of several models. "
            "Choose one: where: model == '...'."
        )


def _judged(claim: Claim, values: DataFrame) -> dict[str, Any]:
    """Effect of a claim, paired by seed, and its verdict."""
    first, second = (
        values[values["method"] == method].set_index("seed")[claim.measure].dropna().to_dict()
        for method in claim.methods
    )
    seeds = first.keys() & second.keys()
    nan = float("nan")
    effect, low, high = paired_difference(first, second) if seeds else (nan, nan, nan)
    return {
        "claim": claim.claim,
        "role": claim.role,
        "measure": claim.measure,
        "difference": " - ".join(METHOD_LABELS.get(method, method) for method in claim.methods),
        "effect": effect,
        "low": low,
        "high": high,
        "num_seeds": len(seeds),
        "verdict": verdict(low, high, claim.sign),
    }


def _interval(mean: float, low: float, high: float) -> str:
    if pd.isna(mean):
        return "-"
    number = "{:,.0f}" if abs(mean) >= 1000 else "{:.4g}"
    shape = number if pd.isna(low) or low == high else f"{number} [{number}, {number}]"
    return shape.format(mean, low, high)


def _latex(table: DataFrame) -> str:
    """A table in LaTeX, for booktabs."""
    escapes = {"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "²": "$^2$", "λ": r"$\lambda$", "Σ": r"$\Sigma$"}

    def escaped(text: str) -> str:
        return "".join(escapes.get(letter, letter) for letter in str(text))

    lines = [r"\begin{tabular}{l" + "r" * (len(table.columns) - 1) + "}", r"\toprule"]
    rows = [list(table.columns), *table.to_numpy().tolist()]
    lines += [" & ".join(map(escaped, row)) + r" \\" for row in rows]
    lines.insert(3, r"\midrule")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
