"""Files of foreign weights: opened safely, the right entry taken, the wrappers' prefixes taken off."""

import argparse
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssat_probe.archive import few, shown
from ssat_probe.checkpoint import load_tensors, num_stored

ENTRIES = (
    "state_dict_ema", "model_ema", "teacher", "state_dict", "model_state_dict", "model", "module", "net", "student",
)  # fmt: skip
"Where weights are kept in a file of several things, averaged ones first."

PREFIXES = ("module.", "_orig_mod.", "_forward_module.", "model.")
"What DistributedDataParallel, compilation, Fabric and Lightning put in front of every name."

MOST_TENSORS = 100_000

MOST_SHARING = 10
"Times that a value may be used: tied embeddings use it twice."


def open_content(path: Path, is_trusted: bool = False) -> Any:
    """What a file holds; nothing in it can run code unless it is trusted.

    Args:
        path: A file of safetensors or of torch.
        is_trusted: Let a file run code that cannot be opened otherwise.

    Returns:
        Its content, on the CPU; safetensors as a flat dictionary, or as the checkpoint that ``export`` made it from.

    Raises:
        ValueError: If the file is damaged, declares more than it holds, or needs to run code and is not trusted.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return _safetensors(path)
    try:
        return load_tensors(path, "a checkpoint")
    except ValueError as error:
        sentence = str(error)
    if "would run code" not in sentence:
        raise ValueError(sentence)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "argparse.Namespace" in sentence:  # the options that many training scripts store; it runs nothing
            try:
                with torch.serialization.safe_globals([argparse.Namespace]):
                    return torch.load(path, map_location="cpu", weights_only=True)
            except Exception:  # whatever a file can do wrong; the next line says what it asked for first
                pass
        if is_trusted:
            try:
                return torch.load(path, map_location="cpu", weights_only=False)
            except Exception as error:  # it ran programs of its own, which may raise anything
                raise ValueError(
                    f"{path} must find the programs that it was saved with, got {type(error).__name__}: {error}; put "
                    "them on PYTHONPATH, or save a state_dict instead."
                ) from error
    raise ValueError(f"{sentence.removesuffix('.')}, or give --trust if you trust its author to run programs here.")


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            ours = (file.metadata() or {}).get("ssat-probe")
        return json.loads(ours) | {"model": state} if ours else state
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} must be a file of safetensors, got {path.stat().st_size} bytes that are none ({error}); "
            "it is damaged, cut short or of another kind: get it again."
        ) from error


def take_state(content: Any, path: Path, entry: str = "") -> tuple[dict[str, Tensor], str]:
    """The state dict within a file's content.

    Args:
        content: Of the file: a state dict, a whole module, or a dictionary that holds one of these.
        path: Of the file.
        entry: Which one; empty means the first of ``ENTRIES`` that is there, or the content itself.

    Returns:
        Tensors by name, without the prefixes of wrappers, and the entry they were found in (empty for the content).

    Raises:
        ValueError: If there is no state dict, or a tensor in it declares more values than the file holds.
    """
    found = {"": content} | (dict(content) if isinstance(content, Mapping) else {})
    found = {name: value.state_dict() if isinstance(value, nn.Module) else value for name, value in found.items()}
    states = {str(name): value for name, value in found.items() if _is_state(value)}
    if entry and entry not in states:
        raise ValueError(
            f"{path} must hold weights in its entry {entry!r}, got entries {few(filter(None, states)) or 'none'} "
            "with weights; choose one with --entry."
        )
    chosen = entry or next((name for name in (*ENTRIES, "") if name in states), None)
    if chosen is None:
        raise ValueError(
            f"{path} must hold a state dict, alone or as one of {', '.join(ENTRIES)}, got a file with: "
            f"{shown(content)}; name its entry with --entry."
        )
    state = {str(name): value for name, value in states[chosen].items() if isinstance(value, Tensor)}
    check_tensors(state, path)
    return strip_prefixes(state), chosen


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put in front of every one of them; a prefix that only some have stays.

    Args:
        state: Tensors by name.

    Returns:
        The same tensors.
    """
    names = {name: name for name in state if name != "n_averaged"}  # a counter of torch's AveragedModel
    stripped = True
    while stripped and names:
        stripped = False
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in names.values()):
                names = {old: name.removeprefix(prefix) for old, name in names.items()}
                stripped = True
    names = {old: re.sub(r"^backbone\._orig_mod\.", "backbone.", name) for old, name in names.items()}
    return {name: state[old] for old, name in names.items()}


def check_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse shapes that only pretend to hold values: a stride of 0 makes a tensor of any size from one number.

    Args:
        state: Tensors by name.
        path: Of their file.

    Raises:
        ValueError: If there are absurdly many, or one has more values than its storage, or is not dense numbers.
    """
    if len(state) > MOST_TENSORS:
        raise ValueError(f"{path} must hold at most {MOST_TENSORS:,} tensors, got {len(state):,}; it is no model.")
    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise ValueError(f"{path}: {name!r} must be a dense tensor, got {value.layout}; convert it first.")
        if math.prod(value.shape) * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: {name!r} must have as many values as are stored, got shape {tuple(value.shape)} on "
                f"{value.untyped_storage().nbytes()} bytes; it was not used: get the file again from whom you trust."
            )
    values = sum(value.numel() for value in state.values())
    if values > MOST_SHARING * num_stored(state):
        raise ValueError(
            f"{path} must use each value at most {MOST_SHARING} times, got {values:,} values in its tensors and "
            f"{num_stored(state):,} behind them; it was not used: get the file again from whom you trust."
        )


def _is_state(value: Any) -> bool:
    """Whether this is a dictionary of tensors by name; a few counters beside them do no harm."""
    if not isinstance(value, Mapping) or not value:
        return False
    tensors = [name for name, item in value.items() if isinstance(item, Tensor)]
    return 2 * len(tensors) > len(value) and all(isinstance(name, str) for name in tensors)
