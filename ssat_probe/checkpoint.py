"""Checkpoint on disk: weights and the whole recipe as plain data, in one file that rebuilds itself."""

import dataclasses
import hashlib
import io
import json
import pickle
import pickletools
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssat_probe.archive import check_declared_size, shown
from ssat_probe.images import Facts
from ssat_probe.network import build_decoder, build_encoder
from ssat_probe.recipe import Recipe
from ssat_probe.table import write_atomically

FORMAT = "ssat-probe/1"
DECODER_PREFIX = "decoder."

MOST_ROOM = (10, 2**26)
"Values a model may have: times those of its file, and beyond that. Tuned, no source."


@dataclass(frozen=True)
class Checkpoint:
    """Weights with everything that is needed to rebuild the network and to prepare images for it."""

    path: Path
    recipe: Recipe
    "Resolved: no default is left open."
    facts: Facts
    "Of the data it was trained on."
    stage: str
    "Stage of the training at whose end, or in which, the weights were taken."
    epoch: int | float
    "Epochs of that stage that had been finished; a fraction within one."
    state: dict[str, Tensor]
    "Encoder and head under timm's names; the decoder, where there is one, behind ``decoder.``."

    @property
    def label(self) -> str:
        """Name in tables and figures: that of the run, with the stage where it is not the last one."""
        return self.recipe.name if self.stage in ("train", "finetune") else f"{self.recipe.name}-{self.stage}"

    @property
    def has_decoder(self) -> bool:
        """Whether the file holds a decoder."""
        return any(name.startswith(DECODER_PREFIX) for name in self.state)

    @cached_property
    def hash(self) -> str:
        """sha256 over recipe, names, shapes, dtypes and values; the same wherever the file lies."""
        return hash_of([self.recipe.identity, self.stage, self.epoch], self.state)

    def encoder(self) -> nn.Module:
        """Encoder with its head and the stored weights, in training mode.

        Returns:
            A new module; weights that do not fit the recipe's model are a ValueError that names the first one.
        """
        weights = {name: value for name, value in self.state.items() if not name.startswith(DECODER_PREFIX)}
        return self._loaded(build_encoder, weights)

    def decoder(self) -> nn.Module | None:
        """Decoder with the stored weights, in training mode.

        Returns:
            A new module, or none where the file holds no decoder.
        """
        if not self.has_decoder:
            return None
        weights = {
            name.removeprefix(DECODER_PREFIX): value
            for name, value in self.state.items()
            if name.startswith(DECODER_PREFIX)
        }
        return self._loaded(build_decoder, weights)

    def _loaded(self, build: Callable[[Recipe, Facts], nn.Module], weights: dict[str, Tensor]) -> nn.Module:
        """The module with the weights, matched by name and shape before there is room for a module of any size."""
        with torch.device("meta"):
            outline = build(self.recipe, self.facts)
        check_room(outline, weights, str(self.path))
        needed = outline.state_dict()
        for name in sorted(needed.keys() | weights.keys()):
            got = f"got shape {tuple(weights[name].shape)}" if name in weights else "got none"
            must = f"must have shape {tuple(needed[name].shape)}" if name in needed else "must not be there"
            if name not in weights or name not in needed or weights[name].shape != needed[name].shape:
                raise ValueError(
                    f"{self.path}: {name!r} {must} for the recipe's {self.recipe.model}, {got}; "
                    "the file holds weights of another model."
                )
        module = build(self.recipe, self.facts)
        module.load_state_dict(weights)
        return module


