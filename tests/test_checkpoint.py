"""Round trips, and every kind of file that is no checkpoint of ours."""

import argparse
import dataclasses
import hashlib
import io
import pickle
import random
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssat_probe.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_tensors,
    num_stored,
    save_checkpoint,
    save_tensors,
    state_of,
)
from ssat_probe.network import build_decoder, build_encoder
from ssat_probe.recipe import Recipe

Make = Callable[..., tuple]
Paths = dict[str, Path]


class Touch:
    """A pickle of it makes a file when it is opened by a careless program."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def made(make_recipe: Make, path: Path, *, method: str = "ssat", **fields: object) -> Checkpoint:
    recipe, facts = make_recipe((6, 10), 3, 5, method=method, patch_size=(3, 5), mask_ratio=0.5, **fields)
    decoder = build_decoder(recipe, facts) if method != "scratch" else None
    return Checkpoint(path, recipe, facts, "train", 3, state_of(build_encoder(recipe, facts), decoder))


@pytest.mark.parametrize("method", ["scratch", "ssl_ft", "ssat"])
def test_a_round_trip_keeps_everything(make_recipe: Make, tmp_path: Path, method: str) -> None:
    written = made(make_recipe, tmp_path / "a.pt", method=method, subset=0.3)
    read = load_checkpoint(save_checkpoint(written))
    assert (read.recipe, read.facts, read.stage, read.epoch) == (written.recipe, written.facts, "train", 3)
    assert read.state.keys() == written.state.keys()
    assert all(torch.equal(read.state[name], written.state[name]) for name in written.state)
    assert read.hash == written.hash
    assert read.has_decoder == (method != "scratch")
    assert (read.decoder() is not None) == read.has_decoder


def test_modules_come_back_with_their_weights(make_recipe: Make, tmp_path: Path) -> None:
    written = made(make_recipe, tmp_path / "a.pt", seed=7)
    for name in written.state:
        written.state[name] += 1
    read = load_checkpoint(save_checkpoint(written))
    state = state_of(read.encoder(), read.decoder())
    assert state.keys() == written.state.keys()
    assert all(torch.equal(state[name], written.state[name]) for name in state)


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return type(value) is dict and all(isinstance(k, str) and plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return type(value) in (int, float, str, bool, type(None), torch.Tensor)


def test_plain_torch_opens_the_file_and_finds_plain_data(checkpoints: Paths) -> None:
    for method, path in checkpoints.items():
        content = torch.load(path, weights_only=True)
        assert plain(content), method
        assert content["recipe"]["method"] == method
        assert Recipe.from_dict(content["recipe"]).model == "vit_nano"
        assert content["facts"]["classes"] == list("0123456789")


def test_nano_checkpoints_are_small(checkpoints: Paths) -> None:
    assert all(path.stat().st_size < 300_000 for path in checkpoints.values())


def test_the_hash_is_that_of_the_content_wherever_it_lies(checkpoints: Paths, tmp_path: Path) -> None:
    path = checkpoints["ssat"]
    copy = tmp_path / "elsewhere" / "other.pt"
    copy.parent.mkdir()
    shutil.copy(path, copy)
    assert load_checkpoint(copy).hash == load_checkpoint(path).hash
    assert len({load_checkpoint(path).hash for path in checkpoints.values()}) == 3


def test_the_hash_changes_with_any_weight_name_shape_dtype_recipe_stage_and_epoch(
    make_recipe: Make, tmp_path: Path
) -> None:
    one = made(make_recipe, tmp_path / "a.pt")

    def changed(**weights: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: weights.get(name.replace(".", "_"), value) for name, value in one.state.items()}

    bias = one.state["head.bias"]
    nudged = bias.clone()
    nudged[0] = torch.nextafter(nudged[0], torch.tensor(1.0))
    renamed = {("head.sibling" if name == "head.bias" else name): value for name, value in one.state.items()}
    others = [
        dataclasses.replace(one, state=changed(head_bias=nudged)),
        dataclasses.replace(one, state=changed(head_bias=bias.view(1, -1))),
        dataclasses.replace(one, state=changed(head_bias=bias.view(torch.int32))),
        dataclasses.replace(one, state=renamed),
        dataclasses.replace(one, recipe=dataclasses.replace(one.recipe, base_lr=2e-3)),
        dataclasses.replace(one, stage="pretrain"),
        dataclasses.replace(one, epoch=4),
    ]
    assert len({one.hash, *(other.hash for other in others)}) == 1 + len(others)
    assert dataclasses.replace(one, path=tmp_path / "b.pt").hash == one.hash


def test_labels_name_the_run_and_a_stage_that_is_not_the_last(make_recipe: Make, tmp_path: Path) -> None:
    one = made(make_recipe, tmp_path / "a.pt", method="ssl_ft")
    assert dataclasses.replace(one, stage="finetune").label == "vit_nano-digits-ssl_ft-seed0"
    assert dataclasses.replace(one, stage="pretrain").label == "vit_nano-digits-ssl_ft-seed0-pretrain"


# What is no checkpoint of ours


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.pt must be a checkpoint, got no such file\.$"):
        load_checkpoint(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match=r"must be a checkpoint, got a folder\.$"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_called_damaged(checkpoints: Paths, tmp_path: Path, share: float) -> None:
    whole = checkpoints["ssat"].read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(whole[: int(len(whole) * share)])
    size = path.stat().st_size
    sentence = f"{path} must be a checkpoint, got {size} bytes that cannot be read as one; it is damaged, cut short"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_checkpoint(path)


def opened(path: Path) -> tuple[str, str]:
    """Hash of the checkpoint, or what is said about it."""
    try:
        return load_checkpoint(path).hash, ""
    except ValueError as error:
        return "", str(error)


def test_a_flipped_bit_is_found_or_harmless(checkpoints: Paths, tmp_path: Path) -> None:
    whole, path = checkpoints["scratch"].read_bytes(), tmp_path / "flipped.pt"
    before, rng, num_found = load_checkpoint(checkpoints["scratch"]).hash, random.Random(0), 0
    for _ in range(150):
        place = rng.choice([rng.randrange(len(whole)), rng.randrange(4096), -rng.randrange(1, 8192)])
        content = bytearray(whole)
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        found, said = opened(path)
        assert found == before or (str(path) in said and "\n" not in said), place
        num_found += not found
    assert num_found > 50


def test_a_weight_that_does_not_agree_with_the_hash_is_found(checkpoints: Paths, tmp_path: Path) -> None:
    content = torch.load(checkpoints["ssat"], weights_only=True)
    content["model"]["norm.weight"][3] += 1e-6
    path = save_tensors(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt must be a checkpoint, got \d+ bytes .*it is damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        b"no checkpoint at all\n",
        b"PK\x03\x04",
        b"\x80",
        b"\x80\x02.",
        bytes(range(256)) * 9,
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_what_is_no_tensor_file_is_called_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.pt must be a checkpoint, got {len(content)} bytes that cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_plain_data_is_no_checkpoint(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({"model": [1, 2.5, "x"]}, protocol))
    with pytest.raises(ValueError, match=r"a\.pt must be a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("kind", ["raw 0", "raw 2", "raw 4", "raw 5", "zip", "legacy"])
def test_code_in_a_pickle_is_not_run_and_the_sentence_says_so(tmp_path: Path, kind: str) -> None:
    path, sign = tmp_path / "evil.pt", tmp_path / "sign"
    content = {"model": Touch(sign)}
    if kind.startswith("raw"):
        path.write_bytes(pickle.dumps(content, int(kind.split()[1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(
        ValueError, match=r"evil\.pt must hold tensors and plain data alone, got a pickle that"
    ) as caught:
        load_checkpoint(path)
    assert not sign.exists()
    assert re.search(
        r"would run code when opened \([\w.]+\), so it was not opened; save a state_dict", str(caught.value)
    )
    pickle.loads(pickle.dumps(Touch(sign)))  # the sign works
    assert sign.exists()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (torch.nn.Linear(2, 3), "torch.nn.modules.linear.Linear"),
        (Path("a"), "pathlib"),
    ],
)
def test_objects_that_need_code_are_refused_by_name(tmp_path: Path, value: object, named: str) -> None:
    torch.save({"model": {}, "args": value}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a pickle that would run code when opened \({re.escape(named)}"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (OrderedDict(weight=torch.ones(2), bias=torch.ones(3)), "weight, bias"),
        ({"state_dict": {}, "epoch": 3}, "state_dict, epoch"),
        (dict.fromkeys(["format", "recipe", "facts", "stage", "epoch", "hash", "model"], "0"), "format"),
        ({}, "nothing"),
        ([1, 2], "list"),
        (torch.ones(3), "Tensor"),
    ],
)  # fmt: skip
def test_weights_of_something_else_are_named_by_what_is_in_them(tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=rf"a\.pt must be a checkpoint written by ssat-probe .* got a file with: {found}"
    ):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recipe", ["method"]),
        ("recipe", {"method": "ssat", "no_such_key": 1}),
        ("recipe", {"lambda_weight": 3.0}),
        ("facts", {"classes": ["a"]}),
        ("facts", "none"),
        ("model", {"weight": 3}),
        ("model", [torch.ones(2)]),
        ("epoch", "three"),
    ],
)
def test_a_file_in_our_format_with_nonsense_in_it_is_one_sentence(
    checkpoints: Paths, tmp_path: Path, key: str, value: object
) -> None:
    content = torch.load(checkpoints["ssat"], weights_only=True) | {key: value}
    path = save_tensors(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt|lambda_weight must be"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"norm.weight": None}, "'norm.weight' must have shape (32,) for the recipe's vit_nano, got none"),
        ({"norm.scale": torch.ones(7)}, "'norm.scale' must not be there for the recipe's vit_nano, got shape (7,)"),
        ({"head.bias": torch.ones(7)}, "'head.bias' must have shape (5,) for the recipe's vit_nano, got shape (7,)"),
    ],
)  # fmt: skip
def test_weights_of_another_model_are_named(
    make_recipe: Make, tmp_path: Path, change: dict[str, torch.Tensor | None], sentence: str
) -> None:
    one = made(make_recipe, tmp_path / "a.pt")
    state = {name: value for name, value in (one.state | change).items() if value is not None}
    loaded = load_checkpoint(save_checkpoint(dataclasses.replace(one, state=state)))
    with pytest.raises(ValueError, match=re.escape(f"a.pt: {sentence}; the file holds weights of another model.")):
        loaded.encoder()


def test_saving_tensors_keeps_every_dtype_and_leaves_no_other_file(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool)
    }
    path = save_tensors({"tensors": tensors, "text": "λ", "none": None, "nan": float("nan")}, tmp_path / "a" / "b.pt")
    read = load_tensors(path, "a file")
    assert all(read["tensors"][name].dtype == value.dtype for name, value in tensors.items())
    assert (read["text"], read["none"]) == ("λ", None)
    assert np.isnan(read["nan"])
    assert list(path.parent.iterdir()) == [path]


def test_state_of_is_a_copy(make_recipe: Make) -> None:
    recipe, facts = make_recipe()
    encoder = build_encoder(recipe, facts)
    state = state_of(encoder, None)
    digest = hashlib.sha256(state["head.weight"].numpy().tobytes()).hexdigest()
    with torch.no_grad():
        encoder.head.weight.zero_()
    assert hashlib.sha256(state["head.weight"].numpy().tobytes()).hexdigest() == digest
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert not any(value.requires_grad for value in state.values())


@pytest.mark.parametrize(
    ("fields", "part", "got"),
    [
        ({"model": "vit_huge"}, "encoder", "a model of 629,"),
        ({"img_size": (16384, 16384)}, "encoder", "a model of 2,147,"),
        ({"decoder_width": 2**20}, "decoder", "a model of 26,388,"),
    ],
)
def test_a_recipe_that_asks_for_far_more_than_the_weights_is_refused_before_there_is_room(
    checkpoints: Paths, tmp_path: Path, fields: dict[str, object], part: str, got: str
) -> None:
    """The hash is no help: whoever writes such a file writes its hash."""
    whole = load_checkpoint(checkpoints["ssat"])
    recipe = dataclasses.replace(whole.recipe, **fields)
    path = save_checkpoint(dataclasses.replace(whole, recipe=recipe, path=tmp_path / "large.pt"))
    sentence = rf"large\.pt must hold about as many values as its model has, got [\d,]+ for {got}.*it was not made"
    with pytest.raises(ValueError, match=sentence):
        getattr(load_checkpoint(path), part)()


def test_values_that_tensors_share_count_once() -> None:
    base = torch.zeros(6, 7)
    assert num_stored({"a": base, "b": base[2:], "c": base.T, "d": torch.zeros(5)}) == 42 + 5
