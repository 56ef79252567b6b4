"""Vectors in memory and in a file behave alike, and a file is not held in memory."""

import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssat_probe.measures import basis as module
from ssat_probe.measures.basis import Basis, DiskBasis, MemoryBasis, combined, orthogonal

SIZE = 101


def made(kind: Any, path: Path, num: int = 13) -> Basis:
    return kind(num, SIZE, path / "basis")


ApartBasis = partial(MemoryBasis, home="cpu")  # as for a device with a memory of its own


def vectors(num: int = 13) -> torch.Tensor:
    rows = torch.randn(SIZE, num, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.linalg.qr(rows)[0].T.contiguous()


@pytest.mark.parametrize("kind", [MemoryBasis, ApartBasis, DiskBasis])
def test_what_was_put_in_comes_out_bit_by_bit(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 8 * SIZE * 5)
    basis, rows = made(kind, tmp_path), vectors()
    for place, row in enumerate(rows):
        basis[place] = row
    assert torch.equal(basis[7], rows[7])
    assert torch.equal(torch.cat([block.clone() for block in basis.blocks(11)]), rows[:11])
    assert torch.equal(basis.first(3), rows[:3])
    basis.close()


@pytest.mark.parametrize("kind", [MemoryBasis, ApartBasis, DiskBasis])
def test_combinations_of_vectors_wherever_they_lie(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 8 * SIZE * 5)
    basis, rows = made(kind, tmp_path), vectors()
    for place, row in enumerate(rows):
        basis[place] = row
    coefficients = np.random.default_rng(0).standard_normal((12, 3)).T  # not contiguous
    torch.testing.assert_close(combined(coefficients, basis), torch.from_numpy(coefficients) @ rows[:12])
    basis.close()


@pytest.mark.parametrize("kind", [MemoryBasis, ApartBasis, DiskBasis])
def test_another_basis_goes_on_from_what_was_flushed(kind, tmp_path):
    basis, rows = made(kind, tmp_path), vectors()
    for place in range(5):
        basis[place] = rows[place]
    basis.flush()
    basis.close()
    for other in (MemoryBasis, ApartBasis, DiskBasis):
        again = made(other, tmp_path)
        assert again.load(5)
        assert not again.load(6)
        assert torch.equal(again.first(5), rows[:5])
        again.close()


def test_vectors_that_lie_elsewhere_come_a_block_at_a_time_to_where_they_are_used(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 8 * SIZE * 5)
    basis = MemoryBasis(13, SIZE, device="meta", home="cpu")  # a device that computes nothing
    assert basis.rows.device.type == "cpu"
    assert {basis[3].device.type, basis.first(7).device.type} == {"meta"}
    blocks = list(basis.blocks(12))
    assert [(len(block), block.device.type) for block in blocks] == [(5, "meta"), (5, "meta"), (2, "meta")]


def test_memory_alone_keeps_nothing():
    basis = MemoryBasis(3, SIZE)
    basis[0] = vectors()[0]
    basis.flush()
    assert not basis.load(1)
    basis.close()


@pytest.mark.parametrize("kind", [MemoryBasis, ApartBasis, DiskBasis])
def test_orthogonal_part_is_orthogonal_also_of_what_nearly_lies_inside(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 8 * SIZE * 5)
    basis, rows = made(kind, tmp_path), vectors(14)
    for place in range(13):
        basis[place] = rows[place]
    inside = rows[:13].sum(dim=0) + 1e-9 * rows[13]
    found = orthogonal(inside, basis, 13)
    assert float((rows[:13] @ found).abs().max()) < 1e-15 * float(inside.norm())
    torch.testing.assert_close(found, 1e-9 * rows[13], rtol=1e-5, atol=1e-15)
    basis.close()


def test_file_takes_memory_for_one_block_only(tmp_path, monkeypatch):
    size, num, block = 20_011, 37, 8 * 20_011 * 3
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    tracemalloc.start()
    basis = DiskBasis(num, size, tmp_path / "basis")
    vector = torch.ones(size, dtype=torch.float64)
    for place in range(num):
        basis[place] = vector
    for rows in basis.blocks(num):
        assert float(rows.sum()) == rows.numel()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    basis.close()
    assert (tmp_path / "basis").stat().st_size == 8 * size * num
    assert block <= peak < 1.2 * block


def test_file_that_was_cut_off_is_named(tmp_path):
    basis = made(DiskBasis, tmp_path)
    with pytest.raises(ValueError, match=r"basis must hold 3 vectors, got fewer"):
        basis[2]
    basis.close()
