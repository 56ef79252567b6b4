"""Sample: which images a probe looks at, and in which arithmetic."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ssat_probe.registry import known


@dataclass(frozen=True)
class Sample:
    """Which images a probe looks at, and in which arithmetic."""

    data: str = ""
    "Data set to look at; empty means the one the checkpoint was trained on."

    data_dir: Path | None = None
    "Where the data set lies on disk; the embedded ones need none."

    split: Literal["", "train", "val", "test"] = ""
    "Part of the data set; empty means the probe's own choice (test, or train for the loss surface)."

    num_images: Annotated[int, Parameter(alias="--max-images")] = 512
    "Images to look at at most, stratified by class; 0 means all."

    sample_seed: int = 0
    "Which images, and the masks of the masked pass."

    batch_size: int = 128
    "Images at a time; changes only what is about mini-batches: hessian's batches, lissa and data errors."

    device: str = ""
    "cpu, cuda, cuda:1; empty means the fastest there is with float64 (so never mps)."

    dtype: Literal["float32", "float64"] = "float32"
    "Arithmetic of the model."

    def __post_init__(self) -> None:
        """Check numbers and choices.

        Raises:
            ValueError: If a number is out of its range; an unknown choice is one too.
        """
        known(str(self.split or "test"), ("train", "val", "test"), "splits")
        known(str(self.dtype), ("float32", "float64"), "dtypes")
        for name, least in (("num_images", 0), ("sample_seed", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
