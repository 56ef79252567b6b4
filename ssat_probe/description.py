"""Description of a checkpoint: what it is, what it costs to look at, and which probes apply."""

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssat_probe import capture, geometry, registry
from ssat_probe.checkpoint import Checkpoint
from ssat_probe.foreign import Foreign, open_weights
from ssat_probe.probe import make
from ssat_probe.sample import Sample
from ssat_probe.source import Source
from ssat_probe.subject import Subject, refuse_idle_data_dir

_KINDS = {"fused": "fused softmax", "plain": "plain softmax", "module": "torch's MultiheadAttention"}
"What `capture.Attention` calls them."


def describe(path: Path | str, sample: Sample = Sample(), source: Source = Source()) -> list[str]:
    """What a checkpoint is, in lines; runs the model on one image, and each probe up to its second pass.

    Args:
        path: Of any checkpoint that a probe takes.
        sample: Which images would be looked at; foreign weights without any are described without the probes.
        source: What is said about foreign weights.

    Returns:
        Lines of text.
    """
    refuse_idle_data_dir([path], sample, source)
    checkpoint = open_weights(path, source, sample.data, sample.data_dir)
    lines = [str(path), *_loading(checkpoint)]
    model = checkpoint.encoder().eval()
    image = torch.zeros(1, checkpoint.facts.channels, *checkpoint.recipe.img_size)
    lines += [*_parts(checkpoint, model), *_attention(model, image), *_memory(model, image, sample.batch_size)]
    if not (sample.data or checkpoint.recipe.data):
        return [*lines, "  probes: name images with --data to see which apply"]
    return lines + [f"  {name}: {verdict}" for name, verdict in probes_that_apply(path, sample, source).items()]


def _loading(checkpoint: Checkpoint | Foreign) -> list[str]:
    """Where the weights came from and what became of them."""
    if isinstance(checkpoint, Checkpoint):
        return [f"  format: ssat-probe, {checkpoint.stage}, epoch {checkpoint.epoch}, {checkpoint.recipe.method}"]
    report = checkpoint.report
    lines = [
        f"  format: {report.layout}" + (f", entry {report.entry}" if report.entry else ""),
        f"  loaded: {len(report.loaded)} tensors, {report.fraction:.1%} of the encoder"
        if report.loaded
        else "  loaded: nothing, untrained",
    ]
    for name in ("missing", "unexpected", "resized", "dropped"):
        found = getattr(report, name)
        if found:
            lines.append(f"  {name}: {len(found)} ({_few(found)})")
    return lines + ([f"  assumed: {report.note}"] if report.note else [])


def _few(names: Sequence[str] | Mapping[str, str]) -> str:
    texts = [f"{name}: {why}" for name, why in names.items()] if isinstance(names, Mapping) else list(names)
    return "; ".join(texts[:3]) + ("; ..." if len(texts) > 3 else "")


def _parts(checkpoint: Checkpoint | Foreign, model: nn.Module) -> list[str]:
    """Size of the model and its tokens."""
    facts, size = checkpoint.facts, checkpoint.recipe.img_size
    count = sum(parameter.numel() for parameter in model.parameters())
    decoder = checkpoint.decoder()
    extra = f" + {sum(p.numel() for p in decoder.parameters()):,} in the decoder" if decoder is not None else ""
    classes = f"{facts.num_classes} known" if facts.classes else "unknown; --trained-on names their data set"
    lines = [
        f"  model: {checkpoint.recipe.model} ({type(model).__name__}), {count:,} parameters{extra}",
        f"  images: {facts.channels} x {size[0]} x {size[1]}, mean {_short(facts.mean)}, std {_short(facts.std)}",
        f"  classes: {classes}",
    ]
    with suppress(ValueError):
        grid = getattr(model, "grid", None) or getattr(getattr(model, "patch_embed", None), "grid_size", None)
        shown = "no grid"
        if grid:
            shown = f"grid {grid[0]} x {grid[1]} of patches {size[0] // grid[0]} x {size[1] // grid[1]}"
        lines.append(f"  tokens: {shown}; {_groups(model)}")
    return lines


def _short(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in values) + ")"


def _groups(model: nn.Module) -> str:
    """Tokens before the patches, by kind; timm's order is class, distillation, registers."""
    last = capture.sites(model)[-1].stage
    num_prefix = capture.num_prefix_tokens(model, last)
    if not num_prefix and capture.has_class_token(model):
        return "0 before the patches (1 class, in class attention alone)"
    counts = {
        "class": int(capture.has_class_token(model)),
        "distillation": int(getattr(model, "dist_token", None) is not None),
        "register": int(getattr(model, "num_reg_tokens", 0) or 0),
    }
    counts["other"] = num_prefix - sum(counts.values())
    named = [f"{number} {kind}" for kind, number in counts.items() if number > 0]
    where = "" if capture.num_prefix_tokens(model) == num_prefix else " in the last stage"
    return f"{num_prefix} before the patches{where}" + (f" ({', '.join(named)})" if named else "")


