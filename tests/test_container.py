"""Hostile files are refused in one sentence, and never run; entries and prefixes come off as they should."""

import argparse
import json
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ssat_probe.container import check_tensors, open_content, strip_prefixes, take_state


class Touch:
    """A pickle of it makes a file when it is opened by a careless program."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("with_options", [True, False])
def test_code_runs_only_where_it_is_trusted(tmp_path: Path, *, is_zip: bool, with_options: bool) -> None:
    content = {"model": {"a": torch.zeros(2)}, "evil": Touch(tmp_path / "sign")}
    if with_options:  # what is allowed must not open the door for what is not
        content = {"args": argparse.Namespace(lr=1.0)} | content
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(
        ValueError, match=r"evil\.pt must hold tensors .* not opened; save a state_dict instead, or give"
    ):
        open_content(tmp_path / "evil.pt")
    assert not (tmp_path / "sign").exists()
    assert "model" in open_content(tmp_path / "evil.pt", is_trusted=True)
    assert (tmp_path / "sign").exists()


@pytest.mark.parametrize("is_zip", [True, False])
def test_the_options_of_a_training_script_need_no_trust(tmp_path: Path, *, is_zip: bool) -> None:
    content = {"model": {"a": torch.arange(3)}, "args": argparse.Namespace(lr=1e-3, name="b")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    opened = open_content(tmp_path / "a.pt")
    assert opened["args"].lr == 1e-3
    assert opened["model"]["a"].tolist() == [0, 1, 2]


def test_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    assert open_content(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("length", [10, 10**14])
def test_safetensors_that_lie_about_their_size(tmp_path: Path, length: int) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [length], "data_offsets": [0, 4 * length]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=r"a\.safetensors must be a file of safetensors, got \d+ bytes that are none"):
        open_content(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2**62) + header)
    with pytest.raises(ValueError, match="must be a file of safetensors"):
        open_content(tmp_path / "a.safetensors")


def entry(shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry([2**40], 0, 4)},
        {"a": entry([2**32, 2**32], 0, 0)},
        {"a": entry([1], 0, 4), "b": entry([1], 0, 4)},
        {"a": entry([1], 4, 8)},
        {"a": entry([2], 8, 0)},
        {"a": entry([2], 0, 8), "__metadata__": {"ssat-probe": "[" * 10**5}},
        {"a": entry([2], 0, 8), "__metadata__": {"ssat-probe": "3"}},
        {"a": entry([2], 0, 8), "__metadata__": {"ssat-probe": 3}},
        {"a": entry([2], 0, 8) | {"dtype": "F33"}},
        [1, 2],
    ],
    ids=["shape", "overflow", "overlap", "hole", "backwards", "deep", "number", "no text", "dtype", "list"],
)
def test_safetensors_with_a_lying_header(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=r"a\.safetensors must be a file of safetensors, got \d+ bytes that are none"):
        open_content(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [0, 5, 8, 20, 100, -1, -9])
def test_safetensors_cut_short(tmp_path: Path, length: int) -> None:
    save_file({"a": torch.arange(3), "b": torch.zeros(5)}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:length])
    with pytest.raises(ValueError, match=r"a\.safetensors must be a file of safetensors, got \d+ bytes that are none"):
        open_content(tmp_path / "a.safetensors")


def test_values_may_be_tied_but_not_used_again_and_again() -> None:
    base = torch.zeros(7, 3)
    check_tensors({"embed": base, "head": base.T, "part": base[1:]}, Path("b.pt"))
    with pytest.raises(
        ValueError, match=r"b\.pt must use each value at most 10 times, got 231 values in its tensors and"
    ):
        check_tensors({str(i): base for i in range(11)}, Path("b.pt"))


def test_a_shape_without_values_behind_it_is_refused(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(1).expand(10**12)}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 2000
    sentence = r"'a\.weight' must have as many values as are stored, got shape \(1000000000000,\) on 4 bytes"
    with pytest.raises(ValueError, match=sentence):
        take_state(open_content(tmp_path / "a.pt"), tmp_path / "a.pt")


def test_other_kinds_of_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'a' must be a dense tensor, got torch\.sparse_coo"):
        check_tensors({"a": torch.eye(3).to_sparse()}, Path("b.pt"))
    with pytest.raises(ValueError, match=r"'a' must be a dense tensor"):
        check_tensors({"a": torch.empty(3, device="meta")}, Path("b.pt"))
    with pytest.raises(ValueError, match=r"b\.pt must hold at most 100,000 tensors, got 100,001"):
        check_tensors(dict.fromkeys(map(str, range(100_001)), torch.zeros(())), Path("b.pt"))


@pytest.mark.parametrize(
    ("content", "entry", "taken"),
    [
        ({"a": 1.0}, "", ""),
        ({"model": {"a": 1.0}, "epoch": 3}, "", "model"),
        ({"model": {"a": 2.0}, "model_ema": {"a": 1.0}}, "", "model_ema"),
        ({"student": {"a": 2.0}, "teacher": {"a": 1.0}}, "", "teacher"),
        ({"student": {"a": 1.0}, "teacher": {"a": 2.0}}, "student", "student"),
        ({"encoder": {"a": 1.0}, "model": {"a": 2.0}}, "encoder", "encoder"),
    ],
)
def test_averaged_weights_come_first_unless_another_entry_is_named(content: dict, entry: str, taken: str) -> None:
    def tensors(value: object) -> object:
        return {k: tensors(v) for k, v in value.items()} if isinstance(value, dict) else torch.tensor(value)

    state, found = take_state(tensors(content), Path("a.pt"), entry)
    assert (found, float(state["a"])) == (taken, 1.0)


def test_a_file_without_weights_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"a\.pt must hold a state dict, alone or as one of .* got a file with: epoch, b"
    ):
        take_state({"epoch": 3, "b": "c"}, Path("a.pt"))
    with pytest.raises(ValueError, match=r"got a file with: list; name its entry"):
        take_state([1], Path("a.pt"))
    with pytest.raises(ValueError, match=re.escape("its entry 'modle', got entries model with weights; choose one")):
        take_state({"model": {"a": torch.zeros(1)}}, Path("a.pt"), "modle")


def test_a_prefix_comes_off_only_where_all_names_have_it() -> None:
    def stripped(*names: str) -> list[str]:
        return list(strip_prefixes({name: torch.zeros(1) for name in names}))

    assert stripped("module._orig_mod.a", "module._orig_mod.b") == ["a", "b"]
    assert stripped("module.a", "b") == ["module.a", "b"]
    assert stripped("a.module.b") == ["a.module.b"]
    assert stripped("n_averaged", "module.a") == ["a"]
    assert stripped("backbone._orig_mod.a", "head.b") == ["backbone.a", "head.b"]


def test_a_whole_module_is_taken_as_its_weights_where_it_is_trusted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(2, 3)
    for content, entry in ((module, ""), ({"model": module, "epoch": 3}, "model")):
        torch.save(content, tmp_path / "whole.pth")
        with pytest.raises(ValueError, match=r"would run code when opened \(torch\.nn\.modules\.linear\.Linear\)"):
            open_content(tmp_path / "whole.pth")
        state, found = take_state(open_content(tmp_path / "whole.pth", is_trusted=True), tmp_path / "whole.pth")
        assert found == entry
        assert torch.equal(state["weight"], module.weight)


def test_a_trusted_file_whose_program_is_not_here_says_which(tmp_path: Path) -> None:
    content = b"\x80\x02cnowhere_to_be_found\nNet\n)\x81."
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"would run code .* \(nowhere_to_be_found\.Net\)"):
        open_content(tmp_path / "a.pt")
    sentence = r"a\.pt must find the programs that it was saved with, got \w+: .*; put them on PYTHONPATH"
    with pytest.raises(ValueError, match=sentence):
        open_content(tmp_path / "a.pt", is_trusted=True)
