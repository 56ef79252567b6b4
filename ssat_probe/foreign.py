"""Weights that were not trained here: a file of another tool, or a model of timm's by name."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn

from ssat_probe import registry
from ssat_probe.architecture import inferred_model, num_classes_of, seeded, timm_model
from ssat_probe.archive import few
from ssat_probe.assembly import Report, fill, filled_decoder
from ssat_probe.checkpoint import (
    DECODER_PREFIX,
    FORMAT,
    Checkpoint,
    check_room,
    checkpoint_of,
    hash_of,
    state_of,
)
from ssat_probe.container import open_content, take_state
from ssat_probe.data import open_dataset
from ssat_probe.formats import Converted, detect
from ssat_probe.hierarchy import inferred_cvt, inferred_swin, kind_of
from ssat_probe.images import Facts
from ssat_probe.preparation import Preparation
from ssat_probe.source import Source

TIMM = "timm:"


@dataclass(frozen=True)
class Origin:
    """What is known of how foreign weights were made, under the names of a recipe."""

    model: str
    data: str
    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    method: str = ""
    seed: str = ""
    subset: None = None
    subset_seed: int = 0
    lambda_weight: float = 0.1
    "Of Das et al. (2024); weighs the joint loss of files with a head and a decoder."
    mask_ratio: float = 0.75
    "Of He et al. (2022) and Das et al. (2024)."
    norm_pix: bool = False
    weight_decay: float = 0.0
    "Unknown, so there is no decay term."
    augmentation: str = "none"
    "Unknown, so nothing is augmented."

    @property
    def lambda_ends(self) -> tuple[float, float]:
        """λ at the beginning and at the end of the training."""
        return self.lambda_weight, self.lambda_weight

    @property
    def name(self) -> str:
        """Name of a run: there is none but the model's."""
        return self.model


@dataclass(frozen=True)
class Foreign:
    """Foreign weights in a model, with everything a subject asks of a checkpoint."""

    path: Path
    label: str
    recipe: Origin
    facts: Facts
    "Its classes are empty where nobody knows them."
    preparation: Preparation
    report: Report
    model: nn.Module
    make: Callable[[], nn.Module]
    "The same architecture with random weights, from torch's global generator."
    decoder_: nn.Module | None = None
    epoch: int | str = ""
    stage: str = ""

    @property
    def state(self) -> dict[str, Tensor]:
        """Encoder, head and decoder, as in a checkpoint of ours."""
        return state_of(self.model, self.decoder_)

    @property
    def has_decoder(self) -> bool:
        """Whether there is a decoder."""
        return self.decoder_ is not None

    @cached_property
    def hash(self) -> str:
        """sha256 over the model's name, its preparation, names, shapes, dtypes and values."""
        facts = [self.recipe.model, dataclasses.astuple(self.preparation), self.facts.mean, self.facts.std]
        return hash_of(facts, self.state)

    def encoder(self) -> nn.Module:
        """Encoder with its head; the same module every time, in training mode."""
        assert self.hash  # taken while the weights are as the file had them
        return self.model.train()

    def untrained(self) -> "Foreign":
        """The same architecture with random weights of seed 0, without a decoder."""
        report = Report(self.report.layout, fraction=1.0, note="untrained twin")
        return dataclasses.replace(self, model=seeded(0, self.make), decoder_=None, epoch=0, report=report)

    def decoder(self) -> nn.Module | None:
        """Decoder, or none; the same module every time, in training mode."""
        return self.decoder_.train() if self.decoder_ is not None else None


