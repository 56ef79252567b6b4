"""The package and its tests mirror each other, and the command line starts fast."""

import subprocess
import sys
from pathlib import Path

import pytest

import ssat_probe

PACKAGE = Path(ssat_probe.__file__).parent
TESTS = Path(__file__).parent
MODULES = sorted(
    path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.stem not in {"__init__", "__main__"}
)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_has_its_test_file(module: Path) -> None:
    assert (TESTS / module.parent / f"test_{module.name}").is_file()


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_says_what_it_is_for_(module: Path) -> None:
    assert (PACKAGE / module).read_text(encoding="utf-8").startswith('"""')


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    code = "import sys, ssat_probe.cli; print(set(sys.modules) & {'torch', 'pandas', 'numpy', 'matplotlib', 'scipy'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
