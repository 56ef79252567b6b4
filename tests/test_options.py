"""Options written as text: what is a number, and what is none."""

from pathlib import Path

import pytest

from ssat_probe.options import changes, config


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("field=cifar10", "cifar10"),
        ("field=[4, 2]", [4, 2]),
        ("field=0.5", 0.5),
        ("field=true", True),
        ("field=", None),
        ("field=1e-3", 0.001),
        ("field=1E-3", 0.001),
        ("field=1e3", 1000.0),
        ("field=-.5e+1", -5.0),
        ("field='1e3'", "1e3"),
        ("field=hf:fake-data", "hf:fake-data"),
        ("field=large-gpu", "large-gpu"),
        ("field=/data/the-cache/x.pt", "/data/the-cache/x.pt"),
        ("field=x1e-3", "x1e-3"),
        ("field=a=b", "a=b"),
    ],
)
def test_a_value_is_read_as_yaml_but_for_exponents(word: str, value: object) -> None:
    found = changes([word])
    assert found == {"field": value}
    assert type(found["field"]) is type(value)


def test_fields_may_be_written_with_hyphens() -> None:
    assert changes(["patch-size=4", "base_lr=1e-3"]) == {"patch_size": 4, "base_lr": 0.001}


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("data", "--set must be followed by field=value, got 'data'; write data=3"),
        ("betas=[0.9", r"--set betas must be followed by a value, got '\[0.9'; write betas=3"),
        ("data=2026-13-01", "--set data must be followed by a value, got '2026-13-01'"),
    ],
)
def test_what_is_no_field_with_a_value_is_refused(word: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        changes([word])


def test_the_option_is_named_as_it_was_written() -> None:
    with pytest.raises(ValueError, match="--cluster-options must be followed by field=value, got 'gpu'"):
        changes(["gpu"], "--cluster-options")


def test_the_config_file_is_taken_out_of_the_words(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("seed: 3\n", encoding="utf-8")
    for option in (["--config", str(path)], [f"--config={path}"]):
        words = ["train", *option, "--plan"]
        assert len(config(words)) == 1
        assert words == ["train", "--plan"]
    assert config(["train", "--plan"]) == ()
    with pytest.raises(FileNotFoundError, match=r"--config must be followed by a YAML file, got 'none\.yaml'"):
        config(["train", "--config", "none.yaml"])
