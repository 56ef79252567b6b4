import subprocess
import sys
from pathlib import Path

import pytest

from ssat_probe import registry

KINDS = ("probes", "models", "decoders", "data", "objectives")


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_the_files_of_the_folder(kind: str) -> None:
    files = [path.stem for path in (Path(registry.__file__).parent / kind).iterdir() if path.suffix == ".py"]
    assert registry.names(kind) == tuple(sorted(set(files) - {"__init__"}))
    assert registry.names(kind)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in registry.names(kind)])
def test_summary_is_the_first_line_of_the_docstring_and_one_sentence(kind: str, name: str) -> None:
    module = registry.load(kind, name)
    assert module.__name__ == f"ssat_probe.{kind}.{name}"
    assert registry.summary(kind, name) == (module.__doc__ or "").splitlines()[0]
    assert registry.summary(kind, name).endswith(".")


@pytest.mark.parametrize(
    ("kind", "exported"),
    [
        ("probes", "Probe"),
        ("models", "Model"),
        ("decoders", "Decoder"),
        ("data", "Dataset"),
        ("objectives", "Objective"),
    ],
)
def test_every_file_of_a_kind_exports_the_same_name(kind: str, exported: str) -> None:
    for name in registry.names(kind):
        assert callable(getattr(registry.load(kind, name), exported)), name


def test_variants_are_the_tables_of_the_modules() -> None:
    found = {name: file for file in registry.names("models") for name in registry.load("models", file).VARIANTS}
    assert registry.variants("models") == found
    assert {"vit_nano", "vit_tiny", "vit_small", "vit_base"} <= set(found)
    assert registry.variants("decoders") == {}


def test_a_known_name_comes_back() -> None:
    assert registry.known("b", iter("abc"), "letters") == "b"


def test_an_unknown_name_is_a_sentence_with_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"No 'attentoin' in probes: accuracy, .*\. Did you mean 'attention'\?$"):
        registry.load("probes", "attentoin")
    with pytest.raises(ValueError, match=r"No 'digist' in data: .*cifar10, .*\. Did you mean 'digits'\?$"):
        registry.summary("data", "digist")


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    with pytest.raises(ValueError, match=r"^No 'zzz' in letters: a, b\.$"):
        registry.known("zzz", "ab", "letters")


def test_names_summaries_and_variants_import_nothing() -> None:
    code = (
        "import sys\nfrom ssat_probe import registry\n"
        "for kind in ('probes', 'models', 'decoders', 'data', 'objectives'):\n"
        "    [registry.summary(kind, name) for name in registry.names(kind)], registry.variants(kind)\n"
        "print([name for name in sys.modules if name.startswith('ssat_probe.') or name == 'torch'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['ssat_probe.registry']"
