"""What a file of tensors declares about its own size, looked at before anything is read into memory."""

import pickletools
import struct
import zipfile
from pathlib import Path


def check_declared_size(path: Path) -> None:
    """Refuse a file that would unfold into more than it holds: a zip bomb, or a tensor longer than its file.

    Files of torch and safetensors are not compressed, so what they declare can never exceed what lies on disk.

    Args:
        path: A zip archive or a pickle; anything else passes, its reader will say what is wrong.

    Raises:
        ValueError: If the declared size exceeds the file's.
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


def _of_zip(path: Path) -> int:
    """Bytes of all entries once unpacked, as the directory states them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError, struct.error, LookupError):
        return 0


def _of_pickle(path: Path) -> int:
    """Values of all storages that an old torch file declares; each is at least a byte."""
    declared, latest = 0, 0
    with path.open("rb") as file:
        try:
            for _ in range(4):  # magic number, protocol, system, content
                for opcode, argument, _ in pickletools.genops(file):
                    if isinstance(argument, int) and opcode.name.startswith(("BININT", "INT", "LONG")):
                        latest = argument
                    declared += latest if opcode.name == "BINPERSID" else 0
        except (ValueError, LookupError, OverflowError, EOFError):
            return declared
    return declared
