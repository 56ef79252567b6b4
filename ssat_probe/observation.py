"""Observation: what the images of one checkpoint give, streamed past it once; which others it compares with."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssat_probe import capture, geometry
from ssat_probe.measures.bootstrap import ImageStatistics
from ssat_probe.subject import Subject

MOST_WEIGHTS = 2**18
"Attention weights looked at a time, in chunks of images and queries: a megabyte in float32. Tuned, no source."

MOST_ROWS = 2**14
"Rows of attention whose values are held until they are averaged, unless an image has more. Tuned, no source."

MOST_MAPS = 2**22
"Attention weights of all blocks together that are held at a time: 16 megabytes in float32. Tuned, no source."

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sum:
    """A sum over queries per image, to be added up over chunks; other values, one per query, are put side by side."""

    value: Tensor


@dataclass
class Observation:
    """Means over images with their spread, by block or site, in constant memory."""

    statistics: dict[Any, ImageStatistics]
    images: str
    "Fingerprint of the images."
    setting: str
    "Size, preparation and grid under which they were seen."
    num_images: int = 0
    grids: dict[capture.Site, tuple[int, int]] = field(default_factory=dict)
    "Rows and columns of patches by site."
    errors: dict[int, float] = field(default_factory=dict)
    "Self-check of the capture by block, from the first batch."
    besides: dict[Any, Any] = field(default_factory=dict)
    "What is no mean over images, by place."

    def comparable(self, first: "Observation | None") -> "Observation | None":
        """The first checkpoint, if differences to it are paired; None for itself, and for what is not comparable.

        Args:
            first: What the first checkpoint gave.

        Returns:
            It, if it saw the same images in the same setting and has the same blocks.
        """
        if first is None or first is self:
            return None
        mine, theirs = ((one.images, one.setting, [*one.statistics]) for one in (self, first))
        return first if mine == theirs else None


def of_attention(
    subject: Subject,
    rows: Callable[[capture.Attention], Mapping[str, Tensor | Sum]],
    finish: "Callable[[Values], tuple[Values, Values]] | None" = None,
    blocks: Sequence[int] = (),
) -> Observation:
    """Reduce the attention of every block, a chunk of images and queries at a time.

    Args:
        subject: Its model is in eval mode.
        rows: What a chunk of attention gives: (image, head, query) per name, or a `Sum`.
        finish: Value per image, and fraction undefined, from what all chunks of an operation gave; by default means
            over the queries where a value is defined.
        blocks: To look at; empty means all.

    Returns:
        By block; entries are what ``finish`` leaves beside the images, usually heads.
    """
    chosen = tuple(sorted(set(blocks))) or tuple(range(len(capture.blocks(subject.model))))
    seen = _nothing(subject, chosen)
    for batch in subject.batches():
        groups: list[list[Mapping[str, Tensor | Sum]]] = []
        found: list[tuple[Values, Values]] = []

        def reduce(
            one: capture.Attention, ids: Tensor = batch.ids, groups: list[Any] = groups, found: list[Any] = found
        ) -> None:
            if one.first_query == 0:  # of the next images
                groups.append([])
            groups[-1].append(rows(one))
            is_whole = one.first_query + one.rows.shape[2] == one.num_queries
            if one.is_last or (is_whole and len(groups) * one.num_queries * math.prod(one.rows.shape[:2]) > MOST_ROWS):
                found.append((finish or over_queries)(_joined(groups)))
                groups.clear()
            if one.is_last:
                seen.statistics[one.block].add(ids, *(_of_all_images(parts) for parts in zip(*found, strict=True)))
                found.clear()

        is_first = seen.num_images == 0
        with (
            torch.no_grad(),
            capture.attention(
                subject.model, reduce, only=chosen, is_checked=is_first, most_weights=MOST_WEIGHTS
            ) as errors,
        ):
            subject.model(batch.images)
        seen.errors = dict(errors) if is_first else seen.errors
        seen.num_images += len(batch.images)
    return seen


def of_maps(subject: Subject, measure: Callable[[Mapping[int, geometry.Rows]], Mapping[Any, Values]]) -> Observation:
    """Measure the attention between patches of all blocks together, as many images at a time as `MOST_MAPS` lets.

    Args:
        subject: Its model is in eval mode.
        measure: What the rows by block give: a value per image and name, for any places.

    Returns:
        By the places that ``measure`` names.
    """
    chosen = capture.blocks_with(subject.model, "patch")
    seen, size = _nothing(subject, ()), 1  # one image says how large its maps are
    for batch in subject.batches():
        start = 0
        while start < len(batch.ids):
            end = min(start + size, len(batch.ids))
            maps: dict[int, geometry.Rows] = {}

            def keep(one: capture.Attention, maps: dict[int, geometry.Rows] = maps) -> None:
                maps[one.block] = geometry.arranged(one)

            with (
                torch.no_grad(),
                capture.attention(subject.model, keep, only=chosen, is_checked=seen.num_images == 0) as errors,
            ):
                subject.model(batch.images[start:end])
            for place, values in measure(maps).items():
                seen.statistics.setdefault(place, ImageStatistics()).add(batch.ids[start:end], values)
            seen.errors = dict(errors) if seen.num_images == 0 else seen.errors
            seen.num_images += end - start
            size = max(1, MOST_MAPS * (end - start) // sum(one.rows.numel() for one in maps.values()))
            start = end
    return seen


def over_queries(values: Values) -> tuple[Values, Values]:
    """Means over the queries for which a value is defined, and the fraction of the others.

    Args:
        values: (image, head, query) per name.

    Returns:
        (image, head) per name, twice.
    """
    return (
        {name: value.nanmean(-1) for name, value in values.items()},
        {name: value.isnan().double().mean(-1) for name, value in values.items() if value.shape[-1]},
    )


def of_features(
    subject: Subject,
    measure: Callable[[Tensor], Values],
    is_wanted: Callable[[capture.Site], bool] = lambda site: True,
    *,
    as_maps: bool = False,
    also: Callable[[capture.Site, Tensor, Tensor], None] = lambda site, tokens, ids: None,
) -> Observation:
    """Measure the patch tokens of the residual stream at every site.

    Args:
        subject: Its model is in eval mode.
        measure: Value per image and name, from the patch tokens of a batch.
        is_wanted: Which sites to look at.
        as_maps: Give ``measure`` maps (image, row, column, dim) instead of tokens.
        also: Gets the tokens of a batch and the numbers of its images, for what is no mean over images.

    Returns:
        By site.

    Maps of a model whose grid nobody knows are a ValueError.
    """
    seen = _nothing(subject, [site for site in capture.sites(subject.model) if is_wanted(site)])
    for batch in subject.batches():

        def reduce(site: capture.Site, tokens: Tensor, ids: Tensor = batch.ids) -> None:
            if site in seen.statistics:
                if as_maps and site not in seen.grids:
                    raise ValueError(
                        f"The model must say the grid of its patches, got a {type(subject.model).__name__} that does "
                        "not. Use probes that need no maps: variance, tokens, spectrum or similarity."
                    )
                seen.statistics[site].add(ids, measure(tokens.unflatten(1, seen.grids[site]) if as_maps else tokens))
                also(site, tokens, ids)

        with torch.no_grad(), capture.features(subject.model, reduce) as seen.grids:
            subject.model(batch.images)
        seen.num_images += len(batch.images)
    return seen


def _nothing(subject: Subject, places: Iterable[Any]) -> Observation:
    statistics = {place: ImageStatistics() for place in places}
    return Observation(statistics, getattr(subject, "fingerprint", ""), getattr(subject, "setting", ""))


def _of_all_images(parts: Sequence[Values]) -> Values:
    return parts[0] if len(parts) == 1 else {name: torch.cat([one[name] for one in parts]) for name in parts[0]}


def _joined(groups: Sequence[Sequence[Mapping[str, Tensor | Sum]]]) -> Values:
    """Values of all images and queries, from the chunks in which they came."""
    joined: dict[str, list[Tensor]] = {}
    for parts in groups:
        for name, one in parts[0].items():
            if isinstance(one, Sum):
                value = torch.stack([part[name].value for part in parts]).sum(0)  # type: ignore[union-attr]
            else:
                value = torch.cat([part[name] for part in parts], -1)  # type: ignore[misc]
            joined.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in joined.items()}
