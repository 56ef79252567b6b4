"""Orthonormal vectors of a Lanczos run, in memory or in a file, so that the basis may be larger than the memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

BLOCK_BYTES = 256 * 2**20  # of the file that is read at once; a few vectors of a ViT-T; no source


class MemoryBasis:
    """Vectors in one tensor, where they are used or on the CPU; with a path, they can be kept for another run."""

    def __init__(
        self,
        num: int,
        size: int,
        path: Path | None = None,
        device: torch.device | str = "cpu",
        home: torch.device | str | None = None,
    ) -> None:
        """Take the memory.

        Args:
            num: Vectors at most.
            size: Entries of each.
            path: Where `flush` writes; None keeps nothing.
            device: Where vectors are used.
            home: Where they lie; None means there too. From elsewhere, `blocks` brings some at a time.
        """
        self.size, self.device = size, torch.device(device)
        self.rows = torch.zeros(num, size, dtype=torch.float64, device=device if home is None else home)
        self._num_at_once = num if home is None else _rows_at_once(num, size)
        self._file = None if path is None else _VectorFile(path, size)
        self._num_set = self._num_kept = 0

    def __getitem__(self, row: int) -> Float64[Tensor, " parameter"]:
        """One vector."""
        return self.rows[row].to(self.device)

    def __setitem__(self, row: int, vector: Float64[Tensor, " parameter"]) -> None:
        """Keep one vector; they come in order."""
        self.rows[row] = vector
        self._num_set = row + 1

    def blocks(self, num: int) -> Iterator[Float64[Tensor, "step parameter"]]:
        """The first vectors, some at a time.

        Args:
            num: How many.

        Yields:
            All of them at once where they lie on the device, else as many as ``BLOCK_BYTES`` hold, at least one.
        """
        for start in range(0, num, self._num_at_once):
            yield self.rows[start : min(start + self._num_at_once, num)].to(self.device)

    def first(self, num: int) -> Float64[Tensor, "step parameter"]:
        """The first vectors, all at once: they must fit on the device."""
        return self.rows[:num].to(self.device)

    def load(self, num: int) -> bool:
        """Go on from what another run has kept.

        Args:
            num: Vectors that must be there.

        Returns:
            Whether they are.
        """
        if self._file is None or self._file.num_vectors < num:
            return False
        for row in range(num):
            self.rows[row] = torch.from_numpy(self._file.read(row, np.empty((1, self.rows.shape[1])))[0])
        self._num_set = self._num_kept = num
        return True

    def flush(self) -> None:
        """Write what is new to the file, so that it survives a power failure."""
        if self._file is not None:
            for row in range(self._num_kept, self._num_set):
                self._file.write(row, self.rows[row].cpu().numpy())
            self._num_kept = self._num_set
            self._file.sync()

    def close(self) -> None:
        """Let go of the file; it stays."""
        if self._file is not None:
            self._file.close()


class DiskBasis:
    """Vectors in a file alone, of which some are read at a time.

    The file is read and written, not mapped: pages of a mapping would count as memory of the process.
    """

    def __init__(self, num: int, size: int, path: Path, device: torch.device | str = "cpu") -> None:
        """Open the file, or make it.

        Args:
            num: Vectors at most.
            size: Entries of each.
            path: Of the file.
            device: Where vectors are used.
        """
        self.size, self.device = size, torch.device(device)
        self._file = _VectorFile(path, size)
        self._buffer = np.empty((_rows_at_once(num, size), size))

    def __getitem__(self, row: int) -> Float64[Tensor, " parameter"]:
        """One vector."""
        return torch.from_numpy(self._file.read(row, np.empty((1, self.size)))[0]).to(self.device)

    def __setitem__(self, row: int, vector: Float64[Tensor, " parameter"]) -> None:
        """Keep one vector."""
        self._file.write(row, vector.cpu().numpy())

    def blocks(self, num: int) -> Iterator[Float64[Tensor, "step parameter"]]:
        """The first vectors, some at a time; each block is overwritten by the next.

        Args:
            num: How many.

        Yields:
            As many as ``BLOCK_BYTES`` hold, at least one.
        """
        for start in range(0, num, len(self._buffer)):
            rows = self._file.read(start, self._buffer[: min(num - start, len(self._buffer))])
            yield torch.from_numpy(rows).to(self.device)

    def first(self, num: int) -> Float64[Tensor, "step parameter"]:
        """The first vectors, all at once: they must fit into memory."""
        return torch.stack([self[row] for row in range(num)])

    def load(self, num: int) -> bool:
        """Go on from what another run has kept.

        Args:
            num: Vectors that must be there.

        Returns:
            Whether they are.
        """
        return self._file.num_vectors >= num

    def flush(self) -> None:
        """See to it that what was written survives a power failure."""
        self._file.sync()

    def close(self) -> None:
        """Let go of file and memory; the file stays."""
        self._file.close()
        self._buffer = np.empty((0, self.size))


class _VectorFile:
    """Float64 vectors of one length, one after another."""

    def __init__(self, path: Path, size: int) -> None:
        path.touch()
        self._path, self._bytes = path, 8 * size
        self._file = path.open("r+b", buffering=0)

    @property
    def num_vectors(self) -> int:
        """Complete ones in the file."""
        return self._path.stat().st_size // self._bytes

    def read(self, row: int, into: np.ndarray) -> np.ndarray:
        self._file.seek(self._bytes * row)
        left = into.reshape(-1).view(np.uint8).data
        while left:
            got = self._file.readinto(left)
            if not got:
                raise ValueError(f"{self._path} must hold {row + len(into)} vectors, got fewer. Remove it, run again.")
            left = left[got:]
        return into

    def write(self, row: int, vector: np.ndarray) -> None:
        self._file.seek(self._bytes * row)
        left = np.ascontiguousarray(vector).view(np.uint8).data
        while left:
            left = left[self._file.write(left) :]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _rows_at_once(num: int, size: int) -> int:
    return max(1, min(num, BLOCK_BYTES // (8 * size)))


Basis = MemoryBasis | DiskBasis


def combined(coefficients: Float64[np.ndarray, "vector step"], basis: Basis) -> Float64[Tensor, "vector parameter"]:
    """Linear combinations of the first vectors of a basis, which need not fit into memory.

    Args:
        coefficients: Of each combination.
        basis: Of at least so many vectors as there are columns.

    Returns:
        Where the vectors are used.
    """
    total, step = torch.zeros(len(coefficients), basis.size, dtype=torch.float64, device=basis.device), 0
    for rows in basis.blocks(coefficients.shape[1]):  # in place: results can be the larger part of the memory
        total.addmm_(torch.from_numpy(coefficients[:, step : step + len(rows)].copy()).to(rows), rows)
        step += len(rows)
    return total


def orthogonal(vector: Float64[Tensor, " parameter"], basis: Basis, num: int) -> Float64[Tensor, " parameter"]:
    """Part of a vector that is orthogonal to the first vectors of a basis, by Gram-Schmidt in two passes.

    Args:
        vector: Any length.
        basis: Orthonormal.
        num: How many of its vectors count.

    Returns:
        On the device of the vector.

    References:
        Parlett, The Symmetric Eigenvalue Problem, 6.9: twice is enough.
    """
    for _ in range(2):
        for rows in basis.blocks(num):
            vector = vector - rows.T @ (rows @ vector)
    return vector
