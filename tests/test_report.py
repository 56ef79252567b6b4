"""The report is one file that needs no other."""

import json
import re
from pathlib import Path

import pytest

from ssat_probe import probe
from ssat_probe.report import write_report
from ssat_probe.sample import Sample


def test_page_holds_the_figures_and_explains_every_column(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    accuracy = probe.make("accuracy")
    probe.run(accuracy, [checkpoints["ssat"]], Sample(num_images=20, device="cpu"), tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("src='data:image/png;base64,") == 1
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    for column in accuracy.columns:
        assert f"<td>{column.name}</td>" in page
    assert "20 images of test, float32 on cpu" in page


def test_names_from_outside_cannot_become_markup(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "<script>alert(1)</script>"[:8]
    probe.run(probe.make("accuracy"), [checkpoints["ssat"]], Sample(num_images=20, device="cpu"), folder)
    assert "<script" not in write_report(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("record", "command"),
    [
        (
            {"command": "ssat-probe reproduce my/tiny.yaml --smoke --set x=1"},
            "reproduce my/tiny.yaml --smoke --set x=1",
        ),
        ({}, "reproduce analyses/tiny.yaml"),  # as earlier versions wrote it
    ],
)
def test_page_names_the_command_that_makes_it(
    checkpoints: dict[str, Path], tmp_path: Path, record: dict[str, str], command: str
) -> None:
    probe.run(probe.make("accuracy"), [checkpoints["ssat"]], Sample(num_images=20, device="cpu"), tmp_path)
    record |= {"name": "tiny", "date": "2026-01-01", "source": ""}
    (tmp_path / "analysis.json").write_text(
        json.dumps(record | {"seconds": None, "cores": 2, "recipes": [{"seed": 0}]})
    )
    assert f"<code>ssat-probe {command}</code>" in write_report(tmp_path).read_text(encoding="utf-8")


def test_folder_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} must hold results of probes, got none"):
        write_report(tmp_path)
