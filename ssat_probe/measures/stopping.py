"""When a Lanczos run has gone on for long enough: the certain bracket is narrow, or both ends are sharp."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ssat_probe.measures.lanczos import Krylov, ritz
from ssat_probe.measures.quadrature import mass
from ssat_probe.measures.spectrum import distance_kept
from ssat_probe.registry import known

RULES = ("bracket", "residual")
TAU = 1e-3  # threshold whose bracket is looked at, as a share of the largest eigenvalue; CURVATURE notes 8.3 (c)
EARLIEST = 10  # steps before which no rule is asked: outliers are not found before some log(size) steps; no source


@dataclass(frozen=True)
class Until:
    """One rule: what must come down to which limit."""

    rule: str
    "bracket: width of the certain bracket of the share below -τ λmax, τ = 1e-3; residual: the larger of both ends'."
    limit: float


def until(text: str) -> Until:
    """A rule from words.

    Args:
        text: ``bracket=0.01`` or ``residual=1e-3``.

    Returns:
        The rule.

    Raises:
        ValueError: If there is no such rule, or the limit is no positive number.
    """
    name, sign, number = text.partition("=")
    known(name, RULES, "stopping rules")
    try:
        limit = float(number)
    except ValueError:
        limit = float("nan")
    if not (sign and limit > 0):
        raise ValueError(f"until must be as 'bracket=0.01' or 'residual=1e-3', got {text!r}. Give a positive number.")
    return Until(name, limit)


def measured(rule: str, krylov: Krylov, noise: float) -> float:
    """What a rule looks at.

    Args:
        rule: One of ``RULES``.
        krylov: The run so far.
        noise: Noise floor of the products.

    Returns:
        Width of the bracket, or the larger relative residual of the outermost Ritz values.
    """
    found = ritz(krylov)
    if rule == "residual":
        ends = [float(found.residuals[end] / abs(found.values[end])) if found.values[end] else 0.0 for end in (0, -1)]
        return max(ends)
    scale = float(found.values[-1]) if found.values[-1] > 0 else krylov.scale
    return mass([krylov], None, -TAU * scale, distance_kept([krylov], noise)).width


def is_reached(rules: Sequence[Until], krylov: Krylov, noise: float) -> bool:
    """Whether a run may stop.

    Args:
        rules: All of them must hold; with none a run never stops by itself.
        krylov: The run so far.
        noise: Noise floor of the products.

    Returns:
        Whether it may.
    """
    if not rules or len(krylov.alphas) < EARLIEST:
        return False
    return all(measured(one.rule, krylov, noise) <= one.limit for one in rules)


def run_length(krylovs: Sequence[Krylov], rules: Sequence[Until], noise: float) -> list[dict[str, Any]]:
    """Rows of a table: steps that each run took, and what the rules measured at its end.

    Args:
        krylovs: Finished runs.
        rules: Of `is_reached`.
        noise: Noise floor of the products.

    Returns:
        ``steps_used`` per start vector, then ``until_<rule>`` with the limit as ``high`` and a flag.
    """
    rows: list[dict[str, Any]] = []
    for probe, krylov in enumerate(krylovs):
        rows.append({"quantity": "steps_used", "probe": probe, "value": len(krylov.alphas)})
        for one in rules:
            value = measured(one.rule, krylov, noise)
            flag = {"high": one.limit, "converged": float(value <= one.limit)}
            rows.append({"quantity": f"until_{one.rule}", "probe": probe, "value": value} | flag)
    return rows
