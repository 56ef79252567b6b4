"""The README shows what the committed run gave, its links lead somewhere, and its commands work."""

import json
import re
import shlex
from pathlib import Path

import pytest

from ssat_probe import cli
from ssat_probe.registry import PACKAGE

ROOT = PACKAGE.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "figures" / "mechanisms"
EXAMPLES = sorted((ROOT / "checkpoints").glob("vit_nano-digits-*-seed0/*.pt"))


@pytest.mark.parametrize("name", ["comparison.md", "claims.md"])
def test_tables_are_those_of_the_committed_run(name: str) -> None:
    date = json.loads((RESULTS / "analysis.json").read_text(encoding="utf-8"))["date"]
    if f"<!-- run of {date} -->" not in README:
        pytest.skip("make reproduce has been run here since, so the committed tables are no longer in figures/")
    rows = [line for line in (RESULTS / name).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert "\n".join(rows) in README


def test_links_lead_to_files() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")]
    for page in pages:
        for link in re.findall(r"\]\((?!http|#)([^)]+)\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8")):
            target = (link[0] or link[1]).partition("#")[0]
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_example_checkpoints_are_small_and_of_each_method() -> None:
    assert {path.stem for path in EXAMPLES} == {"scratch", "ssl_ft", "ssat"}
    assert all(path.stat().st_size < 300_000 for path in EXAMPLES)


def test_first_probe_command_works_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = re.findall(r"^ssat-probe (attention .*)$", README, re.MULTILINE)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="0"):
        cli.main([*shlex.split(command), "--out", str(tmp_path)])
    assert "vit_nano-digits-ssl_ft-seed0" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"attention.{kind}" for kind in ("csv", "json", "png", "pdf")),
        "attention_rows.csv",
    }


def test_python_example_works_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    exec(code, names)
    assert sorted(set(names["table"]["block"])) == [0, 5]  # type: ignore[index]


def test_training_command_has_only_options_that_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"^ssat-probe (train .*)$", README, re.MULTILINE)
    words = shlex.split(command.replace("<root>", str(tmp_path)))
    with pytest.raises(SystemExit):
        cli.main([*words, "--plan"])
    assert str(tmp_path) in capsys.readouterr().err  # it came as far as looking for the images
