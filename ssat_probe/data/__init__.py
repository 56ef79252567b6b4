"""One file per data set, each exporting ``Dataset``."""

import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path

from ssat_probe import registry
from ssat_probe.images import Dataset

PREFIX = "hf:"
"Of names of Hugging Face's."


def open_dataset(
    name: str, root: Path | None = None, download: bool = False, img_size: tuple[int, ...] = ()
) -> Dataset:
    """Data set by name.

    Args:
        name: File name in this folder, or ``hf:NAME`` for data of Hugging Face.
        root: Where it lies on disk; the embedded ones need none.
        download: Fetch it into ``root`` if it is not there, where the data set can.
        img_size: Height and width to resize to, in pixels; empty for the data set's own.

    Returns:
        The data set, opened lazily.
    """
    options = {"root": root, "download": download, "img_size": tuple(img_size) or None}
    if name.startswith(PREFIX):
        return registry.load("data", "huggingface").Dataset(name=name.removeprefix(PREFIX), **options)
    return registry.load("data", name).Dataset(**options)


def refuse_idle_options(names: Collection[str], root: Path | None, download: bool) -> None:
    """Refuse options of the command line that have no effect on embedded data sets.

    Args:
        names: Of the data sets that are used.
        root: What was given for ``--data-dir``.
        download: Whether ``--download`` was given.

    Raises:
        ValueError: If one was given and no data set needs anything on disk, or can be fetched.
    """
    option = "--data-dir" if root is not None else "--download"
    if (root is not None or download) and not any(open_dataset(name).source.tree for name in names):
        raise ValueError(
            f"{option} must have an effect, got one that has none: data {', '.join(names)} is embedded; leave it out."
        )
    if download and not any(open_dataset(name).source.address for name in names):
        raise ValueError(
            f"--download must have an effect, got one that has none: data {', '.join(names)} is your own; leave it out."
        )


def description(name: str, root: Path | None = None) -> Iterator[str]:
    """What a data set is, how it must lie on disk, how to get it; then a check of what is there.

    The check reads every split (counts, files, labels) and decodes its first image; what is wrong is the error of the
    data set itself, raised after the description.

    Args:
        name: File name in this folder.
        root: Where it lies on disk; without it, only embedded sets are checked.

    Yields:
        Lines to print.

    Raises:
        FileNotFoundError: If something is missing in ``root``.
    """
    dataset = open_dataset(name, root)
    source, is_checked = dataset.source, root is not None or not dataset.source.tree
    yield f"{name}: {registry.summary('data', 'huggingface' if name.startswith(PREFIX) else name)}"
    yield (
        f"Layout of --data-dir:\n{textwrap.indent(source.tree, '  ')}" if source.tree else "Layout: nothing is needed."
    )
    if source.address:
        yield f"Source: {source.address}"
    yield f"How to get it: {source.how}"
    try:
        yield from _stated(dataset)
    except FileNotFoundError as error:
        if root is not None:
            raise
        yield str(error)
        return
    if not is_checked:
        yield "Check: none, since no folder was named; add --data-dir."
        return
    for split in dataset.official:
        images = dataset.images(split)
        shape = "x".join(map(str, images.read([0]).shape[2:]))
        yield f"Check of {split}: {len(images):,} images, read at {shape}; as it should be."


def _stated(dataset: Dataset) -> Iterator[str]:
    """The facts, a line each."""
    facts = dataset.facts
    shown = ", ".join(facts.classes[:5]) + (", ..." if facts.num_classes > 5 else "")
    colours = "grey" if facts.channels == 1 else "colour"
    yield f"Classes: {facts.num_classes:,} ({shown})"
    yield f"Images: {facts.img_size[0]}x{facts.img_size[1]} unless --img-size says otherwise, {colours}"
    yield f"Mean: {', '.join(map(str, facts.mean))}; standard deviation: {', '.join(map(str, facts.std))}"
    yield f"Mirrored images: {'keep their class' if facts.flip else 'are never made'}"
    yield f"Splits: {facts.splits}"
    yield f"Licence: {facts.licence}"
    yield f"Citation: {facts.citation}"