def open_weights(
    path: Path | str, source: Source = Source(), data: str = "", data_dir: Path | None = None
) -> Checkpoint | Foreign:
    """Weights of any kind that is known: our own checkpoint, a file of another tool, a model of timm's.

    Args:
        path: Of a file, or ``timm:NAME``, ``timm:NAME?seed=3`` (untrained) or ``timm:NAME?pretrained``.
        source: What the user says about weights that are not ours.
        data: Data set to look at; an untrained model gets a head for its classes.
        data_dir: Where that data set lies.

    Returns:
        Ours exactly as ``load_checkpoint`` reads it, or foreign ones.

    Raises:
        ValueError: If it is none of these, or its weights do not fill a model.
    """
    if str(path).startswith(TIMM):
        return _of_timm(str(path), source, data, data_dir)
    path = Path(path)
    content = open_content(path, source.trust)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return checkpoint_of(content, path)
    state, entry = take_state(content, path, source.entry)
    layout = detect(state)
    if not layout and not source.model:
        raise ValueError(
            f"{path} must be a checkpoint written by ssat-probe (format {FORMAT}) or weights in one of the formats "
            f"{', '.join(registry.names('formats'))}, got a file with: {few(state)}; "
            "if it holds a model of timm's, name it with --model timm:NAME."
        )
    try:
        own_dir = data_dir if source.trained_on == data else None
        found = _of_file(path, source, state, layout or "timm", entry, own_dir)
        return _as_told(found, _told(content, source))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _of_file(
    path: Path, source: Source, state: dict[str, Tensor], layout: str, entry: str, data_dir: Path | None
) -> Foreign:
    """Weights of another tool in a model."""
    converted: Converted = registry.load("formats", layout).convert(state)
    num_classes = num_classes_of(converted.encoder)
    classes = _classes(source.trained_on, data_dir, num_classes)
    name, kind = source.model.removeprefix(TIMM), kind_of(converted.encoder)
    inferred = {"Swin": inferred_swin, "CvT": inferred_cvt, "ViT": inferred_model}[kind]

    def make() -> nn.Module:
        if not name:
            return inferred(converted, source)
        is_pooled = "fc_norm.weight" in converted.encoder and "norm.weight" not in converted.encoder
        return timm_model(name, source, num_classes, **({"global_pool": "avg"} if is_pooled else {}))

    if not name:
        with torch.device("meta"):
            check_room(make(), converted.encoder | converted.decoder, "The file")
    model = seeded(0, make)
    report = fill(model, converted, layout, entry, source)
    decoder, resized = filled_decoder(converted, model, source)
    if converted.decoder and decoder is None:
        reason = "its encoder has no masked pass" if name else "it does not fit this image or patch size"
        lost = {DECODER_PREFIX + part: reason for part in converted.decoder}
        report = dataclasses.replace(report, dropped=report.dropped | lost)
    pixels = "told" if source.mean else "timm's configuration says" if name else converted.pixels
    note = "; ".join(part for part in (converted.note, f"images normalised as {pixels}") if part)
    report = dataclasses.replace(report, resized=report.resized | resized, note=note)
    config = resolve_model_data_config(model) if name else {"mean": converted.mean, "std": converted.std}
    label = f"{path.stem}-{entry}" if entry not in ("", "model", "state_dict") else path.stem
    told = kind if layout == kind.lower() else f"{layout} {kind}"
    return _foreign(path, label, name or told, classes, model, make, decoder, report, config, source)


def _as_told(found: Foreign, told: dict[str, Any]) -> Foreign:
    """With what is known of the masked pass, and a word on what its decoder predicts."""
    report = found.report
    if found.has_decoder:
        pixels = "normalised patch by patch" if told["norm_pix"] else "as they are"
        report = dataclasses.replace(report, note=f"{report.note}; the decoder predicts pixels {pixels}")
    return dataclasses.replace(found, recipe=dataclasses.replace(found.recipe, **told), report=report)


def _told(content: Any, source: Source) -> dict[str, Any]:
    """What a file that holds its training's options says of its masked pass; the user's word goes first."""
    options = vars(content["args"]) if isinstance(content, dict) and hasattr(content.get("args"), "__dict__") else {}
    ratio, norm_pix = options.get("mask_ratio"), options.get("norm_pix_loss")
    told: dict[str, Any] = {"norm_pix": source.norm_pix or norm_pix is True}
    return told | ({"mask_ratio": float(ratio)} if isinstance(ratio, int | float) and 0 < ratio < 1 else {})


