"""Images without labels, to be probed alone: any folder of them, or an array in an .npz file."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from ssat_probe import files
from ssat_probe.archive import check_unfolded_size
from ssat_probe.images import ArrayImages, Facts, Images, Source, fitted
from ssat_probe.registry import known

DEFAULT_SIZE = (224, 224)
"Height and width where nobody gives a size and the images have several."

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Dataset:
    """All images below a folder, in the order of their paths, or those of an array; every split is all of them."""

    root: Path | None = None
    "Folder, or .npz file with an array of 8-bit images."
    download: bool = False
    "Unused: nothing is known about where the images come from."
    img_size: tuple[int, int] | None = None
    "Height and width to scale and crop the images to; none keeps the size they share, or takes 224 x 224."

    source: ClassVar[Source] = Source(
        tree="""
<any name>.jpg (or png, tif, webp, ...), in folders as one likes
...
or --data-dir FILE.npz: an array "images" (or its only array) of 8-bit images,
(image, height, width), (image, height, width, channel) or (image, channel, height, width)
""".strip(),
        how="Your own images.",
    )
    official: ClassVar[tuple[str, ...]] = SPLITS

    @cached_property
    def facts(self) -> Facts:
        """What the images themselves tell; mean and deviation are the checkpoint's business, which normalises them."""
        images = self._images
        channels, height, width = images.read([0]).shape[1:]
        return Facts(
            classes=(),
            img_size=(height, width),
            channels=channels,
            mean=(0.5,) * channels,
            std=(0.5,) * channels,
            flip=True,
            splits="None: every split is all images. There are no classes, so these can be probed, not trained on.",
            licence="not known",
            citation="not known",
        )

    def images(self, split: str) -> Images:
        """All images.

        Args:
            split: Any of train, val and test.

        Returns:
            The images, with label 0 each.
        """
        known(split, SPLITS, "splits")
        return self._images

    @cached_property
    def _images(self) -> Images:
        root = self.root
        if root is None or not root.exists():
            raise FileNotFoundError(
                f"unlabelled must be told a folder of images or an .npz file, got {root or 'none'}; name one that "
                "exists with --data-dir."
            )
        return self._of_array(root) if root.is_file() else self._of_folder(root)

    def _of_folder(self, root: Path) -> Images:
        paths = tuple(files.below(root))
        if not paths:
            raise FileNotFoundError(f"{root} must hold images, got none with an ending such as .jpg; check --data-dir.")
        shapes = {files.shape(path) for path in paths}
        sizes = {shape[:2] for shape in shapes}
        size = self.img_size or (sizes.pop() if len(sizes) == 1 else DEFAULT_SIZE)
        channels = max(shape[2] for shape in shapes)
        return files.FileImages(paths, np.zeros(len(paths)), size, channels, root)

    def _of_array(self, path: Path) -> Images:
        check_unfolded_size(path)
        with files.reading(path, "an .npz of numpy"), np.load(path, allow_pickle=False) as arrays:
            names = list(arrays.keys())
            name = "images" if "images" in names else names[0] if len(names) == 1 else ""
            array = arrays[name] if name else None
        if array is None:
            raise ValueError(
                f"{path} must hold an array 'images', or one array alone, got {', '.join(names)}; rename it."
            )
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or not array.size:
            raise ValueError(
                f"The images in {path} must be 8-bit, (image, height, width) with or without channels, got "
                f"{array.dtype} of shape {array.shape}; convert them."
            )
        if array.ndim == 3:
            array = array[:, None]
        elif array.shape[1] not in (1, 3):
            array = array.transpose(0, 3, 1, 2)
        if array.shape[1] not in (1, 3):
            raise ValueError(f"The images in {path} must have 1 or 3 channels, got shape {array.shape}; convert them.")
        images = ArrayImages(torch.from_numpy(np.ascontiguousarray(array)), np.zeros(len(array)))
        return fitted(images, self.img_size, array.shape[1])
