"""Grams: what similarity needs to know of a checkpoint's features, from one pass over the images; kept on disk."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float64, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ssat_probe import capture
from ssat_probe.capture import Site
from ssat_probe.measures.similarity import centred_gram
from ssat_probe.subject import Subject
from ssat_probe.table import DEFINITIONS, write_atomically

# Positions of each image that mode "token" looks at; bounds the memory of the Grams. Tuned, no source.
_MOST_POSITIONS = 8


@dataclass(frozen=True)
class Grams:
    """Gram matrices of groups of images, of every block of one checkpoint."""

    images: str
    "Fingerprint of the images."
    setting: str
    "Size, preparation and grid under which they were seen."
    blocks: tuple[int, ...]
    "-1 for the tokens before the first."
    num_tokens: int
    "Patch tokens of an image."
    values: Float64[Tensor, "block group image image2"]
    "From `ssat_probe.measures.similarity.centred_gram`."
    ids: Int[Tensor, "group image"]
    "Number of each image within the sample."

    @property
    def num_images(self) -> int:
        """Images in full groups."""
        return len(self.ids.unique())


def of(subject: Subject, mode: str, group: int, folder: Path | None = None) -> Grams:
    """Grams of a checkpoint, from one pass over the images, or from a folder that has them.

    Images belong to the group of their number, in whatever batches and order they come.

    Args:
        subject: Its model is in eval mode.
        mode: ``gap``, ``cls``, ``flatten`` or ``token``.
        group: Images of a group; those left over are dropped.
        folder: Where Grams are kept, by weights, images, setting, mode, group and arithmetic; None: nowhere.

    Returns:
        The Grams; a model without the tokens that a mode needs is a ValueError.
    """
    group = min(group, subject.num_images)
    place = None if folder is None else folder / _file_name(subject, mode, group)
    if place is not None and (found := _read(place, subject)) is not None:
        return found
    found = _measured(subject, mode, group)
    if place is not None:
        entries = {"values": found.values, "ids": found.ids, "blocks": torch.tensor(found.blocks)}
        write_atomically(place, save(entries | {"num_tokens": torch.tensor(found.num_tokens)}))
    return found


def _measured(subject: Subject, mode: str, group: int) -> Grams:
    sites = _sites(subject.model, mode)
    prefixes = {site.stage: capture.num_prefix_tokens(subject.model, site.stage) for site in sites}
    waiting: dict[tuple[int, int], dict[int, Tensor]] = defaultdict(dict)
    grams: dict[tuple[int, int], Tensor] = {}
    num_groups = subject.num_images // group
    num_tokens: dict[int, int] = {}

    def take(site: Site, tokens: Tensor, ids: Sequence[int]) -> None:
        """Keep features until a group is full, then its Gram alone."""
        if site not in sites:
            return
        patches = tokens[:, prefixes[site.stage] :]
        num_tokens[site.block] = patches.shape[1]
        _check_grids(num_tokens, mode)
        found = tokens[:, 0] if mode == "cls" else patches.mean(1) if mode == "gap" else patches
        for number, features in zip(ids, found.cpu().double(), strict=True):
            key = (site.block, number // group)
            waiting[key][number] = features
            if len(waiting[key]) == group:
                full = waiting.pop(key)
                grams[key] = _of_group(torch.stack([full[one] for one in sorted(full)]), mode)

    with torch.no_grad():
        for batch in subject.batches():
            with capture.features(subject.model, partial(take, ids=batch.ids.tolist()), with_prefix=True):
                subject.model(batch.images)
    blocks = tuple(site.block for site in sites)
    values = torch.stack([torch.cat([grams[block, i] for i in range(num_groups)]) for block in blocks])
    times = values.shape[1] // num_groups
    ids = torch.arange(num_groups * group).unflatten(0, (num_groups, group)).repeat_interleave(times, 0)
    return Grams(subject.fingerprint, subject.setting, blocks, num_tokens[blocks[-1]], values, ids)


def _of_group(features: Tensor, mode: str) -> Float64[Tensor, "gram image image2"]:
    """One Gram, or in mode ``token`` one per shift, which pairs every image with a position."""
    if mode != "token":
        return centred_gram(features.flatten(1))[None]
    images, num_tokens = torch.arange(len(features)), features.shape[1]
    step = -(-num_tokens // _MOST_POSITIONS)
    shifts = range(0, num_tokens, step)
    return torch.stack([centred_gram(features[images, (images + i) % num_tokens]) for i in shifts])


def _sites(model: nn.Module, mode: str) -> list[Site]:
    """Before the first block and after each; in mode ``cls`` those where a class token is among the patches."""
    sites = [site for site in capture.sites(model) if site.name in ("embed", "mlp")]
    if mode != "cls":
        return sites
    having = [site for site in sites if capture.has_class_token(model) and capture.num_prefix_tokens(model, site.stage)]
    if not having:
        raise ValueError(
            f"Mode 'cls' needs a model with a class token, got a {type(model).__name__} without. Use 'gap'."
        )
    return having


def _check_grids(tokens: dict[int, int], mode: str) -> None:
    """Mode ``token`` pairs positions of one block with those of another."""
    if mode == "token" and len(set(tokens.values())) > 1:
        found = ", ".join(str(count) for count in dict.fromkeys(tokens.values()))
        raise ValueError(
            f"CKA of mode 'token' needs one grid in all blocks, got {found} patch tokens from stage to stage. Use mode "
            "'gap' or 'flatten'."
        )


def _file_name(subject: Subject, mode: str, group: int) -> str:
    """Changes with everything that the Grams depend on."""
    facts = (subject.checkpoint.hash, subject.fingerprint, subject.setting, mode, group, subject.sample.dtype)
    digest = hashlib.sha256(repr((DEFINITIONS, *facts)).encode()).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', subject.checkpoint.label)}-{mode}-{digest}.safetensors"


def _read(place: Path, subject: Subject) -> Grams | None:
    """What lies there; None if nothing does, or nothing whole."""
    try:
        found = load(place.read_bytes())
        blocks = tuple(found["blocks"].tolist())
        num_tokens = int(found["num_tokens"])
        return Grams(subject.fingerprint, subject.setting, blocks, num_tokens, found["values"], found["ids"])
    except (OSError, SafetensorError, KeyError):
        return None
