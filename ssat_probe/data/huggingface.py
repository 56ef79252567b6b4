"""Any image data of Hugging Face by name, as hf:NAME, through its package datasets."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ssat_probe import files
from ssat_probe.images import Facts, Images, Source
from ssat_probe.registry import known

NUM_SAMPLED = 1000
"Training images, evenly spaced, that size, channels, mean, standard deviation and fingerprint are taken from."

LABELS = ("label", "labels", "fine_label")
"Columns that are taken for the class where there are several, in this order."


@dataclass(frozen=True)
class Dataset:
    """Image data of Hugging Face's hub, or on disk.

    ``hf:NAME`` is a name of the hub or a folder that ``datasets`` reads (Parquet files, an image folder);
    ``hf:NAME?CONFIG`` chooses one of its configurations. A folder that ``save_to_disk`` wrote is ``--data-dir`` itself.
    Where there is no split ``test``, or one without classes, the one for validation is what is tested on.
    """

    root: Path | None = None
    "Cache of downloads, or a folder that save_to_disk wrote; none means the package's own cache."
    download: bool = False
    "Fetch what is not in the cache."
    img_size: tuple[int, int] | None = None
    "Height and width to scale and crop the images to; none keeps the size that they all share."
    name: str = ""
    "As in ``hf:NAME``."

    source: ClassVar[Source] = Source(
        tree="""
what save_to_disk wrote, or nothing: then it is the cache
""".strip(),
        address="https://huggingface.co/datasets",
        how="pip install 'ssat-probe[huggingface]'; --data hf:NAME --download, and --data-dir for another cache.",
    )

    @property
    def official(self) -> tuple[str, ...]:
        """Names of the splits that exist."""
        return tuple(self._splits)

    @cached_property
    def facts(self) -> Facts:
        """What the images themselves tell, and the data's own card."""
        mean, std = files.colour(self._sample.numpy().transpose(0, 2, 3, 1))
        info = getattr(self._splits["train"], "info", None)
        return Facts(
            classes=self._classes,
            img_size=self._img_size,
            channels=self._channels,
            mean=mean,
            std=std,
            flip=True,
            splits=f"The splits {', '.join(self._all)}; tested on {self._names['test']}.",
            licence=getattr(info, "license", "") or "not known",
            citation=getattr(info, "citation", "") or "not known",
        )

    def images(self, split: str) -> Images:
        """Images of one split.

        Args:
            split: One of ``official``.

        Returns:
            The images, decoded when read.
        """
        known(split, self.official, f"splits of {self.name}")
        return self._images(split, self._img_size, self._channels)

    def _images(self, split: str, img_size: tuple[int, int], channels: int) -> "Rows":
        rows = self._splits[split]
        labels = np.asarray(rows[self._label], dtype=np.int64) - self._lowest
        outside = (labels < 0) | (labels >= len(self._classes))
        if outside.any():
            raise ValueError(
                f"hf:{self.name} must give every image of its split {split} one of {len(self._classes)} classes, got "
                f"{outside.sum()} of {len(labels)} with none; choose other data, or export it without these."
            )
        return Rows(rows, self._image, labels, img_size, channels)

    @cached_property
    def _all(self) -> dict[str, Any]:
        """Every split, as the package gives it."""
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                f"hf:{self.name} needs the package datasets, got an environment without {error.name or 'it'}; "
                "pip install 'ssat-probe[huggingface]'."
            ) from error
        if self.root is not None and (self.root / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(self.root)))
        if not self.name:
            raise ValueError("huggingface must be told what to open, got no name; write --data hf:NAME.")
        path, _, config = self.name.partition("?")
        try:
            found = datasets.load_dataset(
                path,
                config or None,
                cache_dir=None if self.root is None else str(self.root),
                download_config=datasets.DownloadConfig(local_files_only=not self.download),
            )
        except Exception as error:  # of a dozen kinds, most of them of other packages
            raise FileNotFoundError(
                f"hf:{self.name} must be on disk or, with --download, on Hugging Face's hub, got "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}."
            ) from error
        return dict(found)

    @cached_property
    def _names(self) -> dict[str, str]:
        """What the data calls each of our splits."""
        there = {"val" if name in ("validation", "valid", "val", "dev") else name: name for name in self._all}
        if "train" not in there or not there.keys() & {"test", "val"}:
            raise ValueError(
                f"hf:{self.name} must have a split train and one of test and validation, got {', '.join(self._all)}; "
                "choose other data, or export it to folders and use --data folder."
            )
        if "test" in there and ("val" not in there or self._has_labels(there["test"])):
            return {name: there[name] for name in ("train", "val", "test") if name in there}
        return {"train": there["train"], "test": there["val"]}

    def _has_labels(self, theirs: str) -> bool:
        """Whether any image of a split has a class; test splits of competitions give -1 to all."""
        rows = self._all[theirs]
        named = [name for name, kind in rows.features.items() if name in LABELS or type(kind).__name__ == "ClassLabel"]
        return not named or not len(rows) or any(np.max(rows[name]) >= 0 for name in named)

    @property
    def _splits(self) -> dict[str, Any]:
        return {ours: self._all[theirs] for ours, theirs in self._names.items()}

    @property
    def _features(self) -> dict[str, Any]:
        return dict(self._splits["train"].features)

    @cached_property
    def _image(self) -> str:
        """Column of the images."""
        found = [name for name, kind in self._features.items() if type(kind).__name__ == "Image"]
        if len(found) != 1:
            raise ValueError(
                f"hf:{self.name} must have one column of images, got {', '.join(found) or 'none'} among "
                f"{', '.join(self._features)}; choose other data."
            )
        return found[0]

    @cached_property
    def _label(self) -> str:
        """Column of the classes."""
        found = [name for name, kind in self._features.items() if type(kind).__name__ == "ClassLabel"]
        found = found or [name for name in LABELS if getattr(self._features.get(name), "dtype", "").startswith("int")]
        chosen = found if len(found) == 1 else [name for name in LABELS if name in found]
        if not chosen:
            raise ValueError(
                f"hf:{self.name} must have one column of classes, or one called {', '.join(LABELS)}, got "
                f"{', '.join(found) or 'none'} among {', '.join(self._features)}; choose other data."
            )
        return chosen[0]

    @property
    def _lowest(self) -> int:
        """Least class where classes are mere numbers, which may begin at 1."""
        is_named = hasattr(self._features[self._label], "names")
        return 0 if is_named else int(np.min(self._splits["train"][self._label]))

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        kind = self._features[self._label]
        if hasattr(kind, "names"):
            return tuple(kind.names)
        return tuple(map(str, range(self._lowest, int(np.max(self._splits["train"][self._label])) + 1)))

    @property
    def _sampled(self) -> list[int]:
        num = len(self._splits["train"])
        return np.linspace(0, num - 1, min(num, NUM_SAMPLED)).astype(int).tolist()

    @cached_property
    def _sample(self) -> Tensor:
        return self._images("train", self._img_size, self._channels).read(self._sampled)

    @cached_property
    def _looks(self) -> tuple[set[tuple[int, int]], int]:
        """Sizes of the sampled images, and 3 channels if any has colour."""
        pictures = [self._splits["train"][position][self._image] for position in self._sampled]
        return {(one.height, one.width) for one in pictures}, max(
            1 if one.mode in files.GREY else 3 for one in pictures
        )

    @cached_property
    def _img_size(self) -> tuple[int, int]:
        if self.img_size is not None:
            return self.img_size
        sizes = sorted(self._looks[0])
        if len(sizes) > 1:
            raise ValueError(
                f"Images must share one size unless it is given, got {sizes[0][0]}x{sizes[0][1]} and "
                f"{sizes[-1][0]}x{sizes[-1][1]} in hf:{self.name}; give --img-size."
            )
        return sizes[0]

    @property
    def _channels(self) -> int:
        return self._looks[1]


