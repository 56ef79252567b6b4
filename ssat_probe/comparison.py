"""Compare methods over seeds, and judge claims by intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame, Series

from ssat_probe.drawing import METHOD_LABELS
from ssat_probe.measures.statistics import paired_difference, t_interval, verdict
from ssat_probe.point import at, named, points_over, shown
from ssat_probe.registry import known
from ssat_probe.table import write_atomically

RULE = (
    "supported: the 95 % t interval of the paired difference over seeds lies wholly on the claimed side of 0; "
    "contradicted: wholly on the other side; inconclusive: otherwise."
)

ROLES = ("primary", "secondary")
"Of claims: those that decide, and those that stand beside them."

RESULTS = ("measure", "unit", "mean", "low", "high", "num_seeds")
"Columns of a comparison behind the method and the axes of a sweep."


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
    at: tuple[Mapping[str, Any], Mapping[str, Any]] = field(default=({}, {}))
    "Of a sweep, where the first and the second stand on its axes."


def measure_from(name: str, values: Mapping[str, Any]) -> Measure:
    """Measure from an analysis file.

    Args:
        name: Its name there.
        values: probe, column, and perhaps where and unit.

    Returns:
        The measure; an unknown key is a ValueError.

    Raises:
        ValueError: If a key is missing or its value is no text.
    """
    for key in values:
        known(str(key), [field.name for field in fields(Measure)[1:]], f"the keys of measure {name!r}")
    for key in ("probe", "column", *values):
        if not isinstance(values.get(key), str):
            raise ValueError(
                f"The {key} of measure {name!r} must be text, got {values.get(key)!r}; write one such as "
                "{probe: accuracy, column: accuracy, where: seed > 0, unit: s}."
            )
    return Measure(name=name, **values)


def claim_from(values: Mapping[str, Any], measures: Mapping[str, Measure]) -> Claim:
    """Claim from an analysis file.

    Args:
        values: claim, measure, sign, and perhaps methods and role.
        measures: Of the same file.

    Returns:
        The claim; an unknown key or measure is a ValueError.

    Raises:
        ValueError: If it says nothing, the sign is neither 1 nor -1, the methods are not two, or ``at`` is neither one
            point of a sweep nor two.
    """
    for key in values:
        known(str(key), [field.name for field in fields(Claim)], "the keys of a claim")
    if not isinstance(values.get("claim"), str):
        raise ValueError(
            f"A claim must say in text what is claimed, got {dict(values)!r}; write claim: SSAT is better."
        )
    known(str(values.get("measure", "")), measures, "measures")
    known(str(values.get("role", Claim.role)), ROLES, f"the roles of a claim, which {values['claim']!r} is")
    if type(values.get("sign")) is not int or values["sign"] not in (1, -1):
        raise ValueError(f"The sign of claim {values['claim']!r} must be 1 or -1, got {values.get('sign')!r}.")
    pair = values.get("methods", list(Claim.methods))
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(method, str) for method in pair):
        raise ValueError(
            f"The methods of claim {values['claim']!r} must be two, the one with the higher measure at sign 1 first, "
            f"got {pair!r}; write methods: [ssat, ssl_ft]."
        )
    options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if "at" in options:
        points = (options["at"],) * 2 if isinstance(options["at"], dict) else options["at"]
        if not isinstance(points, tuple) or [type(point) for point in points] != [dict, dict]:
            raise ValueError(
                f"Where claim {values['claim']!r} is made must be one point or two, got {values['at']!r}; write "
                "at: {lambda_weight: 0.1}, or one for each method."
            )
        options["at"] = tuple({axis: named(value) for axis, value in point.items()} for point in points)
    return Claim(**options)


def compare(
    measures: Mapping[str, Measure],
    claims: Sequence[Claim],
    tables: Mapping[str, DataFrame],
    costs: DataFrame,
    axes: Sequence[str] = (),
) -> tuple[DataFrame, DataFrame]:
    """Methods side by side, at each point of a sweep, and a verdict per claim.

    Args:
        measures: By name.
        claims: About them.
        tables: Of each probe, all checkpoints.
        costs: ``checkpoint``, ``model``, ``method``, ``seed``, ``seconds`` and ``images`` of every training.
        axes: Of a sweep: columns of all tables that say where a training stands; empty where it depends on none.

    Returns:
        The comparison (method, axes, measure, unit, mean, low, high, num_seeds) and the verdicts (claim, role, measure,
        difference, effect, low, high, num_seeds, verdict).
    """
    parts = [costs, *tables.values()]
    identity = pd.concat([one[["checkpoint", "method", "seed", *axes]] for one in parts])
    identity = identity.where(identity.notna()).drop_duplicates(ignore_index=True)
    sources = {**tables, "cost": costs}
    values = identity.copy()
    for name, measure in measures.items():
        table = sources[known(measure.probe, sources, f"the probes of measure {name!r}")]
        values[name] = values["checkpoint"].map(measure.of(table))
        _check_settings(name, values, table, axes)
        _check_unique(name, values, axes)
    rows = []
    for key, group in values.groupby(["method", *axes], sort=False, dropna=False):
        for name, measure in measures.items():
            defined = group[name].dropna().tolist()
            mean, low, high = t_interval(defined) if defined else (float("nan"),) * 3
            rows.append((*key, name, measure.unit, mean, low, high, len(defined)))
    compared = DataFrame(rows, columns=["method", *axes, *RESULTS])
    return compared, DataFrame([_judged(claim, values) for claim in claims])


def _check_settings(name: str, values: DataFrame, table: DataFrame, axes: Sequence[str]) -> None:
    """Refuse to average over seeds that see the images at another size, on another grid or prepared otherwise."""
    if "setting" not in table:
        return
    settings = values["checkpoint"].map(table.drop_duplicates("checkpoint").set_index("checkpoint")["setting"])
    keys = [values["method"], *(values[axis] for axis in axes)]
    for (method, *_), group in settings[values[name].notna()].groupby(keys, dropna=False):
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
    judged = markdown(rounded(verdicts)) + f"\n{RULE}\n" if len(verdicts) else "This analysis makes no claims.\n"
    write_atomically(out / "claims.md", judged)


def readable(compared: DataFrame) -> DataFrame:
    """The comparison as people read it: a row per measure (and point of a sweep), a column per method.

    A cell is ``mean [low, high]``; a method that does not depend on where the row stands says the same in each.

    Args:
        compared: From ``compare``.

    Returns:
        Text.
    """
    methods, points = list(dict.fromkeys(compared["method"])), points_over(compared, axes_of(compared))
    rows = []
    for name, group in compared.groupby("measure", sort=False):
        for point in points:
            row = {"measure": with_unit(str(name), group["unit"].iloc[0])}
            row |= {axis: shown(value) for axis, value in point.items()}
            here = at(group, point)
            for method in methods:
                one = here[here["method"] == method].iloc[0]
                row[METHOD_LABELS.get(method, method)] = _interval(one["mean"], one["low"], one["high"])
            rows.append(row)
    return DataFrame(rows)


def axes_of(compared: DataFrame) -> list[str]:
    """Axes of a sweep.

    Args:
        compared: From ``compare``.

    Returns:
        Names of the columns that say where a row stands; none for an analysis without a sweep.
    """
    return [str(name) for name in compared if name not in ("method", *RESULTS)]


def with_unit(measure: str, unit: Any) -> str:
    """A measure as people read it.

    Args:
        measure: Its name.
        unit: None, empty or NaN for none.

    Returns:
        The unit in brackets behind the name.
    """
    return f"{measure} [{unit}]" if unit and not pd.isna(unit) else measure


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


def _check_unique(name: str, values: DataFrame, axes: Sequence[str]) -> None:
    """A measure must give one number per method, point and seed: not one for each of two models."""
    defined = values[values[name].notna()]
    if defined.duplicated(["method", "seed", *axes]).any():
        raise ValueError(
            f"Measure {name!r} must give one number per method and seed, got one for each of several models. "
            "Choose one: where: model == '...'."
        )


def _by_seed(claim: Claim, values: DataFrame, method: str, point: Mapping[str, Any]) -> dict[Any, float]:
    """What one side of a claim is about."""
    found = at(values[values["method"] == method], point).set_index("seed")[claim.measure].dropna()
    if found.index.has_duplicates:
        raise ValueError(
            f"Claim {claim.claim!r} must be about one training of {method} per seed, got {len(found)} of "
            f"{found.index.nunique()} seeds; say where on the axes with at:."
        )
    return found.to_dict()


def _judged(claim: Claim, values: DataFrame) -> dict[str, Any]:
    """Effect of a claim, paired by seed, and its verdict."""
    first, second = (
        _by_seed(claim, values, method, point) for method, point in zip(claim.methods, claim.at, strict=True)
    )
    seeds = first.keys() & second.keys()
    nan = float("nan")
    effect, low, high = paired_difference(first, second) if seeds else (nan, nan, nan)
    return {
        "claim": claim.claim,
        "role": claim.role,
        "measure": claim.measure,
        "difference": " - ".join(
            " ".join([METHOD_LABELS.get(method, method), *(f"{axis}={value}" for axis, value in point.items())])
            for method, point in zip(claim.methods, claim.at, strict=True)
        ),
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