def _attention(model: nn.Module, image: Tensor) -> list[str]:
    """Blocks, heads, queries and keys of each, as the running model shows them."""
    try:
        blocks = capture.blocks(model)
    except ValueError as error:
        return [f"  attention: {error}"]
    seen: dict[int, str] = {}
    unknown: dict[str, str] = {}  # the first block's of sentences that are alike but for its name
    is_hierarchical = len({site.stage for site in capture.sites(model)}) > 1

    def reduce(one: capture.Attention) -> None:
        heads, queries, keys = one.rows.shape[1:]
        kind = "scores" if one.has_scores else "weights alone"
        masked = "" if one.is_valid is None else ", masked"
        try:
            where = _where(one, is_hierarchical)
        except ValueError as error:
            where = "places unknown, "
            unknown.setdefault(str(error).partition(" must ")[2], str(error))
        many = "s" if heads > 1 else ""
        seen[one.block] = f"{where}{heads} head{many}, {queries} queries x {keys} keys, {kind} visible{masked}"
        seen[one.block] += f", {_KINDS[one.kind]}"

    try:
        with torch.no_grad(), capture.attention(model, reduce) as errors:
            model(image)
    except ValueError as error:
        return [f"  attention: {len(blocks)} blocks; {error}"]
    for block, difference in errors.items():
        seen[block] += "; changed before it meets the values, so unchecked" if math.isnan(difference) else ""
    lines, start = [], 0
    for block in range(len(blocks)):
        if block + 1 == len(blocks) or seen[block + 1] != seen[start]:
            numbers = f"blocks {start} to {block}" if block > start else f"block {block}"
            lines.append(f"  {numbers}: {seen[start]}")
            start = block + 1
    return [*lines, *(f"  places: {why}" for why in unknown.values())]


def _where(one: capture.Attention, is_hierarchical: bool) -> str:
    """Grid and windows of a block of a hierarchical model; a ValueError where nobody knows the places of its tokens."""
    rows = geometry.arranged(one)
    if not is_hierarchical:
        return ""
    assert not isinstance(one.place, str)
    text = f"grid {one.place.grid[0]} x {one.place.grid[1]}, "
    if rows.num_windows == 1:
        return text
    assert one.place.windows is not None
    size, shift = one.place.windows
    shifted = f" shifted by {shift[0]} x {shift[1]}" if any(shift) else ""
    return text + f"{rows.num_windows} windows of {size[0]} x {size[1]}{shifted}, "


class _Peak(TorchDispatchMode):
    """Counts the bytes of all tensors alive that were made while it is on."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {value.untyped_storage()._cdata for value in known}  # views of these are nothing new

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._seen:
                storage = leaf.untyped_storage()
                size, key = storage.nbytes(), storage._cdata
                self._seen.add(key)
                self.now += size
                weakref.finalize(storage, self._freed, key, size)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def forward_bytes(model: nn.Module, image: Tensor) -> int:
    """Largest number of bytes of intermediate results alive at once in a pass without gradients.

    Args:
        model: In eval mode.
        image: One.

    Returns:
        Bytes for this one image, parameters not counted; what a kernel uses inside itself is not seen.
    """
    with torch.no_grad(), _Peak([image, *model.parameters(), *model.buffers()]) as peak:
        model(image)
    return peak.peak


def _memory(model: nn.Module, image: Tensor, batch_size: int) -> list[str]:
    """Memory of a pass over a batch, and of one block's attention when it is captured."""
    weights = sum(value.numel() * value.element_size() for value in [*model.parameters(), *model.buffers()])
    batch = forward_bytes(model, image) * batch_size
    largest = 0

    def reduce(one: capture.Attention) -> None:
        nonlocal largest
        largest = max(largest, math.prod(one.rows.shape) * one.rows.element_size())

    try:
        with torch.no_grad(), capture.attention(model, reduce, is_checked=False):
            model(image)
    except ValueError:
        largest = 0
    captured = f"; one block's attention {_mib(largest * batch_size)} more" if largest else ""
    return [f"  memory: weights {_mib(weights)}, a forward pass of {batch_size} images {_mib(batch)}{captured}"]


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


_ENOUGH = 16
"Images in the sample of which the first is looked at: more than any probe asks for by default."


class _EnoughError(Exception):
    """A probe has come through its first pass of the model."""


def probes_that_apply(path: Path | str, sample: Sample, source: Source) -> dict[str, str]:
    """Which probes can be run on a checkpoint, found by running each of them until its second pass of the model.

    Args:
        path: Of the checkpoint.
        sample: Which images.
        source: What is said about foreign weights.

    Returns:
        By name of the probe: ``applies``, or the sentence that says why it does not.
    """
    verdicts = {}
    for name in registry.names("probes"):
        probe = make(name)
        try:
            subject = Subject.of(path, replace(sample, num_images=_ENOUGH, batch_size=1), probe.split, source)
            with _one_pass(subject.model):
                probe.measure(subject)
        except _EnoughError:
            verdicts[name] = "applies"
        except ValueError as error:
            verdicts[name] = f"does not apply: {error}"
        else:
            verdicts[name] = "applies"
    return verdicts


@contextmanager
def _one_pass(model: nn.Module) -> Iterator[None]:
    """Let the first layer of a model run once; the second time is enough."""
    leaves = (module for module in model.modules() if not list(module.children()))
    first = next(leaf for leaf in leaves if list(leaf.parameters()))
    passes: list[bool] = []

    def count(*_: Any) -> None:
        if passes:
            raise _EnoughError
        passes.append(True)

    handle = first.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()
