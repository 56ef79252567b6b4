"""Results that are there already: when they are what would be measured, and what can be drawn again from them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ssat_probe import probe, reuse
from ssat_probe.checkpoint import load_checkpoint, save_checkpoint
from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.sample import Sample
from ssat_probe.source import Source
from ssat_probe.table import read_table

Paths = dict[str, Path]
SAMPLE = Sample(num_images=13, batch_size=5, device="cpu")


def test_a_result_is_up_to_date_until_anything_about_it_changes(checkpoints: Paths, tmp_path: Path) -> None:
    one, path, out = probe.make("attention"), tmp_path / "a.pt", tmp_path / "out"
    path.write_bytes(checkpoints["ssat"].read_bytes())
    assert not reuse.is_up_to_date(one, [path], SAMPLE, out)
    probe.run(one, [path], SAMPLE, out)
    assert reuse.is_up_to_date(one, [path], SAMPLE, out)
    assert not reuse.is_up_to_date(probe.make("attention", queries="cls"), [path], SAMPLE, out)
    assert not reuse.is_up_to_date(one, [path], Sample(num_images=14, batch_size=5, device="cpu"), out)
    assert not reuse.is_up_to_date(one, [path, checkpoints["ssl_ft"]], SAMPLE, out)
    checkpoint = load_checkpoint(path)
    changed = checkpoint.state | {"head.bias": checkpoint.state["head.bias"] + 1}
    save_checkpoint(dataclasses.replace(checkpoint, state=changed))
    assert not reuse.is_up_to_date(one, [path], SAMPLE, out)
    path.write_bytes(checkpoints["ssat"].read_bytes())
    assert reuse.is_up_to_date(one, [path], SAMPLE, out)
    record = out / "attention.json"
    whole = record.read_text()
    record.write_text(whole[:-20])
    assert not reuse.is_up_to_date(one, [path], SAMPLE, out)
    record.write_text(json.dumps(json.loads(whole) | {"versions": {"ssat-probe": "0.0.0"}}))
    assert not reuse.is_up_to_date(one, [path], SAMPLE, out)
    older = json.loads(whole)
    del older["options"]["queries"]  # as if the option had come later: then its default was what happened
    record.write_text(json.dumps(older))
    assert reuse.is_up_to_date(one, [path], SAMPLE, out)
    assert not reuse.is_up_to_date(probe.make("attention", queries="cls"), [path], SAMPLE, out)
    record.write_text(whole)
    (out / "attention.csv").unlink()
    assert not reuse.is_up_to_date(one, [path], SAMPLE, out)


def test_a_result_of_other_images_at_the_same_place_is_not_up_to_date(checkpoints: Paths, tmp_path: Path) -> None:
    one, path, out = probe.make("variance", untrained_twin=False), checkpoints["ssat"], tmp_path / "out"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    array, folder = tmp_path / "a.npz", tmp_path / "pictures"
    np.savez(array, pixels)
    folder.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    samples = [Sample(data="unlabelled", data_dir=place, device="cpu") for place in (array, folder)]
    for sample, other in zip(samples, samples[::-1], strict=True):
        probe.run(one, [path], sample, out)
        assert reuse.is_up_to_date(one, [path], sample, out)
        assert not reuse.is_up_to_date(one, [path], other, out)
        if sample.data_dir == array:
            np.savez(array, 255 - pixels)
        else:
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "3.png")
        assert not reuse.is_up_to_date(one, [path], sample, out)


def test_a_result_of_weights_read_in_another_way_is_not_up_to_date(tmp_path: Path) -> None:
    """Heads, normalisation and the entry of a file leave no trace in its weights."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    one, paths, out = probe.make("variance", untrained_twin=False), [tmp_path / "a.pth"], tmp_path / "out"
    sample = Sample(data="digits", num_images=4, device="cpu")
    source = Source(heads=3)
    probe.run(one, paths, sample, out, source=source)
    assert reuse.is_up_to_date(one, paths, sample, out, source=source)
    for other in (Source(heads=2), Source(), Source(heads=3, mean=(0.5,) * 3, std=(0.5,) * 3)):
        assert not reuse.is_up_to_date(one, paths, sample, out, source=other)
    record = json.loads((out / "variance.json").read_text())
    del record["source"]  # of an earlier version, which reused results of our own checkpoints alone
    (out / "variance.json").write_text(json.dumps(record))
    assert not reuse.is_up_to_date(one, paths, sample, out, source=source)


