"""Accuracy and losses by value."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import recall_score, roc_auc_score

from ssat_probe import drawing
from ssat_probe.probes.accuracy import Probe, by_class
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject

Paths = dict[str, Path]


def subject(path: Path, **fields: object) -> Subject:
    options = {"num_images": 101, "batch_size": 23, "device": "cpu", "dtype": "float64"} | fields
    return Subject.of(path, Sample(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["scratch", "ssl_ft", "ssat"])
def test_values_by_hand(checkpoints: Paths, method: str) -> None:
    one = subject(checkpoints[method])
    row = Probe().measure(one).iloc[0]
    whole = subject(checkpoints[method], batch_size=101)
    (batch,) = whole.batches()
    with torch.no_grad():
        logits = one.model(batch.images).numpy()
        errors = whole.reconstruction_errors(batch).numpy() if whole.decoder is not None else np.full(1, np.nan)
    labels = batch.labels.numpy()
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    correct = (logits.argmax(1) == labels).sum()
    assert row["accuracy"] == correct / 101
    assert row["cross_entropy"] == pytest.approx(-log[np.arange(101), labels].mean(), rel=1e-12)
    assert row["reconstruction"] == pytest.approx(errors.mean(), rel=1e-12, nan_ok=True)
    assert np.isnan(row["reconstruction"]) == (method == "scratch")
    assert row["num_images"] == 101


def test_the_interval_is_wilsons(checkpoints: Paths) -> None:
    row = Probe().measure(subject(checkpoints["ssat"])).iloc[0]
    z, n, p = 1.959963984540054, 101, row["accuracy"]
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert row["accuracy_low"] == pytest.approx(centre - half, rel=1e-9)
    assert row["accuracy_high"] == pytest.approx(centre + half, rel=1e-9)


def test_a_model_that_knows_the_class_is_always_right(checkpoints: Paths) -> None:
    one = subject(checkpoints["scratch"])
    answers = iter([batch.labels for batch in one.batches()])
    one.model.head.register_forward_hook(
        lambda module, args, out: torch.nn.functional.one_hot(next(answers), 10).double() * 50
    )
    row = Probe().measure(one).iloc[0]
    assert (row["accuracy"], row["accuracy_high"]) == (1, 1)
    assert row["cross_entropy"] == pytest.approx(9 * np.exp(-50), rel=1e-6)
    assert (row["balanced_accuracy"], row["auc"]) == (1, 1)


def test_classes_count_alike_however_many_images_they_have() -> None:
    labels = np.array([0] * 8 + [1] * 2)
    always_zero = np.tile([0.9, 0.1], (10, 1))
    assert by_class(labels, always_zero) == (0.5, 0.5)  # its accuracy is 0.8


def test_auc_is_the_share_of_pairs_in_the_right_order_mean_over_classes() -> None:
    """Mann-Whitney: an image of the class above one of another counts 1, a tie 1/2."""
    generator = np.random.default_rng(0)
    labels = np.arange(29) % 3
    scores = generator.integers(1, 6, (29, 3)).astype(float)  # few values: ties
    probabilities = scores / scores.sum(1, keepdims=True)
    expected = []
    for name in range(3):
        own, other = probabilities[labels == name, name], probabilities[labels != name, name]
        above, tied = own[:, None] > other[None], own[:, None] == other[None]
        expected.append((above + tied / 2).mean())
    assert by_class(labels, probabilities)[1] == pytest.approx(np.mean(expected), rel=1e-12)


def test_against_scikit_learn() -> None:
    generator = np.random.default_rng(1)
    for num_classes in (2, 5):
        labels = np.arange(31) % num_classes
        probabilities = generator.dirichlet(np.ones(num_classes), 31)
        positive = probabilities[:, 1] if num_classes == 2 else probabilities
        balanced, auc = by_class(labels, probabilities)
        assert auc == pytest.approx(roc_auc_score(labels, positive, multi_class="ovr", average="macro"), rel=1e-12)
        assert balanced == pytest.approx(recall_score(labels, probabilities.argmax(1), average="macro"), rel=1e-12)


@pytest.mark.parametrize("labels", [[0, 1, 1, 0], [2, 2, 2, 2]])
def test_a_class_without_images_has_no_value(labels: list[int]) -> None:
    assert np.isnan(by_class(np.array(labels), np.full((4, 3), 1 / 3))).all()


def table(reconstruction: tuple[float, ...]) -> pd.DataFrame:
    values = [(0.8 + 0.01 * i, 0.7, 0.9, 0.5, r, 100, 0.8, 0.9) for i, r in enumerate(reconstruction)]
    made = pd.DataFrame(values, columns=[column.name for column in Probe.columns])
    for place, (name, value) in enumerate({"model": "vit_nano", "method": "ssat", "data": "digits"}.items()):
        made.insert(place, name, value)
    made.insert(0, "checkpoint", [f"run{i}" for i in range(len(made))])
    made.insert(4, "seed", range(len(made)))
    made.insert(5, "epoch", 3)
    return pd.read_csv(io.StringIO(made.to_csv(index=False)))


@pytest.mark.parametrize(("reconstruction", "panels"), [((0.4, 0.5, 0.6), 2), ((np.nan,) * 3, 1), ((0.4, np.nan), 2)])
def test_reconstruction_is_drawn_where_there_is_a_decoder(reconstruction: tuple[float, ...], panels: int) -> None:
    axes = Probe().draw(table(reconstruction)).axes
    assert [ax.get_ylabel() for ax in axes] == ["accuracy", "reconstruction [normalised pixel²]"][:panels]


def test_points_of_a_sweep_are_named_in_the_legend_and_keep_their_look_in_both_panels(tmp_path: Path) -> None:
    rows = [
        {"checkpoint": f"lambda_weight={weight},training_images=100/vit_nano-digits-{method}-seed{seed}", "seed": seed}
        | {"model": "vit_nano", "data": "digits", "method": method, "epoch": 300.0, "accuracy": 0.5 + seed / 10}
        | {"reconstruction": 0.4 if method == "ssat" else np.nan}
        for method in ("scratch", "ssat")
        for weight in (0.01, 0.03, 0.1, 0.2, 0.5)
        for seed in range(2)
    ]
    figure = Probe().draw(pd.DataFrame(rows))
    left, right = figure.axes
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == 10
    assert names[-1] == "SSAT, lambda_weight=0.5,training_images=100, vit_nano, digits, epoch 300.0"
    looks = [{line.get_label(): line.get_color() for line in ax.lines} for ax in (left, right)]
    assert {name: looks[1][name] for name in names} == {name: looks[0][name] for name in names}
    drawing.save(figure, tmp_path / "figure")  # a warning of matplotlib's that nothing fits is an error here


def test_the_summary_has_a_row_per_checkpoint() -> None:
    shown = Probe().summary(table((0.4, 0.5)))
    assert shown["checkpoint"].tolist() == ["run0", "run1"]