def _of_timm(words: str, source: Source, data: str, data_dir: Path | None) -> Foreign:
    """A model of timm's by name, with random weights or those of its hub."""
    found = re.fullmatch(rf"{TIMM}([^?]+)(?:\?(pretrained|seed=(\d+)))?", words)
    if not found:
        raise ValueError(
            f"A model of timm's must be timm:NAME, timm:NAME?pretrained or timm:NAME?seed=3, got {words!r}."
        )
    name, choice = found[1], found[2] or "seed=0"
    if choice == "pretrained":
        return _pretrained(words, name, source, data_dir)
    classes = _classes(source.trained_on or data, data_dir, None)

    def make() -> nn.Module:
        return timm_model(name, source, len(classes) or None)

    model = seeded(int(found[3] or 0), make)
    note = "a head for the classes of the images" if classes else "a head for as many classes as timm gives it"
    report = Report(f"{TIMM}{name}", note=note, fraction=1.0)
    label = f"{name}-untrained" + (f"-{found[3]}" if found[3] else "")
    config = resolve_model_data_config(model)
    made = _foreign(Path(words), label, name, classes, model, make, None, report, config, source)
    return dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, seed=found[3] or "0", data=""))


def _pretrained(words: str, name: str, source: Source, data_dir: Path | None) -> Foreign:
    """A model of timm's with the weights of its hub."""

    def make() -> nn.Module:
        return timm_model(name, source, None)

    model = seeded(0, lambda: timm_model(name, source, None, pretrained=True))
    own = tuple(model.pretrained_cfg.get("input_size", ())[1:])  # type: ignore[union-attr, operator]
    size = _size_of(model)
    resized = {"pos_embed": f"from images of {own} to {size}"} if own and own != size else {}
    if resized and not source.resize:
        raise ValueError(
            f"{words} must be shown images of {own} pixels, for which it was trained, got --img-size {size}; "
            "give --resize to resample its positions."
        )
    classes = _classes(source.trained_on, data_dir, model.num_classes)  # type: ignore[arg-type]
    subset = infer_imagenet_subset(model)
    if not classes and subset:
        classes = tuple(ImageNetInfo(subset).label_names())
    loaded = tuple(model.state_dict())
    report = Report(f"{TIMM}{name}", loaded=loaded, resized=resized, fraction=1.0, note="weights of timm's hub")
    config = resolve_model_data_config(model)
    return _foreign(Path(words), f"{name}-pretrained", name, classes, model, make, None, report, config, source)


def _foreign(
    path: Path,
    label: str,
    name: str,
    classes: tuple[str, ...],
    model: nn.Module,
    make: Callable[[], nn.Module],
    decoder: nn.Module | None,
    report: Report,
    config: dict[str, Any],
    source: Source,
) -> Foreign:
    """All parts as one."""
    size, patch, channels = _size_of(model), _patch_of(model), _channels_of(model)
    mean, std = (tuple(getattr(source, name) or config[name]) for name in ("mean", "std"))
    if len(mean) == 1:
        mean, std = mean * channels, std * channels
    if len(mean) != channels:
        raise ValueError(
            f"mean and std must have one number for each of the {channels} channels that the model takes, got {mean} "
            f"and {std}; give them with --mean and --std."
        )
    facts = Facts(classes, size, channels, mean, std, False, "", "", "")
    preparation = Preparation(size, channels, config.get("crop_pct") or 1.0, config.get("interpolation", "bicubic"))
    origin = Origin(name, source.trained_on, size, patch)
    return Foreign(path, label, origin, facts, preparation, report, model, make, decoder)


def _classes(data: str, data_dir: Path | None, num_classes: int | None) -> tuple[str, ...]:
    """Classes of a data set; empty where none is named. A head for another number of them is a ValueError."""
    if not data:
        return ()
    classes = open_dataset(data, data_dir).facts.classes
    if num_classes is not None and len(classes) != num_classes:
        raise ValueError(
            f"trained_on must name a data set with the {num_classes} classes that the head has, got {data!r} with "
            f"{len(classes)}; name another, or none."
        )
    return classes


def _size_of(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model takes."""
    size = getattr(model, "img_size", None) or getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = size or resolve_model_data_config(model)["input_size"][1:]
    return int(size[0]), int(size[1])


def _patch_of(model: nn.Module) -> tuple[int, int]:
    """Height and width of a patch in pixels; that of the first stage where there are several."""
    patch = getattr(model, "patch_size", None) or getattr(getattr(model, "patch_embed", None), "patch_size", None)
    height, width = patch if isinstance(patch, tuple | list) else (patch or 1,) * 2
    return int(height), int(width)


def _channels_of(model: nn.Module) -> int:
    """Channels of the images that a model takes."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