@dataclass(frozen=True, eq=False)
class Rows:
    """Images decoded from a split of the package's whenever they are read.

    Args:
        rows: The split.
        column: Of the images.
        labels: Class of each image.
        img_size: Height and width that every image is scaled and cropped to.
        channels: 1 (grey) or 3 (RGB).
    """

    rows: Any
    column: str
    labels: np.ndarray
    img_size: tuple[int, int]
    channels: int

    @property
    def in_memory(self) -> bool:
        """False."""
        return False

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def read(self, ids: Sequence[int] | np.ndarray) -> UInt8[Tensor, "batch channel height width"]:
        """Pixels of the images at these positions."""
        pictures = [self.rows[int(position)][self.column] for position in ids]
        pixels = [files.pixels_of(picture, self.img_size, self.channels) for picture in pictures]
        stacked = np.stack(pixels) if pixels else np.empty((0, *self.img_size, self.channels), dtype=np.uint8)
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()

    def fingerprint(self) -> str:
        """SHA-256 over the labels, the sizes and the pixels of evenly spaced images."""
        digest = hashlib.sha256(repr((self.img_size, self.channels)).encode())
        digest.update(np.ascontiguousarray(self.labels).data)
        ids = np.linspace(0, len(self) - 1, min(len(self), NUM_SAMPLED)).astype(int)
        digest.update(np.ascontiguousarray(self.read(ids).numpy()).data)
        return digest.hexdigest()