def check_room(outline: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Refuse to make a model out of all proportion to the weights that are to fill it.

    Args:
        outline: The model, made on the device ``meta``, where it takes no room.
        weights: Tensors by name.
        name: Of their file.

    Raises:
        ValueError: If it has more than ten times their values, and 2^26 beyond that (masks of windows, say).
    """
    values = sum(one.numel() for one in [*outline.parameters(), *outline.buffers()])
    if values > MOST_ROOM[0] * num_stored(weights) + MOST_ROOM[1]:
        raise ValueError(
            f"{name} must hold about as many values as its model has, got {num_stored(weights):,} for a model of "
            f"{values:,}; it would fill the memory, so it was not made: get the file again from whom you trust."
        )


def num_stored(weights: Mapping[str, Tensor]) -> int:
    """Values behind some tensors; those that several of them share count once.

    Args:
        weights: Tensors by name.

    Returns:
        At most as many as their storages hold.
    """
    storages = {one.untyped_storage().data_ptr(): one for one in weights.values()}
    return sum(one.untyped_storage().nbytes() // one.element_size() for one in storages.values())


def hash_of(facts: Any, state: Mapping[str, Tensor]) -> str:
    """sha256 of plain data and of the names, shapes, dtypes and values of tensors.

    Args:
        facts: Anything that JSON takes.
        state: Tensors by name; their order does not matter.

    Returns:
        Hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def state_of(encoder: nn.Module, decoder: nn.Module | None) -> dict[str, Tensor]:
    """Weights of a network as a checkpoint holds them, on the CPU.

    Args:
        encoder: Encoder with its head.
        decoder: Decoder, if any.

    Returns:
        A copy.
    """
    parts = {"": encoder, DECODER_PREFIX: decoder}
    return {
        prefix + name: value.detach().cpu().clone()
        for prefix, module in parts.items()
        if module is not None
        for name, value in module.state_dict().items()
    }


def save_checkpoint(checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically to its path.

    Args:
        checkpoint: What to write.

    Returns:
        Its path.
    """
    return save_tensors(
        {
            "format": FORMAT,
            "recipe": checkpoint.recipe.as_dict(),
            "facts": json.loads(json.dumps(dataclasses.asdict(checkpoint.facts))),
            "stage": checkpoint.stage,
            "epoch": checkpoint.epoch,
            "hash": checkpoint.hash,
            "model": checkpoint.state,
        },
        checkpoint.path,
    )


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint; nothing in the file can run code.

    Args:
        path: A file that ``save_checkpoint`` wrote.

    Returns:
        The checkpoint; what ``checkpoint_of`` refuses is a ValueError.
    """
    path = Path(path)
    return checkpoint_of(load_tensors(path, "a checkpoint"), path)


def checkpoint_of(content: Any, path: Path) -> Checkpoint:
    """Checkpoint from what its file holds.

    Args:
        content: Of the file.
        path: Of the file.

    Returns:
        The checkpoint.

    Raises:
        ValueError: If the file is not a checkpoint of this tool, its recipe is not valid, or its content does not
            agree with its hash.
    """
    keys = ("format", "recipe", "facts", "stage", "epoch", "hash", "model")
    if not isinstance(content, dict) or any(key not in content for key in keys) or content["format"] != FORMAT:
        raise ValueError(
            f"{path} must be a checkpoint written by ssat-probe (format {FORMAT}), got a file with: "
            f"{shown(content)}; give one that ssat-probe train wrote."
        )
    try:
        recipe = _recipe_of(content["recipe"], path)
        facts = Facts(**content["facts"])
        checkpoint = Checkpoint(path, recipe, facts, content["stage"], content["epoch"], content["model"])
        is_whole = checkpoint.hash == content["hash"]
    except (TypeError, AttributeError) as error:  # a part is not of its type
        raise ValueError(_damaged(path, "a checkpoint")) from error
    if not is_whole:
        raise ValueError(_damaged(path, "a checkpoint"))
    return checkpoint


def _recipe_of(values: Any, path: Path) -> Recipe:
    """Recipe of a file; a value that no recipe can have is a sentence that names the file."""
    try:
        return Recipe.from_dict(values, source=str(path))
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def save_tensors(content: dict[str, Any], path: Path) -> Path:
    """Write tensors and plain data atomically, so that ``load_tensors`` opens them.

    Args:
        content: Tensors, numbers, strings, lists and dictionaries of them.
        path: Where to write.

    Returns:
        ``path``.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return write_atomically(path, buffer.getvalue())


def load_tensors(path: Path, what: str) -> Any:
    """Open a file of tensors and plain data, on the CPU; a pickle that would run code is refused.

    Args:
        path: The file.
        what: What it must be, with its article; goes into messages.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds code, or declares more than it holds.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be {what}, got {'a folder' if path.is_dir() else 'no such file'}.")
    check_declared_size(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
        MemoryError,
        pickle.PickleError,
        struct.error,
    ) as error:
        code = _code_in(path, error)
        if code:
            raise ValueError(
                f"{path} must hold tensors and plain data alone, got a pickle that would run code when opened "
                f"({code}), so it was not opened; save a state_dict instead."
            ) from error
        raise ValueError(_damaged(path, what)) from error


def _code_in(path: Path, error: Exception) -> str:
    """Name of the function or class that a pickle would have called; empty if it is no such file."""
    named = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported class ([\w.]+)", str(error))
    if named:
        return (named[1] or named[2]).rstrip(".")
    content = path.read_bytes()
    if content.startswith(b"PK"):
        return ""
    words: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(content):
            words += [str(argument)] if "UNICODE" in opcode.name else []
            words += str(argument).split() if opcode.name == "GLOBAL" else []
            if opcode.name in ("REDUCE", "NEWOBJ", "INST", "OBJ"):
                return ".".join(words[-2:])
            if opcode.name == "STACK_GLOBAL":
                return ".".join(words[-2:])
    except ValueError:
        return ""
    return ""


def _damaged(path: Path, what: str) -> str:
    return (
        f"{path} must be {what}, got {path.stat().st_size} bytes that cannot be read as one; "
        "it is damaged, cut short or of another kind: copy or train it again."
    )
