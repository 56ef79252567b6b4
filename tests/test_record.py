"""Record: names of folders."""

from pathlib import Path

from ssat_probe.record import folder_name


def test_folders_of_results_are_named_by_what_was_measured(tmp_path: Path) -> None:
    one, other = tmp_path / "run" / "ssat.pt", tmp_path / "run" / "ssl_ft.pt"
    assert folder_name([one]).startswith("run-ssat-")
    assert folder_name([one, other]).startswith("2-checkpoints-")
    names = {folder_name(paths) for paths in ([one], [other], [one, other], [other, one])}
    assert len(names) == 4
    assert folder_name([one]) == folder_name([tmp_path / "run" / ".." / "run" / "ssat.pt"])
