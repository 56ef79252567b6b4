from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ssat_probe import grams
from ssat_probe.sample import Sample
from ssat_probe.subject import Batch, Subject

SAMPLE = Sample(num_images=23, batch_size=5, device="cpu", dtype="float64")


@pytest.fixture
def subject(checkpoints: dict[str, Path]) -> Subject:
    return Subject.of(checkpoints["ssat"], SAMPLE)


@pytest.mark.parametrize("mode", ["gap", "cls", "flatten", "token"])
def test_batches_and_their_order_do_not_enter(subject: Subject, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = grams.of(subject, mode, 7)
    original = Subject.batches

    def backwards(self: Subject) -> Iterator[Batch]:
        return reversed(list(original(self)))

    monkeypatch.setattr(Subject, "batches", backwards)
    found = grams.of(replace(subject, sample=replace(SAMPLE, batch_size=4)), mode, 7)
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-12)
    assert torch.equal(found.ids, expected.ids)
    assert found.num_images == 21
    assert torch.equal(found.ids.unique(), torch.arange(21))


def test_kept_grams_are_bit_for_bit_those_that_were_measured(subject: Subject, tmp_path: Path) -> None:
    expected = grams.of(subject, "gap", 7, tmp_path)
    found = grams.of(replace(subject, images=_Closed(subject.images)), "gap", 7, tmp_path)  # type: ignore[arg-type]
    assert torch.equal(found.values, expected.values)
    assert (found.blocks, found.num_tokens, found.setting) == (expected.blocks, expected.num_tokens, expected.setting)


def test_kept_grams_are_told_apart_by_all_they_depend_on(
    subject: Subject, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    other_seed = Subject.of(checkpoints["ssat"], replace(SAMPLE, sample_seed=1))
    single = Subject.of(checkpoints["ssat"], replace(SAMPLE, dtype="float32"))
    others = (other_seed, single, subject.untrained(), Subject.of(checkpoints["scratch"], SAMPLE))
    for i, (one, mode, group) in enumerate(
        [(subject, "gap", 7), (subject, "cls", 7), (subject, "gap", 5), *((other, "gap", 7) for other in others)]
    ):
        grams.of(one, mode, group, tmp_path)
        assert len(list(tmp_path.iterdir())) == i + 1


def test_class_tokens_are_compared_where_they_are_and_positions_within_one_grid(make_family: Callable) -> None:
    model, images = make_family("our cvt")
    batch = Batch(images.repeat(3, 1, 1, 1), torch.zeros(6, dtype=torch.long), torch.arange(6))
    stand_in = SimpleNamespace(model=model, num_images=6, fingerprint="", setting="", batches=lambda: iter([batch]))
    assert grams.of(stand_in, "cls", 6).blocks == (2, 3)  # type: ignore[arg-type]
    assert grams.of(stand_in, "gap", 6).blocks == (-1, 0, 1, 2, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'token' needs one grid in all blocks, got 384, 96 patch tokens"):
        grams.of(stand_in, "token", 6)  # type: ignore[arg-type]


def test_a_broken_file_is_measured_anew(subject: Subject, tmp_path: Path) -> None:
    expected = grams.of(subject, "gap", 7, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    assert torch.equal(grams.of(subject, "gap", 7, tmp_path).values, expected.values)
    assert torch.equal(grams.of(subject, "gap", 7, tmp_path).values, expected.values)


class _Closed:
    """Images that nobody may look at again."""

    def __init__(self, images: object) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        return self._images.fingerprint()  # type: ignore[attr-defined,no-any-return]

    def read(self, ids: object) -> torch.Tensor:
        assert list(ids) == [0], "a single image says its size"  # type: ignore[call-overload]
        return self._images.read(ids)  # type: ignore[attr-defined,no-any-return]
