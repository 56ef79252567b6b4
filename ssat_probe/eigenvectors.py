"""Eigenvectors of a subject's Hessian on disk: a Hessian run keeps them, a loss landscape follows them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from ssat_probe.measures.directions import Eigenvector
from ssat_probe.subject import Subject
from ssat_probe.table import write_atomically

Ends = tuple[list[Eigenvector], list[Eigenvector]]


def keep(folder: Path, subject: Subject, loss: str, ends: Ends) -> Path:
    """Write eigenvectors of both ends.

    Args:
        folder: Where; a file each for every checkpoint, loss and choice of images.
        subject: Whose Hessian.
        loss: Of which loss.
        ends: From the largest eigenvalue down, and from the smallest up.

    Returns:
        The file: float64 vectors ``top``, ``top2``, ..., ``bottom``, ``bottom2``, ...; the facts of each in its header.
    """
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {}
    for end, found in zip(("top", "bottom"), ends, strict=True):
        for rank, one in enumerate(found, start=1):
            name = end if rank == 1 else f"{end}{rank}"
            tensors[name] = one.vector.cpu().contiguous()
            facts[name] = {"value": one.value, "residual": one.residual, "converged": one.converged}
    return write_atomically(_path(folder, subject, loss), save(tensors, {"eigenvectors": json.dumps(facts)}))


def kept(folder: Path, subject: Subject, loss: str, names: Sequence[str]) -> dict[str, Eigenvector]:
    """Eigenvectors that a Hessian run kept.

    Args:
        folder: Where.
        subject: Of the same weights and images.
        loss: Of the same loss.
        names: Such as ``top`` and ``bottom``.

    Returns:
        By name, on the subject's device.

    Raises:
        ValueError: If they are not there.
    """
    path = _path(folder, subject, loss)
    there: dict[str, Eigenvector] = {}
    if path.is_file():
        with safe_open(path, "pt", device=str(subject.device)) as file:
            facts = json.loads((file.metadata() or {})["eigenvectors"])
            there = {name: Eigenvector(**facts[name], vector=file.get_tensor(name)) for name in facts}
    if missing := [name for name in names if name not in there]:
        sample = subject.sample
        raise ValueError(
            f"{folder} must hold the eigenvectors {', '.join(missing)} of {subject.checkpoint.path} for the loss "
            f"{loss} on these {subject.num_images} images, got none; make them with ssat-probe hessian --ckpt "
            f"{subject.checkpoint.path} --loss {loss} --num-images {sample.num_images} --sample-seed "
            f"{sample.sample_seed} --vectors {folder} (and the same --split), or leave --eigenvectors out to have them "
            "computed here."
        )
    return {name: there[name] for name in names}


def _path(folder: Path, subject: Subject, loss: str) -> Path:
    parts = [subject.checkpoint.hash, subject.fingerprint, loss, list(subject.parameters(loss))]
    return folder / f"eigenvectors-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}.safetensors"
