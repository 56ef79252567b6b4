from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from ssat_probe.paired import Paired


class Counting(Paired):
    """Observes numbers, and tabulates them beside the first."""

    def observe(self, subject: Any) -> Any:
        return SimpleNamespace(value=subject, comparable=lambda first: first if first.value != subject else None)

    def tabulate(self, seen: Any, first: Any) -> pd.DataFrame:
        return pd.DataFrame({"value": [seen.value], "difference": [seen.value - first.value if first else None]})


def test_one_checkpoint_has_no_differences() -> None:
    assert Counting().measure(7)["difference"].isna().all()  # type: ignore[arg-type]


def test_all_are_compared_with_the_first_and_looked_at_one_after_another() -> None:
    alive: list[int] = []

    def subjects() -> Iterator[tuple[str, Any]]:
        for value in (3, 5, 11):
            alive.append(value)
            yield f"number {value}", value

    tables = Counting().between(subjects())
    assert [one["value"].item() for one in tables] == alive == [3, 5, 11]
    assert [one["difference"].item() for one in tables[1:]] == [2, 8]
    assert tables[0]["difference"].isna().all()


def test_a_probe_must_say_what_it_observes() -> None:
    with pytest.raises(TypeError, match=r"abstract methods '?observe'?, '?tabulate'?"):
        Paired()  # type: ignore[abstract]