class TestRedrawn:
    OPTIONS = {"steps": 6, "params": ("head.*",)}  # noqa: RUF012

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Vectors that products were asked for."""
        seen: list[int] = []
        products = HessianOperator.products
        monkeypatch.setattr(HessianOperator, "products", lambda self, v: seen.append(len(v)) or products(self, v))
        return seen

    @pytest.mark.parametrize("more", [{}, {"compare": ("exact", "lanczos", "lissa")}, {"method": "exact", "steps": 80}])
    def test_other_thresholds_take_no_product(
        self, checkpoints: Paths, tmp_path: Path, asked: list[int], more: dict[str, object]
    ) -> None:
        paths, options = [checkpoints["ssat"], checkpoints["scratch"]], self.OPTIONS | more
        other = probe.make("hessian", **options, tau=(0.003, 0.05, 0.2), bandwidth=0.3)
        probe.run(probe.make("hessian", **options), paths, SAMPLE, tmp_path)
        first = (tmp_path / "hessian.png").read_bytes()
        assert asked
        asked.clear()
        line = probe.estimate(other, paths, SAMPLE, out=tmp_path)
        assert line == f"hessian: drawn again from {tmp_path}/hessian.csv, nothing is measured"
        table = probe.run(other, paths, SAMPLE, tmp_path)
        assert not asked
        assert (tmp_path / "hessian.png").read_bytes() != first
        wanted, record = probe.measure_all(other, paths, SAMPLE)
        measured = ("seconds", "estimated_seconds")  # those of the first run stay
        pairs = [one[~one["quantity"].str.contains("|".join(measured))] for one in (table, wanted)]
        pd.testing.assert_frame_equal(*pairs, rtol=1e-12, check_dtype=False)
        assert set(table["tau"].dropna()) == {0.0, 0.003, 0.05, 0.2}
        there = json.loads((tmp_path / "hessian.json").read_text())
        assert there["options"] == record["options"]
        assert reuse.is_up_to_date(other, paths, SAMPLE, tmp_path)

    def test_what_is_measured_otherwise_is_measured(self, checkpoints: Paths, tmp_path: Path, asked: list[int]) -> None:
        paths, sample = [checkpoints["ssat"]], SAMPLE
        one = probe.make("hessian", **self.OPTIONS)
        probe.run(one, paths, sample, tmp_path / "out")
        for change in ({"steps": 7}, {"seed": 1}, {"params": ("head.weight",)}):
            asked.clear()
            assert reuse.redrawn(dataclasses.replace(one, **change), paths, sample, tmp_path / "out") is None
        assert reuse.redrawn(one, paths, dataclasses.replace(sample, num_images=14), tmp_path / "out") is None
        assert reuse.redrawn(one, [checkpoints["scratch"]], sample, tmp_path / "out") is None
        assert reuse.redrawn(one, paths, sample, tmp_path / "other") is None
        assert reuse.redrawn(probe.make("accuracy"), paths, sample, tmp_path / "out") is None
        assert reuse.redrawn(one, paths, sample, tmp_path / "out") is not None

    def test_a_file_that_an_option_names_and_is_gone_is_made_again(self, checkpoints: Paths, tmp_path: Path) -> None:
        one = probe.make("hessian", steps=4, jackknife=False, vectors=tmp_path / "vectors")
        probe.run(one, [checkpoints["ssat"]], SAMPLE, tmp_path / "out")
        assert reuse.redrawn(one, [checkpoints["ssat"]], SAMPLE, tmp_path / "out") is not None
        (tmp_path / "vectors").rename(tmp_path / "moved")
        assert reuse.redrawn(one, [checkpoints["ssat"]], SAMPLE, tmp_path / "out") is None

    def test_an_older_table_has_the_default_smoothing(self, checkpoints: Paths, tmp_path: Path) -> None:
        one = probe.make("hessian", **self.OPTIONS)
        table = probe.run(one, [checkpoints["ssat"]], SAMPLE, tmp_path)
        assert table["quantity"].iloc[-1] == "bandwidth"
        older = read_table(tmp_path / "hessian.csv").iloc[:-1]
        lines = [one.draw(each).axes[0].lines[0].get_ydata() for each in (table, older)]
        np.testing.assert_allclose(*lines, rtol=1e-12)
