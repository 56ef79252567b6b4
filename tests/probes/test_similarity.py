from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ssat_probe import probe
from ssat_probe.measures.similarity import centred_gram, cka, cka_spread, shuffled
from ssat_probe.probes.similarity import Probe
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject

Paths = dict[str, Path]
SAMPLE = Sample(num_images=23, batch_size=5, device="cpu", dtype="float64")


def outputs(subject: Subject) -> list[torch.Tensor]:
    """All tokens before the first and after every block, by hooks of our own."""
    seen: list[torch.Tensor] = []
    handles = [subject.model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    handles += [block.register_forward_hook(lambda _, args, out: seen.append(out)) for block in subject.model.blocks]
    with torch.no_grad():
        subject.model(torch.cat([batch.images for batch in subject.batches()]))
    for handle in handles:
        handle.remove()
    return seen


FEATURES = {
    "gap": lambda tokens: tokens[:, 1:].mean(1),
    "cls": lambda tokens: tokens[:, 0],
    "flatten": lambda tokens: tokens[:, 1:].flatten(1),
}


@pytest.mark.parametrize("mode", list(FEATURES))
def test_every_entry_is_the_cka_of_two_blocks_over_full_groups(checkpoints: Paths, mode: str) -> None:
    paths = [checkpoints["ssat"], checkpoints["scratch"]]
    table, _ = probe.measure_all(Probe(mode=mode, group=7, untrained_twin=False), paths, SAMPLE)
    grams = []
    for path in paths:
        layers = [FEATURES[mode](tokens) for tokens in outputs(Subject.of(path, SAMPLE))]
        # Three full groups of seven; two images are left over.
        grams.append(torch.stack([torch.stack([centred_gram(x[i : i + 7]) for i in (0, 7, 14)]) for x in layers]))
    for i, label in enumerate(table["checkpoint"].unique()):
        for j, other in enumerate(table["checkpoint"].unique()):
            rows = table[(table["checkpoint"] == label) & (table["other"] == other)]
            found = rows.pivot_table(index="block", columns="other_block", values="cka", dropna=False)
            # The class token before the first block is the same for all images: no similarity is defined.
            assert found.isna().any(axis=None) == (mode == "cls")
            np.testing.assert_allclose(found, cka(grams[i], grams[j]), rtol=1e-9)
    assert set(table["num_images"]) == {21}


def test_tokens_are_paired_with_every_image_at_another_position(checkpoints: Paths) -> None:
    table = Probe(mode="token", group=7).measure(Subject.of(checkpoints["ssat"], SAMPLE))
    diagonal = table[table["block"] == table["other_block"]]
    # Before the first block all images share their positions, so that even unrelated images are alike there.
    np.testing.assert_allclose(diagonal["cka"], 1)
    assert len(table) == 49


def test_each_checkpoint_passes_over_the_images_once(checkpoints: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    original = Subject.batches
    monkeypatch.setattr(Subject, "batches", lambda self: passes.append(self.checkpoint.label) or original(self))
    probe.measure_all(Probe(untrained_twin=False), list(checkpoints.values()), SAMPLE)
    assert len(passes) == len(set(passes)) == 3


def test_a_checkpoint_that_was_seen_before_needs_no_further_pass(
    checkpoints: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    original = Subject.batches
    monkeypatch.setattr(Subject, "batches", lambda self: passes.append(self.checkpoint.label) or original(self))
    kept = Probe(grams=tmp_path, untrained_twin=False)
    paths = list(checkpoints.values())
    probe.measure_all(kept, paths[:2], SAMPLE)
    table, _ = probe.measure_all(kept, paths, SAMPLE)
    assert len(passes) == len(set(passes)) == 3
    fresh, _ = probe.measure_all(Probe(untrained_twin=False), paths, SAMPLE)
    pd.testing.assert_frame_equal(table, fresh, check_exact=True)


def test_the_interval_is_that_of_the_grams(checkpoints: Paths) -> None:
    subject = Subject.of(checkpoints["ssat"], SAMPLE)
    table = Probe(group=7).measure(subject)
    layers = [FEATURES["gap"](tokens) for tokens in outputs(subject)]
    grams = torch.stack([torch.stack([centred_gram(x[i : i + 7]) for i in (0, 7, 14)]) for x in layers])
    expected = cka_spread(grams, grams, torch.arange(21).reshape(3, 7))
    of_strangers = cka_spread(grams, shuffled(grams), torch.arange(21).reshape(3, 7))
    ends = {f"{end}": expected[end] for end in ("sd", "low", "high")}
    ends |= {f"shuffled_{end}": of_strangers[end] for end in ("sd", "low", "high")}
    for end, values in ends.items():
        found = table.pivot_table(index="block", columns="other_block", values=f"cka_{end}", dropna=False)
        np.testing.assert_allclose(found, values, rtol=1e-8, atol=1e-9)
    inner = table[table["block"] != table["other_block"]]
    assert ((inner["cka_low"] < inner["cka"]) & (inner["cka"] < inner["cka_high"])).all()


def test_differences_to_the_first_are_those_of_the_same_resamples(checkpoints: Paths) -> None:
    subjects = {name: Subject.of(path, SAMPLE) for name, path in checkpoints.items()}
    tables = dict(zip(subjects, Probe(group=7).between(iter(subjects.items())), strict=True))
    features = {
        name: torch.stack(
            [torch.stack([centred_gram(FEATURES["gap"](x)[i : i + 7]) for i in (0, 7, 14)]) for x in seen]
        )
        for name, seen in ((name, outputs(subject)) for name, subject in subjects.items())
    }
    names = list(subjects)
    differences = [f"cka_difference{end}" for end in ("", "_low", "_high")]
    assert tables[names[0]][differences].isna().all(axis=None)
    for other, firsts_other in ((names[0], names[0]), (names[1], names[0]), (names[2], names[2])):
        rows = tables[names[1]].query("other == @other")
        ids = torch.arange(21).reshape(3, 7)
        mine = cka_spread(features[names[1]], features[other], ids)["replicates"]
        firsts = cka_spread(features[names[0]], features[firsts_other], ids)["replicates"]
        expected = np.nanquantile((mine - firsts).numpy(), [0.025, 0.975], axis=0)
        whole = cka(features[names[1]], features[other]) - cka(features[names[0]], features[firsts_other])
        for name, values in zip(differences, (whole.numpy(), *expected), strict=True):
            found = rows.pivot_table(index="block", columns="other_block", values=name, dropna=False)
            np.testing.assert_allclose(found, values, rtol=1e-8, atol=1e-9, err_msg=f"{other} {name}")


def test_checkpoints_of_other_settings_have_no_difference(checkpoints: Paths, fine_checkpoints: Paths) -> None:
    table, _ = probe.measure_all(Probe(untrained_twin=False), [checkpoints["ssat"], fine_checkpoints["ssat"]], SAMPLE)
    assert table["cka_difference"].isna().all()


def test_another_preparation_is_marked(checkpoints: Paths, fine_checkpoints: Paths) -> None:
    table, _ = probe.measure_all(Probe(untrained_twin=False), [checkpoints["ssat"], fine_checkpoints["ssat"]], SAMPLE)
    across = table["checkpoint"] != table["other"]
    assert ((table["setting"] != table["other_setting"]) == across).all()
    words = [text.get_text() for legend in Probe().draw(table).legends for text in [legend.get_title()]]
    assert "settings differ" in " ".join(words)


def test_a_pair_is_the_same_from_either_side(checkpoints: Paths) -> None:
    table, _ = probe.measure_all(Probe(), list(checkpoints.values()), SAMPLE)
    assert len(table) == 16 * 49
    turned = table.rename(
        columns={"checkpoint": "other", "other": "checkpoint", "block": "other_block", "other_block": "block"}
    )
    keys = ["checkpoint", "other", "block", "other_block"]
    both = pd.merge(table[[*keys, "cka"]], turned[[*keys, "cka"]], on=keys)
    np.testing.assert_allclose(both["cka_x"], both["cka_y"], rtol=1e-12)


def test_the_untrained_twin_stands_beside_unless_it_is_left_out(checkpoints: Paths) -> None:
    table, _ = probe.measure_all(Probe(), [checkpoints["ssat"]], SAMPLE)
    assert len(set(table["other"])) == 2
    assert len(probe.measure_all(Probe(untrained_twin=False), [checkpoints["ssat"]], SAMPLE)[0]) == 49
    assert set(table["method"]) == {"ssat", "untrained"}


def test_other_images_are_refused(checkpoints: Paths) -> None:
    one, other = (Subject.of(checkpoints["ssat"], Sample(num_images=n, device="cpu")) for n in (13, 11))
    with pytest.raises(ValueError, match=r"CKA compares the same images, got others for b than for a\."):
        Probe().between(iter([("a", one), ("b", other)]))


def test_a_grid_of_another_size_is_refused_for_tokens_alone(checkpoints: Paths, fine_checkpoints: Paths) -> None:
    paths = [checkpoints["ssat"], fine_checkpoints["ssat"]]
    assert len(probe.measure_all(Probe(untrained_twin=False), paths, SAMPLE)[0]) == 4 * 49
    with pytest.raises(ValueError, match=r"needs equal grids, got 64 tokens of .* and 16 of "):
        probe.measure_all(Probe(mode="token"), paths, SAMPLE)


def test_an_unknown_mode_and_a_missing_class_token_are_named(checkpoints: Paths) -> None:
    subject = Subject.of(checkpoints["ssat"], SAMPLE)
    with pytest.raises(ValueError, match=r"No 'gpa' in modes: .* Did you mean 'gap'\?"):
        Probe(mode="gpa").measure(subject)  # type: ignore[arg-type]
    subject.model.cls_token = None
    with pytest.raises(ValueError, match=r"Mode 'cls' needs a model with a class token, got a Model without\."):
        Probe(mode="cls").measure(subject)


def test_figure_has_a_matrix_for_every_pair(checkpoints: Paths) -> None:
    table, _ = probe.measure_all(Probe(), list(checkpoints.values()), SAMPLE)
    labels = {(ax.get_ylabel(), ax.get_xlabel()) for ax in Probe().draw(table).axes}
    names = ("scratch", "SSL+FT", "SSAT")
    assert {(f"block, {a}", f"block, {b}") for a in names for b in names} <= labels
    assert len(Probe().summary(table)) == 16
