"""Models, images and operators that the parts of the curvature benchmark share; peers where they are installed."""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.models import vit
from ssat_probe.recipe import Recipe
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject
from ssat_probe.training import train

ROOT = Path(__file__).parents[2]
NANO = ROOT / "checkpoints" / "vit_nano-digits-scratch-seed0" / "scratch.pt"
SMALL = {"img_size": (8, 8), "patch_size": (4, 4), "channels": 1, "num_classes": 10}
SMALL |= {"dim": 16, "depth": 2, "heads": 4, "mlp_ratio": 3}

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A model with one batch of images and its mean loss."""

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Those that are trained."""
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    @property
    def operator(self) -> HessianOperator:
        """Of this package."""
        return HessianOperator(self.parameters, lambda batch: self.loss(), [(None, len(self.images))])

    def loss(self) -> Tensor:
        """Cross-entropy over the images."""
        return F.cross_entropy(self.model(self.images), self.labels)

    def gradient(self) -> list[Tensor]:
        """One gradient, with the attention kernel that second derivatives need."""
        with sdpa_kernel(SDPBackend.MATH):
            loss = self.loss()
        return list(torch.autograd.grad(loss, list(self.parameters.values())))

    def with_hand_written_norm(self) -> "Task":
        """The same function without nn.LayerNorm."""
        model = copy.deepcopy(self.model)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.LayerNorm):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, HandWrittenNorm(module))
        return Task(self.name, model, self.images, self.labels)


class HandWrittenNorm(nn.Module):
    """Layer normalisation from elementary operations."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        deviation = x - x.mean(-1, keepdim=True)
        return self.weight * deviation / (deviation.square().mean(-1, keepdim=True) + self.eps).sqrt() + self.bias


def task_of(name: str, path: Path, num_images: int, dtype: torch.dtype = torch.float32) -> Task:
    """A checkpoint with training images, as one batch."""
    subject = Subject.of(path, Sample(num_images=num_images, batch_size=num_images, device="cpu"), "train")
    (batch,) = subject.batches()
    return Task(name, subject.model.to(dtype), batch.images.to(dtype), batch.labels)


def nano(num_images: int = 64) -> Task:
    """vit_nano, the example checkpoint that stands in the repository."""
    return task_of("vit_nano", NANO, num_images)


@cache
def _tiny_path() -> Path:
    """ViT-T with patches of 4 at 32 pixels after a short training on digits; its own folder lives until exit."""
    folder = tempfile.TemporaryDirectory()
    _KEPT.append(folder)
    fields: dict[str, Any] = {"img_size": (32, 32), "patch_size": (4, 4), "augmentation": "none"}
    recipe = Recipe(method="scratch", model="vit_tiny", subset=100, epochs=3, batch_size=20, warmup_epochs=1, **fields)
    return train(recipe, folder.name, device="cpu").path


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def tiny(num_images: int = 64) -> Task:
    """ViT-T/4 at 32 pixels.

    Raises:
        ValueError: If the images are others.
    """
    task = task_of("ViT-T/4", _tiny_path(), num_images)
    if task.images.shape[0] != num_images or task.images.shape[-2:] != (32, 32):
        raise ValueError(f"ViT-T/4 needs {num_images} images of 32 pixels, got {tuple(task.images.shape)}.")
    return task


def small(num_images: int = 256, steps: int = 200) -> Task:
    """ViT of some 6,000 parameters in float64, trained for some steps, small enough for its whole Hessian."""
    torch.manual_seed(0)
    source = nano(num_images)
    model = vit.Model(**SMALL)  # type: ignore[arg-type]
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(source.images), source.labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    num = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return Task(f"ViT of {num:,} parameters", model.double().eval(), source.images.double(), source.labels)


@cache
def peer(name: str) -> ModuleType | None:
    """A peer's module, or None and a line that says how to get it."""
    import importlib
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the peer's own imports
            return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed and is left out: pip install '.[benchmark]'")
        return None


def attempted(name: str, way: Callable[[], Any]) -> Any:
    """What a peer gives, or None and a line that says why not: its faults take nothing else away."""
    try:
        return way()
    except Exception as error:
        print(f"{name} fails and is left out: {type(error).__name__}: {str(error)[:200]}")
        return None


def memory(is_peak: bool = False) -> int:
    """Bytes that this process holds now or held at most, of Linux.

    Not ``ru_maxrss``, which a child takes over from the process that started it.
    """
    key = "VmHWM:" if is_peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def seconds_of(way: Callable[[], Any]) -> float:
    """Of one call."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def alternating(ways: dict[str, Callable[[], Any]], repeats: int) -> Iterator[tuple[str, int, float]]:
    """Seconds of each way, in turns, so that a busy machine disturbs all alike; the first turn only warms up.

    A way that fails there is left out.
    """
    first = {name: attempted(name, lambda way=way: seconds_of(way)) for name, way in ways.items()}
    for repeat in range(repeats):
        for name, way in ways.items():
            if first[name] is not None:
                yield name, repeat, seconds_of(way)


def random_vectors(size: int, num: int = 1, seed: int = 0) -> Tensor:
    """Gaussian, one per row."""
    return torch.randn(num, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
