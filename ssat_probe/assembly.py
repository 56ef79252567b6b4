"""Assembly of a model from foreign weights: every tensor goes where its name says, and every one is accounted for."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed, resize_rel_pos_bias_table_simple
from torch import Tensor, nn

from ssat_probe.architecture import MOST_BLOCKS, shape_of
from ssat_probe.checkpoint import check_room
from ssat_probe.decoders.shallow import Decoder
from ssat_probe.formats import Converted
from ssat_probe.models import vit
from ssat_probe.source import Source

DECODER_HEADS = 16
"Of He et al. (2022) and Das et al. (2024); their files do not say it."

_TABLE = "relative_position_bias_table"

HEAD_NAMES = ("head.", "head_dist.", "fc.", "classifier.")
"Not counted as encoder."


@dataclass(frozen=True)
class Report:
    """What became of the tensors of a foreign file."""

    layout: str
    "File name in ``formats``, or ``timm:NAME``."
    entry: str = ""
    "Entry of the file that the weights came from."
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    "Names of the model that kept their random values."
    unexpected: tuple[str, ...] = ()
    "Names of the file that the model has no place for."
    resized: dict[str, str] = field(default_factory=dict)
    "Resampled ones, with the old and the new shape."
    dropped: dict[str, str] = field(default_factory=dict)
    "Names of the file that were left out on purpose, and why."
    fraction: float = 0.0
    "Share of the encoder's values that were loaded."
    note: str = ""
    "What was assumed because the file does not say it."


def fill(model: nn.Module, converted: Converted, layout: str, entry: str, source: Source) -> Report:
    """Put foreign weights into a model, each by its name.

    Args:
        model: Whose tensors are overwritten.
        converted: The weights.
        layout: For the report.
        entry: For the report.
        source: Whether to resample, and whether a part will do.

    Returns:
        What became of each tensor.

    Raises:
        ValueError: If the encoder would not be filled, or tensors would be left over, and that was not allowed.
    """
    needed = model.state_dict()
    fitting, resized = _fitted(model, needed, converted.encoder, source)
    wanting = [name for name in needed if name not in fitting]
    unexpected = [name for name in converted.encoder if name not in fitting]
    total = sum(value.numel() for name, value in needed.items() if not name.startswith(HEAD_NAMES))
    filled = sum(needed[name].numel() for name in fitting if not name.startswith(HEAD_NAMES))
    report = Report(
        layout, entry, tuple(sorted(fitting)), tuple(sorted(wanting)), tuple(sorted(unexpected)), resized,
        converted.dropped, filled / max(total, 1), converted.note,
    )  # fmt: skip
    if (wanting or unexpected) and not source.allow_partial:
        raise ValueError(_misfit(report, needed, converted.encoder))
    model.load_state_dict(fitting, strict=False)
    return report


def _fitted(
    model: nn.Module, needed: Mapping[str, Tensor], state: Mapping[str, Tensor], source: Source
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that have their place in the model, resampled where that was asked for, and which those are."""
    fitting, resized = {}, {}
    for name, value in state.items():
        if name not in needed:
            continue
        want = tuple(needed[name].shape)
        if tuple(value.shape) != want:
            resample, kept = _resampling(name)
            if resample is None or value.ndim != len(want) or tuple(value.shape[kept]) != want[kept]:
                continue
            if not source.resize:
                raise ValueError(
                    f"{name!r} must have shape {want} for this image and patch size, got {tuple(value.shape)}; give "
                    "--resize to resample it, or the size that it was trained with."
                )
            resized[name] = f"{tuple(value.shape)} to {want}"
            value = resample(model, name, value, want)
            if tuple(value.shape) != want:
                resized.pop(name)
                continue
        fitting[name] = value
    return fitting, resized


def _resampling(name: str) -> tuple[Callable[[nn.Module, str, Tensor, tuple[int, ...]], Tensor] | None, slice]:
    """How a tensor of another shape is resampled, and the axes that must agree all the same."""
    if name.endswith(_TABLE):
        return _resampled_table, slice(1, 2)
    if name == "pos_embed":
        return _resampled_positions, slice(2, 3)
    return (_resampled_patches, slice(2)) if name == "patch_embed.proj.weight" else (None, slice(0))


def _resampled_table(model: nn.Module, name: str, value: Tensor, want: tuple[int, ...]) -> Tensor:
    """Relative positions of a window of another size."""
    window: Any = model.get_submodule(name.removesuffix(f".{_TABLE}")).window_size
    return resize_rel_pos_bias_table_simple(value.float(), window, want)


