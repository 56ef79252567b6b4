"""Order of an epoch, and batches with and without worker processes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssat_probe.files import FileImages
from ssat_probe.images import ArrayImages
from ssat_probe.loading import batches, epoch_order

ID_LISTS = [[7, 2, 5], [0, 1], [10], [3, 3, 4]]


def arrays(num_images: int = 11) -> ArrayImages:
    pixels = torch.arange(num_images * 15, dtype=torch.uint8).view(num_images, 1, 3, 5)
    return ArrayImages(pixels, np.arange(num_images) * 3)


def written(folder: Path, images: ArrayImages) -> FileImages:
    paths = tuple(folder / f"{position}.png" for position in range(len(images)))
    for path, pixels in zip(paths, images.pixels.numpy(), strict=True):
        Image.fromarray(pixels[0]).save(path)
    return FileImages(paths, images.labels, (3, 5), 1, folder)


def test_the_order_is_a_permutation_that_seed_and_epoch_decide() -> None:
    order = epoch_order(97, seed=3, epoch=2)
    assert sorted(order) == list(range(97))
    np.testing.assert_array_equal(order, epoch_order(97, seed=3, epoch=2))
    others = [epoch_order(97, seed, epoch) for seed, epoch in ((3, 3), (2, 3), (0, 0))]
    assert len({tuple(each) for each in (order, *others)}) == 4


def test_repeated_images_stand_together_and_the_epoch_stays_as_long() -> None:
    order = epoch_order(97, seed=3, epoch=2, repeats=3)
    assert len(order) == 97
    np.testing.assert_array_equal(order[::3], epoch_order(97, seed=3, epoch=2)[:33])
    np.testing.assert_array_equal(order[:96].reshape(32, 3), order[:96:3, None].repeat(3, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_files_come_in_the_order_given(tmp_path: Path, workers: int) -> None:
    images = written(tmp_path, arrays())
    got = list(batches(images, ID_LISTS, workers))
    assert [ids.tolist() for _, _, ids in got] == ID_LISTS
    for pixels, labels, ids in got:
        assert pixels.dtype == torch.uint8
        assert labels.dtype == ids.dtype == torch.int64
        assert torch.equal(pixels, arrays().pixels[ids])
        assert labels.tolist() == (ids * 3).tolist()


def test_arrays_are_read_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    read, here = ArrayImages.read, []
    monkeypatch.setattr(ArrayImages, "read", lambda self, ids: here.append(len(ids)) or read(self, ids))
    assert len(list(batches(arrays(), ID_LISTS, workers=2))) == 4
    assert here == [3, 2, 1, 3]


def test_batches_are_read_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    read, here = ArrayImages.read, []
    monkeypatch.setattr(ArrayImages, "read", lambda self, ids: here.append(len(ids)) or read(self, ids))
    stream = batches(arrays(), ID_LISTS)
    next(stream)
    assert len(here) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_global_randomness_is_left_alone(tmp_path: Path, workers: int) -> None:
    images = written(tmp_path, arrays())
    np.random.seed(0)
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(batches(images, ID_LISTS, workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_sentence_that_names_the_file(tmp_path: Path, workers: int) -> None:
    images = written(tmp_path, arrays())
    (tmp_path / "10.png").write_bytes(b"not an image")
    stream = batches(images, ID_LISTS, workers)
    assert next(stream)[2].tolist() == [7, 2, 5]
    assert next(stream)[2].tolist() == [0, 1]
    with pytest.raises(
        ValueError, match=r"^\S*10\.png must be an image that can be decoded, got .*; replace or remove it\.$"
    ):
        next(stream)


def test_a_mistake_of_ours_is_not_turned_into_a_sentence() -> None:
    @dataclasses.dataclass(frozen=True, eq=False)
    class Faulty(ArrayImages):
        def read(self, ids: object) -> torch.Tensor:
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        next(batches(Faulty(arrays().pixels, arrays().labels), ID_LISTS))
