"""One file per data set, each exporting ``Dataset``."""

from pathlib import Path

from ssat_probe import registry
from ssat_probe.images import Dataset


def open_dataset(
    name: str, root: Path | None = None, download: bool = False, img_size: tuple[int, ...] = ()
) -> Dataset:
    """Data set by name.

    Args:
        name: File name in this folder.
        root: Where it lies on disk; the embedded ones need none.
        download: Fetch it into ``root`` if it is not there, where the data set can.
        img_size: Height and width to resize to, in pixels; empty for the data set's own.

    Returns:
        The data set, opened lazily.
    """
    return registry.load("data", name).Dataset(root=root, download=download, img_size=tuple(img_size) or None)
