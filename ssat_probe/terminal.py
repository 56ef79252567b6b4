"""Terminal: what a person sees of the work; the only module that prints."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

    from ssat_probe.budget import Budget
    from ssat_probe.recipe import Recipe

SILENCE_S = 60.0
"""Seconds between two lines of progress in a log file."""


def fail(sentence: str, status: int = 2) -> None:
    """Say on stderr what went wrong, and exit.

    Args:
        sentence: Put on one line.
        status: Of the process.
    """
    print(" ".join(sentence.split()), file=sys.stderr)  # noqa: T201
    sys.exit(status)


def say(line: str) -> None:
    """Print a line.

    Args:
        line: Without its end.
    """
    print(line)  # noqa: T201


@contextmanager
def warnings_said() -> Iterator[None]:
    """Within the block, a warning of ours is one sentence on stderr.

    Yields:
        Nothing; warnings are as before afterwards.
    """
    import warnings

    def shown(message: Warning | str, *others: object) -> None:
        print(" ".join(f"Warning: {message}".split()), file=sys.stderr)  # noqa: T201

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module=r"ssat_probe\.")
        warnings.showwarning = shown  # type: ignore[assignment]
        yield


@contextmanager
def hushed(is_silent: bool) -> Iterator[None]:
    """Within the block, nothing is printed if another process prints the same.

    Args:
        is_silent: Whether one does.

    Yields:
        Nothing.
    """
    with open(os.devnull, "w") as nowhere, ExitStack() as stack:  # noqa: PTH123
        if is_silent:
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar with an estimate on stderr, gone when it is done; where stderr is no terminal, a line a minute.

    Yields:
        To be called with how much is done, of how much, and a few words.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_interactive:  # rich would leave an empty line
        yield _lines()
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)

        yield update


def _lines() -> Callable[[int, int, str], None]:
    """Progress for a log file: a line a minute; what a resumed run finds done sets no pace."""
    said = started = began = time.monotonic()
    first: int | None = None

    def update(done: int, total: int, text: str) -> None:
        nonlocal said, first, began
        now = time.monotonic()
        if first is None:  # what came before the first call, such as checks, sets no pace either
            first, began = done, now
        if now - said < SILENCE_S:
            return
        said = now
        left = f", about {(now - began) * (total - done) / (done - first) / 60:.0f} min left" if done > first else ""
        print(f"{done:,} of {total:,} after {(now - started) / 60:.0f} min{left}: {text}", file=sys.stderr)  # noqa: T201

    return update


def print_budget(recipe: "Recipe", budget: "Budget", name: str = "") -> None:
    """What a run costs, in a few lines.

    Args:
        recipe: Of the run.
        budget: Of it.
        name: Of the run, where it is not the recipe's: those of a sweep differ in their points.
    """
    decoder = f" + {budget.decoder_parameters:,} in the decoder" if budget.decoder_parameters else ""
    rate = f"peak learning rate {recipe.learning_rate:g}"
    say(f"{name or recipe.name}: {budget.encoder_parameters:,} parameters{decoder}, {rate}")
    for stage in budget.stages:
        say(
            f"  {stage.name}: {stage.epochs} epochs, {stage.steps:,} steps, {stage.images:,} images, "
            f"{stage.multiply_adds_per_image / 1e6:,.3g} M multiply-adds per image forward"
        )


def print_table(table: "DataFrame") -> None:
    """A table that can be read in a terminal; turned on its side if it is too wide but has few rows.

    Args:
        table: Underscores of its column names are shown as spaces.
    """
    from rich.console import Console
    from rich.table import Table

    heads = [str(name).replace("_", " ") for name in table.columns]
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in table.itertuples(index=False)]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, sum(widths) + 3 * len(widths) + 1)
    if sum(widths) + 3 * len(widths) + 1 > console.width and len(cells) < len(heads):
        heads, *cells = [list(line) for line in zip(heads, *cells, strict=True)]
    shown = Table(header_style="bold")
    for place, head in enumerate(heads):
        shown.add_column(head, justify="right" if place else "left", overflow="fold")
    for line in cells:
        shown.add_row(*line)
    console.print(shown)


def print_verdicts(verdicts: "DataFrame") -> None:
    """One claim per paragraph.

    Args:
        verdicts: Of ``analysis.run``.
    """
    for row in verdicts.itertuples(index=False):
        say(f"{row.verdict}: {row.claim} ({row.role})")
        say(
            f"    {row.measure}, {row.difference}: {row.effect:+.4g} [{row.low:+.4g}, {row.high:+.4g}], "
            f"{row.num_seeds} seeds"
        )
