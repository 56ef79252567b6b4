"""Files that declare more than they hold are refused before they are read."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ssat_probe.archive import check_declared_size, check_unfolded_size, few, shown
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


@pytest.mark.parametrize("length", [2**31 - 1, 2**36, 2**62])
def test_room_is_not_made_for_a_text_that_is_not_there(tmp_path: Path, length: int) -> None:
    (tmp_path / "text.pt").write_bytes(b"\x80\x02" + pickle.BINUNICODE8 + struct.pack("<Q", length) + b"abc")
    with pytest.raises(
        ValueError, match=rf"text\.pt must declare no more bytes than the 14 it has, got {length:,}; it"
    ):
        open_content(tmp_path / "text.pt")


def test_pictures_may_be_compressed_but_not_a_thousandfold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "fair.npz", rng.integers(0, 16, (5, 32, 32), dtype=np.uint8))
    np.savez_compressed(tmp_path / "bomb.npz", np.zeros((64, 256, 256), np.uint8))
    check_unfolded_size(tmp_path / "bomb.npz")  # four megabytes do no harm
    monkeypatch.setattr("ssat_probe.archive.MOST_UNFOLDED", (2**20, 100))
    check_unfolded_size(tmp_path / "fair.npz")
    with pytest.raises(
        ValueError, match=r"bomb\.npz must unfold into at most 100 times the .* got 4,194,432; it would"
    ):
        check_unfolded_size(tmp_path / "bomb.npz")


def test_names_in_a_message_are_few_and_short() -> None:
    assert shown({"a": 1, "b" * 10**6: 2}) == f"a, {'b' * 57}..."
    assert (shown({}), shown([1])) == ("nothing", "list")
    assert few(range(9), most=2) == "0, 1"


def endless(kind: str) -> bytes:
    """A pickle whose dictionary would ask for a hash that takes forever, or goes too deep for Python's own stack."""
    head, doubled = b"\x80\x02", b"h\x00\x86q\x00"  # what is on top, twice
    chain = b"K\x01\x85q\x00" + doubled * 60
    pairs = b"ccollections\nOrderedDict\n](h\x00K\x01\x86e\x85R."
    return {
        "key": head + b"}" + chain + b"K\x01s.",
        "keys": head + b"}(" + chain + b"K\x01u.",
        "pairs": head + chain + pairs,
        "storage": head + b"(X\x07\x00\x00\x00storageK\x01" + chain + b"K\x01K\x01tQ.",
        "deep": head + b"}K\x01" + b"\x85" * 10**6 + b"K\x01s.",
        "value": head + b"}K\x01" + chain + b"s.",
    }[kind]


@pytest.mark.parametrize("kind", ["key", "keys", "pairs", "storage", "deep", "value"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_keys_whose_hash_would_take_forever_are_not_built(tmp_path: Path, kind: str, *, is_zip: bool) -> None:
    path = tmp_path / "endless.pt"
    if is_zip:
        torch.save({"weight": torch.zeros(3)}, tmp_path / "honest.pt")
        with zipfile.ZipFile(tmp_path / "honest.pt") as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                name = entry.filename
                new.writestr(name, endless(kind) if name.endswith("data.pkl") else old.read(entry))
    else:
        before = [pickle.dumps(one, protocol=2) for one in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(before) + endless(kind))
    with pytest.raises(
        ValueError, match=r"endless\.pt must unfold into at most 100 values for each of its .* got more"
    ):
        open_content(path)


def test_honest_files_use_their_values_again(tmp_path: Path) -> None:
    shared = {"lr": 1e-3, "betas": (0.9, 0.999), "names": [f"blocks.{i}" for i in range(12)]}
    state = {f"blocks.{i}.weight": torch.zeros(3, 3) for i in range(48)}
    content = {"model": state, "groups": [shared] * 100, "optimizer": {"state": {i: state for i in range(48)}}}
    for is_zip in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
        assert len(open_content(tmp_path / "a.pt")["groups"]) == 100
