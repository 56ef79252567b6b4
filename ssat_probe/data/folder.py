"""Any folder of images: one folder per split (train, and val or test or both), in it one folder per class."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from ssat_probe import files
from ssat_probe.images import Facts, Images, Source
from ssat_probe.registry import known

NUM_SAMPLED = 1000
"Training images, evenly spaced, that mean, standard deviation and channels are taken from."


@dataclass(frozen=True)
class Dataset:
    """One's own images, ``<root>/train/<class>/*.jpg`` and so on.

    A folder with ``train`` and ``val`` but no ``test`` is taken as ImageNet is: ``val`` is what is tested on, and the
    images for validation are carved from ``train``. Mirrored images are taken to keep their class; where they do not
    (letters, say), train with the augmentation ``crop``.
    """

    root: Path | None = None
    "Folder that holds train, and val or test or both."
    download: bool = False
    "Unused: nothing is known about where the images come from."
    img_size: tuple[int, int] | None = None
    "Height and width to scale and crop the images to; none keeps the size that they all share."

    source: ClassVar[Source] = Source(
        tree="""
train/
  <class>/
    <any name>.jpg (or png, tif, webp, ...)
    ...
  ...
val/ and test/, one of them or both, with the same classes
""".strip(),
        how="Your own images. The files of a class may lie in folders of their own.",
    )

    @property
    def official(self) -> tuple[str, ...]:
        """Names of the splits that exist."""
        return tuple(name for name in ("train", "val", "test") if name in self._folders)

    @cached_property
    def facts(self) -> Facts:
        """What the images themselves tell."""
        mean, std = self._colour
        return Facts(
            classes=self._classes,
            img_size=self._img_size,
            channels=self._channels,
            mean=mean,
            std=std,
            flip=True,
            splits=self._policy,
            licence="not known",
            citation="not known",
        )

    def images(self, split: str) -> Images:
        """Images of one split.

        Args:
            split: One of ``official``.

        Returns:
            The images, decoded when read.
        """
        known(split, self.official, "splits of this folder")
        paths, labels = self._listed[split]
        return files.FileImages(paths, labels, self._img_size, self._channels, self._root)

    @property
    def _root(self) -> Path:
        if self.root is None:
            raise FileNotFoundError(
                "folder must be told where the images are, got no folder; name it with --data-dir, see the README for "
                "how it should look."
            )
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} must be a folder of images, got no such folder; check --data-dir.")
        return self.root

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """Folder of each split."""
        found = {path.name: path for path in files.subfolders(self._root)}
        if "train" not in found or not found.keys() & {"test", "val"}:
            raise FileNotFoundError(
                f"{self.root} must hold the folders train and test (or val), got {', '.join(found) or 'no folders'}; "
                "move the images into <split>/<class>/."
            )
        if "test" in found:
            return {name: found[name] for name in ("train", "val", "test") if name in found}
        return {"train": found["train"], "test": found["val"]}

    @property
    def _policy(self) -> str:
        if "val" in self._folders:
            return "The folders train, val and test."
        return f"The folders train and {self._folders['test'].name}; the latter is for testing alone."

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        """Names of the class folders, sorted, the same in every split."""
        classes = tuple(path.name for path in files.subfolders(self._folders["train"]))
        if len(classes) < 2:
            raise ValueError(
                f"{self._folders['train']} must hold a folder for each of two or more classes, got {len(classes)}; "
                "sort the images into them."
            )
        for folder in self._folders.values():
            here = {path.name for path in files.subfolders(folder)}
            if differing := sorted(here ^ set(classes)):
                raise ValueError(
                    f"{folder} must hold the same class folders as train, got a difference in "
                    f"{', '.join(differing[:5])}{' ...' if len(differing) > 5 else ''}; rename, add or remove these."
                )
        return classes

    @cached_property
    def _listed(self) -> dict[str, tuple[tuple[Path, ...], np.ndarray]]:
        """Files and labels of each split, sorted by class and then by path."""
        return {split: files.by_class(folder, self._classes) for split, folder in self._folders.items()}

    @cached_property
    def _img_size(self) -> tuple[int, int]:
        if self.img_size is not None:
            return self.img_size
        first, *rest = (path for paths, _ in self._listed.values() for path in paths)
        height, width, _ = files.shape(first)
        for path in rest:
            if (other := files.shape(path)[:2]) != (height, width):
                raise ValueError(
                    f"Images must share one size unless it is given, got {height}x{width} in {first} and "
                    f"{other[0]}x{other[1]} in {path}; give --img-size, and all are scaled and cropped to it."
                )
        return height, width

    @cached_property
    def _sampled(self) -> list[Path]:
        paths, _ = self._listed["train"]
        return [paths[i] for i in np.linspace(0, len(paths) - 1, min(len(paths), NUM_SAMPLED)).astype(int)]

    @cached_property
    def _channels(self) -> int:
        """3 if any image looked at has colour."""
        return max(files.shape(path)[2] for path in self._sampled)

    @property
    def _colour(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel."""
        return files.colour(files.decoded(path, self._img_size, self._channels) for path in self._sampled)
