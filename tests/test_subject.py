"""Losses, masks and streams of a subject, against the objectives and numpy."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssat_probe.checkpoint import load_checkpoint
from ssat_probe.data import open_dataset
from ssat_probe.images import split
from ssat_probe.patches import patchify
from ssat_probe.sample import Sample
from ssat_probe.subject import TERMS, Batch, Subject, device_of

Paths = dict[str, Path]


def subject(path: Path, default_split: str = "test", /, **fields: object) -> Subject:
    options = {"num_images": 23, "batch_size": 7, "device": "cpu", "dtype": "float64"} | fields
    return Subject.of(path, Sample(**options), default_split)  # type: ignore[arg-type]


def test_the_images_stream_in_batches_in_the_same_order_every_time(checkpoints: Paths) -> None:
    one = subject(checkpoints["ssat"])
    first, second = list(one.batches()), list(one.batches())
    assert [len(batch.images) for batch in first] == [7, 7, 7, 2]
    assert torch.cat([batch.ids for batch in first]).tolist() == list(range(23))
    assert one.num_images == 23
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_images_are_normalised_as_in_training(checkpoints: Paths) -> None:
    one = subject(checkpoints["ssat"], num_images=0)
    test = split(open_dataset("digits"), "test")
    facts = one.checkpoint.facts
    expected = (test.read(range(len(test))).double().numpy() / 255 - facts.mean[0]) / facts.std[0]
    np.testing.assert_allclose(torch.cat([batch.images for batch in one.batches()]), expected, rtol=1e-12)
    assert torch.cat([batch.labels for batch in one.batches()]).tolist() == test.labels.tolist()


def test_a_sample_is_stratified_and_another_seed_draws_others(checkpoints: Paths) -> None:
    def labels(**fields: object) -> list[int]:
        return torch.cat([b.labels for b in subject(checkpoints["ssat"], num_images=20, **fields).batches()]).tolist()

    assert np.bincount(labels()).tolist() == [2] * 10
    prints = {subject(checkpoints["ssat"], num_images=20, sample_seed=seed).fingerprint for seed in (0, 0, 1, 2)}
    assert len(prints) == 3


def test_training_images_are_those_of_the_runs_own_subset(checkpoints: Paths) -> None:
    one = subject(checkpoints["ssat"], "train", num_images=0)
    assert one.num_images == 40
    trained_on = split(open_dataset("digits"), "train", 40, 0)
    assert torch.equal(one.images.read(range(40)), trained_on.read(range(40)))
    assert subject(checkpoints["ssat"], "test", split="train", num_images=999).num_images == 40


def test_the_model_is_in_eval_mode_in_the_arithmetic_asked_for(checkpoints: Paths) -> None:
    for dtype in (torch.float32, torch.float64):
        one = subject(checkpoints["ssat"], dtype=str(dtype).removeprefix("torch."))
        assert not one.model.training
        assert one.decoder is not None
        assert not one.decoder.training
        assert {p.dtype for p in [*one.model.parameters(), *one.decoder.parameters()]} == {dtype}
        assert next(iter(one.batches())).images.dtype == dtype
    stored = load_checkpoint(checkpoints["ssat"]).state["head.weight"]
    assert torch.equal(one.model.head.weight, stored.double())


def test_cross_entropy_is_without_label_smoothing(checkpoints: Paths) -> None:
    one = subject(checkpoints["scratch"])
    assert one.checkpoint.recipe.label_smoothing == 0.1
    batch = next(iter(one.batches()))
    logits = one.model(batch.images).detach().numpy()
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -log[np.arange(len(logits)), batch.labels.numpy()].mean()
    assert float(one.loss(batch).detach()) == pytest.approx(expected, rel=1e-12)


def hidden_of(one: Subject, batch: Batch) -> list[set[int]]:
    """Hidden patches of each image: those whose pixels the encoder does not see."""
    seen = []
    handle = one.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].visible_ids))  # type: ignore[union-attr]
    one.reconstruction_errors(batch)
    handle.remove()
    return [set(range(16)) - set(ids.tolist()) for ids in seen[0]]


def test_reconstruction_is_the_mean_square_over_hidden_patches(checkpoints: Paths) -> None:
    one = subject(checkpoints["ssat"])
    batch = next(iter(one.batches()))
    hidden = hidden_of(one, batch)
    assert one.decoder is not None
    mask = torch.tensor([[place in places for place in range(16)] for places in hidden])
    predicted = one.decoder(one.model.encode(batch.images, mask)).detach().numpy()
    target = patchify(batch.images, (2, 2)).numpy()
    expected = [
        np.mean([((predicted[n, i] - target[n, i]) ** 2).mean() for i in places]) for n, places in enumerate(hidden)
    ]
    np.testing.assert_allclose(one.reconstruction_errors(batch).detach(), expected, rtol=1e-12)
    assert float(one.loss(batch, "reconstruction").detach()) == pytest.approx(np.mean(expected), rel=1e-12)


def test_masks_are_the_same_in_every_pass_and_at_every_batch_size(checkpoints: Paths) -> None:
    whole = subject(checkpoints["ssat"], batch_size=23)
    (batch,) = whole.batches()
    masks = hidden_of(whole, batch)
    assert all(len(places) == 12 for places in masks)
    assert len({tuple(sorted(places)) for places in masks}) > 15
    errors = whole.reconstruction_errors(batch).detach()
    for size in (1, 7, 22):
        for _ in range(2):
            one = subject(checkpoints["ssat"], batch_size=size)
            torch.manual_seed(size)
            parts = [(hidden_of(one, part), one.reconstruction_errors(part).detach()) for part in one.batches()]
            assert [places for part, _ in parts for places in part] == masks
            torch.testing.assert_close(torch.cat([part for _, part in parts]), errors, rtol=1e-12, atol=0)


def test_masks_are_those_of_every_checkpoint_and_change_with_the_seed(checkpoints: Paths) -> None:
    def masks(method: str, **fields: object) -> list[set[int]]:
        one = subject(checkpoints[method], **fields)
        return hidden_of(one, next(iter(one.batches())))

    assert masks("ssat") == masks("ssl_ft")
    assert masks("ssat") != masks("ssat", sample_seed=1)


def test_the_joint_loss_is_weighed_as_in_training(checkpoints: Paths) -> None:
    one = subject(checkpoints["ssat"])
    batch = next(iter(one.batches()))
    expected = 0.1 * one.loss(batch) + 0.9 * one.loss(batch, "reconstruction")
    torch.testing.assert_close(one.loss(batch, "joint"), expected, rtol=1e-14, atol=0)


def test_a_loss_is_the_mean_over_its_images_and_differentiable(checkpoints: Paths) -> None:
    one = subject(checkpoints["ssat"], batch_size=23)
    (batch,) = one.batches()
    for term in TERMS:
        singles = [
            float(
                one.loss(Batch(batch.images[i : i + 1], batch.labels[i : i + 1], batch.ids[i : i + 1]), term).detach()
            )
            for i in range(23)
        ]
        loss = one.loss(batch, term)
        assert float(loss.detach()) == pytest.approx(np.mean(singles), rel=1e-12), term
        parameters = one.parameters(term)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        unused = {name for name, g in zip(parameters, gradients, strict=True) if g is None}
        assert unused == ({"head.weight", "head.bias"} if term == "reconstruction" else set()), term


def test_parameters_are_the_trainable_ones_by_name(checkpoints: Paths) -> None:
    one = subject(checkpoints["ssat"])
    own, both = one.parameters(), one.parameters("joint")
    assert "pos_embed" not in own
    assert set(own) == {name for name in one.checkpoint.state if not name.startswith("decoder.")} - {"pos_embed"}
    assert set(both) - set(own) == {n for n in one.checkpoint.state if n.startswith("decoder.")} - {"decoder.pos_embed"}
    assert both["head.weight"] is own["head.weight"] is one.model.head.weight
    assert set(subject(checkpoints["scratch"]).parameters("joint")) == set(own)


def test_reconstruction_without_a_decoder_is_refused(checkpoints: Paths) -> None:
    one = subject(checkpoints["scratch"])
    batch = next(iter(one.batches()))
    for term in ("reconstruction", "joint"):
        with pytest.raises(ValueError, match=r"scratch\.pt must hold a decoder .* got none; use --loss cross_entropy"):
            one.loss(batch, term)


def test_an_unknown_loss_is_named(checkpoints: Paths) -> None:
    one = subject(checkpoints["scratch"])
    with pytest.raises(ValueError, match=r"No 'cross_entrpy' in losses: .* Did you mean 'cross_entropy'\?"):
        one.loss(next(iter(one.batches())), "cross_entrpy")


def colour_images(root: Path, classes: int = 2) -> Path:
    """A folder data set of colour noise."""
    rng = np.random.default_rng(3)
    for part in ("train", "test"):
        for label in range(classes):
            (root / part / f"class{label}").mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / f"class{label}" / f"{number}.png")
    return root


def test_images_with_other_channels_are_refused(checkpoints: Paths, tmp_path: Path) -> None:
    sentence = rf"images of data 'folder' must have 1 channels as {re.escape(str(checkpoints['ssat']))} needs, got 3"
    with pytest.raises(ValueError, match=sentence):
        subject(checkpoints["ssat"], data="folder", data_dir=colour_images(tmp_path))


def test_other_images_are_scaled_to_the_models_size(checkpoints: Paths) -> None:
    one = subject(checkpoints["ssat"], data="mnist5k")
    assert next(iter(one.batches())).images.shape == (7, 1, 8, 8)
    assert one.fingerprint != subject(checkpoints["ssat"]).fingerprint


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "cpux"])
def test_a_device_that_is_not_here_is_named(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"device must be one that is here and has float64, got '{name}'; use cpu, or leave it out"
    ):
        device_of(name)


def test_an_empty_device_is_the_fastest_there_is() -> None:
    assert device_of("cpu") == torch.device("cpu")
    assert device_of("").type in {"cpu", "cuda", "mps"}


def test_images_of_other_classes_are_refused_where_classes_matter(checkpoints: Paths, tmp_path: Path) -> None:
    images = colour_images(tmp_path)
    for path in images.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    looked_at = subject(checkpoints["ssat"], data="folder", data_dir=images)
    sentence = r"must have the 10 classes of .*ssat\.pt \(0, 1, 2, \.\.\.\), got 2 \(class0, class1"
    with pytest.raises(ValueError, match=sentence):
        looked_at.loss(next(looked_at.batches()))
    assert looked_at.reconstruction_errors(next(looked_at.batches())).shape == (6,)


def test_augmented_batches_depend_on_the_image_alone(checkpoints: dict[str, Path]) -> None:
    def looked(batch_size: int, is_augmented: bool) -> torch.Tensor:
        sample = Sample(num_images=7, batch_size=batch_size, device="cpu")
        batches = Subject.of(checkpoints["ssat"], sample).batches(is_augmented)
        return torch.cat([batch.images for batch in batches])

    assert torch.equal(looked(2, True), looked(7, True))
    assert not torch.equal(looked(7, True), looked(7, False))
