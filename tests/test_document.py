"""Analysis files as YAML: kinds of values, keys said once, keys that say nothing."""

import re
from pathlib import Path

import pytest

from ssat_probe import document

TEXT = """
title: Tiny
recipe: {epochs: 2}
methods: [ssl_ft, ssat]
seeds: [0, 1]
probes: {accuracy: {num_images: 30}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.yaml"


def test_a_file_is_its_text_and_what_it_says(path: Path) -> None:
    path.write_text(TEXT + "claims:\nmeasures:\n", encoding="utf-8")  # as a list of which all is commented out
    source, content = document.read(path)
    assert source == TEXT + "claims:\nmeasures:\n"
    assert content == {
        "title": "Tiny",
        "recipe": {"epochs": 2},
        "methods": ["ssl_ft", "ssat"],
        "seeds": [0, 1],
        "probes": {"accuracy": {"num_images": 30}},
    }


@pytest.mark.parametrize(
    ("line", "example"),
    [
        ("title: [a]", "text, such as Three mechanisms, got ['a']"),
        ("recipe: [1]", "fields of a recipe, such as {model: vit_nano, epochs: 100}, got [1]"),
        ("recipe: {3: 4}", "fields of a recipe, such as {model: vit_nano, epochs: 100}, got {3: 4}"),
        ("models: 3", "a list of names, each once, such as [vit_nano], got 3"),
        ("models: vit_nano", "a list of names, each once, such as [vit_nano], got 'vit_nano'"),
        ("methods: ssat", "a list of names, each once, such as [scratch, ssat], got 'ssat'"),
        ("methods: [ssat, ssat]", "a list of names, each once, such as [scratch, ssat], got ['ssat', 'ssat']"),
        ("seeds: 3", "a list of whole numbers, each once, such as [0, 1, 2], got 3"),
        ("seeds: [1, 1]", "a list of whole numbers, each once, such as [0, 1, 2], got [1, 1]"),
        ("seeds: [true]", "a list of whole numbers, each once, such as [0, 1, 2], got [True]"),
        ("vary: [x]", "axes by name, such as {lambda_weight: [0.1, 0.5]}, got ['x']"),
        ("vary: {3: [1]}", "axes by name, such as {lambda_weight: [0.1, 0.5]}, got {3: [1]}"),
        ("probes: [accuracy]", "options by the name of a probe, such as {accuracy: {num_images: 100}}, got ['acc"),
        ("probes: {accuracy: 3}", "options by the name of a probe, such as {accuracy: {num_images: 100}}, got {'acc"),
        ("probes: {accuracy: {3: 4}}", "options by the name of a probe, such as {accuracy: {num_images: 100}}, got"),
        ("measures: [a]", "measures by name, such as {time: {probe: cost, column: seconds}}, got ['a']"),
        ("tradeoffs: 3", "a list of pairs, such as [[accuracy, time]], got 3"),
        ("claims: {a: b}", "a list of claims, such as [{claim: SSAT is better, measure: accuracy, sign: 1}], got {"),
        ("claims: [a]", "a list of claims, such as [{claim: SSAT is better, measure: accuracy, sign: 1}], got ['a']"),
        ("jobs: true", "a whole number, 0 for what the cores allow, got True"),
        ("threads: -1", "a whole number, 0 for what the cores allow, got -1"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_an_example(path: Path, line: str, example: str) -> None:
    key = line.partition(":")[0]
    others = [one for one in TEXT.splitlines() if not one.startswith(f"{key}:")]
    path.write_text("\n".join([*others, line]), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{key} of {path} must be {example}")):
        document.read(path)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("seeds: [2]", "the key 'seeds' a second time in line 7; mend that line"),
        ("measures: {a: {probe: cost, column: x}, a: {probe: cost, column: y}}", "the key 'a' a second time in line 7"),
        ("vary: {epochs: {0.1: {epochs: 1}, 0.10: {epochs: 2}}}", "the key 0.1 a second time in line 7"),
        ("vary: {a: 2024-13-45}", "month must be in 1..12"),
    ],
)
def test_a_key_that_stands_there_twice_is_refused(path: Path, more: str, said: str) -> None:
    path.write_text(TEXT + more, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path} must be YAML, got {said}")):
        document.read(path)


def test_what_is_merged_into_a_mapping_may_be_said_again() -> None:
    assert document.parsed("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")["b"] == {"x": 1, "y": 3}
