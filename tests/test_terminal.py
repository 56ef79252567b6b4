"""Terminal: sentences, tables, silence."""

import pandas as pd
import pytest

from ssat_probe import terminal


def test_a_failure_is_one_line_on_stderr_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        terminal.fail("steps must be positive,\n   got 0; pass 1.", status=3)
    shown = capsys.readouterr()
    assert (shown.out, shown.err, caught.value.code) == ("", "steps must be positive, got 0; pass 1.\n", 3)


def test_within_silence_nothing_is_printed_and_behind_it_all_is(capfd: pytest.CaptureFixture[str]) -> None:
    with terminal.hushed(is_silent=True):
        terminal.say("hidden")
    with terminal.hushed(is_silent=False):
        terminal.say("first")
    terminal.say("second")
    assert capfd.readouterr().out == "first\nsecond\n"


@pytest.mark.parametrize(("num_columns", "first"), [(2, ["column 0", "column 1"]), (30, ["column 0", "0.1235"])])
def test_a_table_too_wide_for_the_terminal_is_turned_on_its_side(
    num_columns: int, first: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stdout for a terminal
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.print_table(pd.DataFrame({f"column_{k}": [0.12345 + k] for k in range(num_columns)}))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.replace("\x1b[1m", "").replace("\x1b[0m", "")) <= 60 for line in lines)
    assert [name in lines[1] for name in first] == [True, True]


def test_without_a_terminal_a_wide_table_keeps_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(pd.DataFrame({f"column_{k}": [k, -k] for k in range(30)}))
    shown = capsys.readouterr().out
    assert "column 0" in shown.splitlines()[1]
    assert "column 29" in shown.splitlines()[1]


def test_a_log_file_gets_a_line_a_minute_with_an_estimate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 59.0, 61.0, 90.0, 122.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.progress() as progress:
        for done in (1_000, 1_100, 1_200, 1_300, 1_400):  # a thousand were there from an earlier run
            progress(done, 2_000, "cells")
    assert capsys.readouterr().err.splitlines() == [
        "1,200 of 2,000 after 1 min, about 4 min left: cells",
        "1,400 of 2,000 after 2 min, about 3 min left: cells",
    ]


def test_a_log_file_holds_nothing_of_what_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress() as progress:
        progress(1, 2, "half")
    assert capsys.readouterr() == ("", "")
