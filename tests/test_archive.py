"""Files that declare more than they hold are refused before they are read."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from ssat_probe.archive import check_declared_size
from ssat_probe.container import open_content


def test_honest_files_pass(tmp_path: Path) -> None:
    state = {"a": torch.zeros(97), "b": torch.zeros(89, dtype=torch.float64)}
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text.pt").write_text("no tensors")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "new.pt").read_bytes()[:500])
    for path in tmp_path.iterdir():
        check_declared_size(path)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """The pickle and the tensor of a real file, with the tensor's bytes compressed a thousandfold."""
    torch.save({"weight": torch.zeros(10**7)}, tmp_path / "honest.pt")
    path = tmp_path / "bomb.pt"
    with (
        zipfile.ZipFile(tmp_path / "honest.pt") as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match=rf"bomb\.pt must declare no more bytes than the {path.stat().st_size:,} it"):
        open_content(path)


def test_an_old_file_with_an_absurd_storage_is_not_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(23)}, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    number = pickle.BININT1 + b"\x17"  # 23, once as the storage's length
    assert number in content
    longer = content.replace(number, pickle.BININT + struct.pack("<i", 2**31 - 1))
    (tmp_path / "long.pt").write_bytes(longer)
    with pytest.raises(ValueError, match=r"long\.pt must declare no more bytes .* got 2,147,483,647; it would fill"):
        open_content(tmp_path / "long.pt")