def _resampled_positions(model: nn.Module, name: str, value: Tensor, want: tuple[int, ...]) -> Tensor:
    grid = patch_grid(model)
    return resampled_positions(value, grid, want[1] - math.prod(grid))


def patch_grid(model: nn.Module) -> tuple[int, int]:
    """Grid of the patches that positions are of.

    Args:
        model: Of ours or of timm's, with positions for a fixed size.

    Returns:
        Rows and columns.
    """
    grid: Any = getattr(model, "grid", None) or model.patch_embed.grid_size  # type: ignore[union-attr]
    return int(grid[0]), int(grid[1])


def resampled_positions(
    value: Tensor, grid: tuple[int, int], num_prefix: int, old: tuple[int, int] | None = None
) -> Tensor:
    """Positions for another grid, bicubic with antialiasing; the ones before the patches stay.

    Args:
        value: (1, token, dim).
        grid: Rows and columns wanted.
        num_prefix: Positions before the patches.
        old: Rows and columns of the grid that they are of; a square where nobody knows.

    Returns:
        Of the new length; ``value`` itself where it cannot be of the old grid.
    """
    num_patches = max(value.shape[1] - num_prefix, 0)
    rows, columns = old or (math.isqrt(num_patches),) * 2
    if rows * columns != num_patches or not num_patches:
        return value
    # Not timm's resample_abs_pos_embed, which takes a square grid of as many patches for the same one.
    maps = value[:, num_prefix:].float().unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, grid, mode="bicubic", antialias=True)
    return torch.cat([value[:, :num_prefix].float(), maps.flatten(2).mT], dim=1)


def _resampled_patches(model: nn.Module, name: str, value: Tensor, want: tuple[int, ...]) -> Tensor:
    return resample_patch_embed(value.float(), list(want[2:]))


def _misfit(report: Report, needed: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """The sentence that refuses."""

    def few(names: tuple[str, ...]) -> str:
        shown = [
            f"{name} of shape {tuple(state[name].shape)} for {tuple(needed[name].shape)}"
            if name in state and name in needed
            else name
            for name in names[:3]
        ]
        return f"{len(names)} ({', '.join(shown)}{', ...' if len(names) > 3 else ''})" if names else "none"

    return (
        f"The weights must fill the model and nothing be left over, got {report.fraction:.1%} of the encoder "
        f"(format {report.layout}); missing: {few(report.missing)}; unexpected: {few(report.unexpected)}. "
        "Name the right model with --model timm:NAME, or give --allow-partial."
    )


def filled_decoder(converted: Converted, model: nn.Module, source: Source) -> tuple[nn.Module | None, dict[str, str]]:
    """Decoder that belongs to foreign weights.

    Args:
        converted: The weights.
        model: The encoder.
        source: Whether to resample, and whether a part will do.

    Returns:
        The decoder with its weights, and which were resampled; none where there is none or a part was allowed.

    Raises:
        ValueError: If the weights do not fill it.
    """
    state = dict(converted.decoder)
    if not state or not isinstance(model, vit.Model):
        return None, {}
    width = shape_of(state, "embed.weight", 2)[0]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    values = math.prod(model.patch_size) * model.channels
    heads = DECODER_HEADS if width % DECODER_HEADS == 0 else 1
    if depth > MOST_BLOCKS:
        raise ValueError(f"The decoder must have at most {MOST_BLOCKS} blocks, got {depth}; no model has more.")
    make = partial(
        Decoder, encoder_dim=model.dim, grid=model.grid, patch_values=values, depth=depth, width=width, heads=heads
    )
    with torch.device("meta"):
        check_room(make(), state, "The decoder")
    decoder = make()
    for module in decoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = converted.norm_eps
    needed, resized = decoder.state_dict(), {}
    old = state.get("pos_embed")
    if old is not None and old.ndim == 3 and old.shape != needed["pos_embed"].shape and source.resize:
        state["pos_embed"] = resampled_positions(old, model.grid, 1)
        resized["decoder.pos_embed"] = f"{tuple(old.shape)} to {tuple(state['pos_embed'].shape)}"
    wrong = sorted(
        name
        for name in needed.keys() | state.keys()
        if name not in needed or name not in state or needed[name].shape != state[name].shape
    )
    if wrong and not source.allow_partial:
        raise ValueError(
            f"The decoder's weights must fill it, got {len(wrong)} that do not fit ({', '.join(wrong[:3])}); "
            "give --resize for another image size, or --allow-partial to do without the decoder."
        )
    if wrong:
        return None, {}
    decoder.load_state_dict(state)
    return decoder, resized
