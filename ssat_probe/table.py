"""Columns of a result table, and tables on disk."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

KEYS = ("block", "head", "index", "site", "depth", "log_weight", "other", "other_block", "rank")
"Columns of probes that say what a row is about; all others say what was found there."

DEFINITIONS = 1
"Edition of the formulas in docs/measures.md; counts up when one of them changes, and stands behind every name."


@dataclass(frozen=True)
class Column:
    """What a column of a table holds: the one place for its label, unit and meaning."""

    name: str
    unit: str
    meaning: str
    of: str = ""
    "Column that this one says more about: its spread, or its difference to another checkpoint."

    @property
    def label(self) -> str:
        """Axis label, with the unit where there is one."""
        text = self.name.replace("_", " ")
        return f"{text} [{self.unit}]" if self.unit else text


SPREAD = {
    "sd": "standard deviation of {} over images",
    "low": "lower end of the 95 % {how} interval over images of {}; undefined below two images",
    "high": "upper end of the 95 % {how} interval over images of {}; undefined below two images",
    "undefined": "fraction of the values that were left out of {}, because they do not exist",
}
"What stands beside every mean over images."


def with_spread(column: Column, how: str = "bootstrap") -> tuple[Column, ...]:
    """A column with its spread over images.

    Args:
        column: A mean over images, or another number that a set of images has.
        how: Its interval comes about.

    Returns:
        The column, then ``_sd``, ``_low``, ``_high`` and ``_undefined``.
    """
    name = column.name
    note = "; undefined as that is" if "undefined" in column.meaning else ""
    units = {"undefined": ""}
    return (
        column,
        *(
            Column(f"{name}_{end}", units.get(end, column.unit), meaning.format(name, how=how) + note, of=name)
            for end, meaning in SPREAD.items()
        ),
    )


def with_difference(column: Column) -> tuple[Column, ...]:
    """Columns for the difference to the first checkpoint.

    Args:
        column: A mean over images.

    Returns:
        ``_difference``, ``_difference_low`` and ``_difference_high``.
    """
    name, unit = f"{column.name}_difference", column.unit
    meanings = {
        "": f"{column.name} of the block minus that of the first checkpoint on the same images, heads "
        "averaged; empty for the first, and where images, their preparation, grids or blocks differ",
        "_low": "lower end of the paired 95 % bootstrap interval over images; empty as above",
        "_high": "upper end of the paired 95 % bootstrap interval over images; empty as above",
    }
    return tuple(Column(f"{name}{end}", unit, meaning, of=column.name) for end, meaning in meanings.items())


def rows_of(table: "DataFrame", columns: Sequence[Column], probe: str, policy: str) -> "DataFrame":
    """The same numbers, one measure per row.

    Args:
        table: Of a probe, with columns of `with_spread`.
        columns: The probe's own.
        probe: Its name.
        policy: Of what its measures are taken.

    Returns:
        What names the row (checkpoint, block, head, ...), then ``measure``, ``value``, ``sd``, ``low``, ``high``,
        ``num_images``, ``undefined``, ``unit``, ``definition`` and ``policy``; no rows if it has no such columns.
        Differences to the first checkpoint have rows where there are any, without ``sd`` and ``undefined``.
    """
    import pandas as pd

    spread = {column.of for column in columns if column.name == f"{column.of}_sd"}
    spread |= {f"{column.of}_difference" for column in columns if column.name == f"{column.of}_difference_low"}
    known = {column.name for column in columns}
    keys = [name for name in table.columns if name not in known or name in KEYS]
    nothing = pd.Series(float("nan"), index=table.index)
    parts = [
        table[keys].assign(
            measure=column.name,
            value=table[column.name],
            **{end: table.get(f"{column.name}_{end}", nothing) for end in ("sd", "low", "high")},
            num_images=table["num_images"],
            undefined=table.get(f"{column.name}_undefined", nothing),
            unit=column.unit,
            definition=f"{probe}.{column.name}/{DEFINITIONS}",
            policy=policy,
        )
        for column in columns
        if column.name in spread
    ]
    if not parts:
        return table.iloc[:0]
    rows = pd.concat(parts, ignore_index=True)
    return rows[~rows["measure"].str.endswith("_difference") | rows["value"].notna()].reset_index(drop=True)


def write_atomically(path: Path, content: bytes | str) -> Path:
    """Write a file so that it is there whole or not at all, whenever the process dies.

    Args:
        path: Where to write; its folder is made.
        content: Text (UTF-8) or bytes.

    Returns:
        ``path``; a folder that cannot be written is a ValueError.

    Raises:
        ValueError: If there is no room, or the disk fails; what was there before is left.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = _temporary(path)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:  # no space, no quota, a disk that went away
        Path(temporary).unlink(missing_ok=True)
        raise ValueError(
            f"{path} must be written whole, got {error.strerror or error}, so what was there before still is; make "
            "room, and run the same command again."
        ) from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def check_writable(folder: Path, option: str = "--out") -> None:
    """Make a folder and make sure that files can be written there, before the work whose result they will hold.

    Args:
        folder: A ValueError if it cannot be written.
        option: That chose it; goes into the message.
    """
    handle, temporary = _temporary(folder / "test", option)
    os.close(handle)
    Path(temporary).unlink()


@contextmanager
def results_in(folder: Path) -> Iterator[None]:
    """Work whose results go to a folder, which is made before it, and taken away if it fails and nothing is in it.

    Args:
        folder: A ValueError if it cannot be written.

    Yields:
        Nothing.
    """
    was_there = folder.exists()
    check_writable(folder)
    try:
        yield
    except BaseException:
        if not was_there:
            with suppress(OSError):  # something is in it
                folder.rmdir()
        raise


def _temporary(path: Path, option: str = "--out") -> tuple[int, str]:
    """An open file beside ``path``, and its name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise ValueError(
            f"{path.parent} must be a folder that can be written, got {error.strerror!r}; choose another with {option}."
        ) from error


def write_table(table: "DataFrame", path: Path, record: Mapping[str, Any]) -> Path:
    """Write ``path`` (csv) and, beside it, its record (json) of how it was made.

    The record is written last: a table with a record is complete.

    Args:
        table: Long form, one observation per row.
        path: Ends in ``.csv``.
        record: Options, hashes, versions, device, seconds; plain data.

    Returns:
        ``path``.
    """
    check_writable(path.parent)
    path.with_suffix(".json").unlink(missing_ok=True)
    write_atomically(path, table.to_csv(index=False))
    write_atomically(path.with_suffix(".json"), json.dumps(record, indent=2, sort_keys=True) + "\n")
    return path


def read_table(path: Path) -> "DataFrame":
    """Table from a csv that ``write_table`` wrote.

    Args:
        path: The csv.

    Returns:
        The table, with the dtypes that pandas infers.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    import pandas as pd

    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a table written by a probe, got no such file.")
    return pd.read_csv(path, low_memory=False)  # one type per column however long it is
