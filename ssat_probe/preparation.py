"""Images as a foreign model expects them: its size, its crop, its channels."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

from ssat_probe.images import Images


@dataclass(frozen=True)
class Preparation:
    """How a model's images were prepared when it was evaluated, as timm's configs say it."""

    img_size: tuple[int, int]
    channels: int
    crop: float = 1.0
    "Side of the crop in units of the scaled image's shorter side."
    interpolation: str = "bicubic"

    def apply(
        self, pixels: UInt8[Tensor, "batch channel height width"]
    ) -> UInt8[Tensor, "batch new_channel new_height new_width"]:
        """Images scaled with antialiasing until they cover the crop, then cropped around their centre.

        Args:
            pixels: 0 to 255; one channel is repeated where the model takes three.

        Returns:
            0 to 255.
        """
        old = list(pixels.shape[-2:])
        covered = [math.floor(side / self.crop) for side in self.img_size]
        num, den = max(zip(covered, old, strict=True), key=lambda pair: pair[0] / pair[1])
        size = [max(side, num * length // den) for side, length in zip(self.img_size, old, strict=True)]
        if size != old:
            pixels = resize(pixels, size, InterpolationMode(self.interpolation), antialias=True)
        pixels = center_crop(pixels, list(self.img_size))
        return pixels.expand(-1, self.channels, -1, -1) if pixels.shape[1] == 1 else pixels


@dataclass(frozen=True, eq=False)
class Prepared:
    """Images of a set, prepared whenever they are read, so that memory does not grow with their number.

    Args:
        images: The set.
        preparation: What is done to them.
    """

    images: Images
    preparation: Preparation

    @property
    def labels(self) -> np.ndarray:
        """Class of each image."""
        return self.images.labels

    @property
    def in_memory(self) -> bool:
        """False: preparing is work."""
        return False

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def read(self, ids: Sequence[int] | np.ndarray) -> UInt8[Tensor, "batch channel height width"]:
        """Pixels of the images at these positions, prepared."""
        return self.preparation.apply(self.images.read(ids))

    def fingerprint(self) -> str:
        """SHA-256 over the fingerprint of the set and the preparation."""
        return hashlib.sha256(f"{self.images.fingerprint()} {self.preparation}".encode()).hexdigest()
