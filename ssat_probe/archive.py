"""What a file of tensors declares about its own size, looked at before anything is read into memory."""

import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from ssat_probe.unfolding import MOST_NESTED, MOST_SHARING, unfold

MOST_UNFOLDED = (2**30, 100)
"What an archive may unfold into: bytes, or times its own size, whichever is more. Tuned: pictures deflate to a half."


def check_declared_size(path: Path) -> None:
    """Refuse a file that would unfold into more than it holds: a zip bomb, a tensor longer than its file, endless keys.

    Files of torch and safetensors are not compressed, so what they declare can never exceed what lies on disk. The
    values of their pickles may be used again, but not so often that a walk over them has no end.

    Args:
        path: A zip archive or a pickle; anything else passes, its reader will say what is wrong.

    Raises:
        ValueError: If the declared size exceeds the file's, or its pickle unfolds into too many values.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    declared = _of_zip(path) if is_zip else _of_pickle(path)
    if declared > size:
        raise ValueError(
            f"{path} must declare no more bytes than the {size:,} it has, got {declared:,}; it would fill the memory "
            "when opened, so it was not: get the file again from whom you trust."
        )
    _check_pickles(path, is_zip)


def _check_pickles(path: Path, is_zip: bool) -> None:
    """Refuse values within values without end, before a dictionary asks for the hash of one."""
    try:
        with zipfile.ZipFile(path) if is_zip else path.open("rb") as file:
            pickles: list[Any] = [file] * 4  # magic number, protocol, system, content
            if isinstance(file, zipfile.ZipFile):
                pickles = [file.open(name) for name in file.namelist() if name.endswith("data.pkl")]
            for one in pickles:
                most = MOST_SHARING * path.stat().st_size
                found = unfold(_Bounded(one, path.stat().st_size), most)  # type: ignore[arg-type]
                if found.size > most or found.depth > MOST_NESTED:
                    raise _EndlessError
    except _EndlessError as error:
        raise ValueError(
            f"{path} must unfold into at most {MOST_SHARING} values for each of its {path.stat().st_size:,} bytes, "
            f"nested at most {MOST_NESTED} deep, got more; opening it might never end, so it was not opened: get the "
            "file again from whom you trust."
        ) from error
    except (ValueError, LookupError, OverflowError, EOFError, OSError, RuntimeError, NotImplementedError, zlib.error):
        return  # no pickle, or a damaged one: its reader will say so
    except (zipfile.BadZipFile, struct.error):
        return


class _EndlessError(Exception):
    """A pickle unfolds into too much."""


def check_unfolded_size(path: Path) -> None:
    """Refuse a compressed archive that is a zip bomb; anything else passes, its reader will say what is wrong.

    Args:
        path: Such as an .npz of numpy.

    Raises:
        ValueError: If it would unfold into more than `MOST_UNFOLDED`.
    """
    size, declared = path.stat().st_size, _of_zip(path)
    if declared > max(MOST_UNFOLDED[0], MOST_UNFOLDED[1] * size):
        raise ValueError(
            f"{path} must unfold into at most {MOST_UNFOLDED[1]} times the {size:,} bytes it has, got {declared:,}; it "
            "would fill the memory, so it was not opened: store its arrays uncompressed if they are what you want."
        )


def shown(content: Any) -> str:
    """What a file holds, for a message: its first names, none of them longer than a line can bear.

    Args:
        content: Of the file.

    Returns:
        Text; "nothing" for a dictionary without entries, the type for what is none.
    """
    if not isinstance(content, dict):
        return type(content).__name__
    return few(content) or "nothing"


def few(names: Iterable[Any], most: int = 5) -> str:
    """The first of some names, each cut short.

    Args:
        names: Any number of them, of any length.
        most: How many to show.

    Returns:
        Text.
    """
    texts = [str(name) for name, _ in zip(names, range(most), strict=False)]
    return ", ".join(text if len(text) <= 60 else f"{text[:57]}..." for text in texts)


def _of_zip(path: Path) -> int:
    """Bytes of all entries once unpacked, as the directory states them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError, struct.error, LookupError):
        return 0


def _of_pickle(path: Path) -> int:
    """Values of all storages that an old torch file declares, each at least a byte; or the bytes of a text."""
    declared, latest = 0, 0
    with path.open("rb") as opened:
        file = _Bounded(opened, path.stat().st_size)
        try:
            for _ in range(4):  # magic number, protocol, system, content
                for opcode, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]  # it reads, no more
                    if isinstance(argument, int) and opcode.name.startswith(("BININT", "INT", "LONG")):
                        latest = argument
                    declared += latest if opcode.name == "BINPERSID" else 0
        except (ValueError, LookupError, OverflowError, EOFError):
            return max(declared, file.wanted)
    return declared


class _Bounded:
    """A file that is not asked for more than it has: Python would first make room for all of it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.wanted = 0
        "Most bytes that were asked for at once, beyond those of an opcode and its number."

    def read(self, count: int) -> bytes:
        self.wanted = max(self.wanted, count if count > 8 else 0)
        return self._file.read(min(count, self._size))

    def readline(self) -> bytes:
        return self._file.readline()

    def tell(self) -> int:
        return self._file.tell()
