import errno
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ssat_probe import table as tables
from ssat_probe.table import Column, read_table, write_atomically, write_table


def test_a_label_has_spaces_and_its_unit() -> None:
    assert Column("cross_entropy", "nat", "").label == "cross entropy [nat]"
    assert Column("block", "", "").label == "block"


@pytest.mark.parametrize(("content", "expected"), [("λ\n", "λ\n".encode()), (b"\x00\xff", b"\x00\xff")])
def test_what_is_written_is_there_in_folders_made_for_it(tmp_path: Path, content: bytes | str, expected: bytes) -> None:
    path = tmp_path / "a" / "b" / "c"
    assert write_atomically(path, content) == path
    assert path.read_bytes() == expected
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_death_while_writing_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_atomically(tmp_path / "a.csv", "old")

    def died(handle: int) -> None:
        raise KeyboardInterrupt(handle)

    monkeypatch.setattr(os, "fsync", died)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "a.txt", "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ValueError, match=r"a\.txt must be written whole, got No space left on device, so what was there"
    ):
        write_atomically(path, "new")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sentence = r"file/sub must be a folder that can be written, got 'Not a directory'; choose another with --out\.$"
    with pytest.raises(ValueError, match=sentence):
        write_atomically(tmp_path / "file" / "sub" / "a.csv", "")
    with pytest.raises(ValueError, match=r"file must be a folder that can be written, got 'File exists'"):
        write_atomically(tmp_path / "file" / "a.csv", "")


def test_a_folder_is_checked_and_left_empty(tmp_path: Path) -> None:
    tables.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a").rglob("*")) == [tmp_path / "a" / "b"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/sub must be a folder that can be written, got 'Not a directory'"):
        tables.check_writable(tmp_path / "file" / "sub")
    with pytest.raises(ValueError, match="file/sub must be a folder that can be written, got 'Not a directory'"):
        write_table(pd.DataFrame({"value": [1.0]}), tmp_path / "file" / "sub" / "a.csv", {})


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("leaves", [False, True])
def test_a_folder_made_for_work_that_fails_stays_only_with_something_in_it(
    tmp_path: Path, *, was_there: bool, leaves: bool
) -> None:
    folder = tmp_path / "a"
    if was_there:
        folder.mkdir()

    def work() -> None:
        with tables.results_in(folder):
            assert folder.is_dir()
            if leaves:
                (folder / "unfinished").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert folder.exists() == (was_there or leaves)
    with tables.results_in(folder):
        pass
    assert folder.is_dir()


def test_a_table_comes_back_with_its_numbers_to_the_last_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    table = pd.DataFrame({"checkpoint": ["a", "b", "c"], "value": rng.normal(size=3) * 10.0 ** np.array([-30, 0, 30])})
    table.loc[1, "value"] = np.nan
    path = write_table(table, tmp_path / "variance.csv", {"seconds": 1.5, "options": {"a": [1]}})
    pd.testing.assert_frame_equal(read_table(path), table, check_exact=True)
    assert json.loads(path.with_suffix(".json").read_text()) == {"seconds": 1.5, "options": {"a": [1]}}


def test_the_record_is_gone_before_the_table_changes_and_back_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.DataFrame({"value": [1.0]})
    path = write_table(table, tmp_path / "variance.csv", {})
    there = []

    def noted(target: Path, content: bytes | str) -> Path:
        there.append((target.name, path.with_suffix(".json").exists()))
        return write_atomically(target, content)

    monkeypatch.setattr(tables, "write_atomically", noted)
    write_table(table, path, {})
    assert there == [("variance.csv", False), ("variance.json", False)]
    assert path.with_suffix(".json").exists()


def test_a_long_table_with_an_empty_method_is_read_without_a_warning(tmp_path: Path) -> None:
    """pandas judges types by pieces of a file, and warns where a piece of empty texts looks like numbers."""
    table = pd.DataFrame({"method": [""] * 300_000 + ["untrained"] * 300_000, "value": 1.5})
    write_table(table, tmp_path / "long.csv", {})
    assert read_table(tmp_path / "long.csv")["method"].iloc[-1] == "untrained"


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.csv must be a table written by a probe, got no such file"):
        read_table(tmp_path / "a.csv")
