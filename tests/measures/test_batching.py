"""Batches of any kind cut and turned."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssat_probe.measures.batching import pieces, turned


@dataclass(frozen=True)
class Batch:
    images: Tensor
    labels: Tensor
    name: str = "digits"


class TestPieces:
    def test_dataclass_tuple_and_dictionary_are_cut_alike(self):
        images, labels = torch.arange(14).reshape(7, 2), torch.arange(7)
        for batch in (Batch(images, labels), (images, labels), {"images": images, "labels": labels}, [images, labels]):
            found = list(pieces(batch, 7, 3))
            assert [num for _, num in found] == [3, 3, 1]
            kind = type(batch)
            assert all(type(piece) is kind for piece, _ in found)
            if kind is Batch:
                assert found[0][0].name == "digits"
                assert torch.equal(torch.cat([piece.images for piece, _ in found]), images)
                assert torch.equal(torch.cat([piece.labels for piece, _ in found]), labels)

    def test_what_fits_is_not_touched(self):
        batch = object()
        assert list(pieces(batch, 7, 7)) == [(batch, 7)]

    def test_only_what_is_as_long_as_the_batch_is_cut(self):
        (first, _), _ = pieces((torch.ones(4, 3), torch.ones(3), torch.tensor(2.0)), 4, 2)
        assert [tuple(part.shape) for part in first] == [(2, 3), (3,), ()]


def test_turned_batch_holds_the_same_images_from_the_last_to_the_first():
    images, labels = torch.arange(14).reshape(7, 2), torch.arange(7)
    found = turned((0, Batch(images, labels)), 7)
    assert found[0] == 0
    assert found[1].labels.tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert torch.equal(found[1].images, images.flip(0))
    batch = object()
    assert turned(batch, 1) is batch
