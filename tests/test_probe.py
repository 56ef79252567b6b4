"""The runner: identity columns, records, files, and when a result is up to date."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ssat_probe import drawing, probe, registry
from ssat_probe.checkpoint import load_checkpoint
from ssat_probe.measures import processes
from ssat_probe.record import RECORDED_PACKAGES
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject
from ssat_probe.table import read_table

Paths = dict[str, Path]
SAMPLE = Sample(num_images=13, batch_size=5, device="cpu")


def test_the_identity_stands_in_front(checkpoints: Paths) -> None:
    table = probe.measure("accuracy", list(checkpoints.values()), num_images=13, device="cpu")
    assert list(table.columns[:7]) == [column.name for column in probe.IDENTITY]
    assert list(table.columns[7:]) == [column.name for column in probe.make("accuracy").columns]
    assert table["checkpoint"].tolist() == [f"vit_nano-digits-{method}-seed0" for method in checkpoints]
    assert table["method"].tolist() == list(checkpoints)
    assert (table[["model", "data", "seed", "epoch"]] == ["vit_nano", "digits", 0, 1]).all(axis=None)


def test_labels_are_unique_where_two_files_hold_the_same_run(checkpoints: Paths, tmp_path: Path) -> None:
    copies = [tmp_path / "copy.pt", tmp_path / "other" / "copy.pt"]
    copies[1].parent.mkdir()
    for copy in copies:
        copy.write_bytes(checkpoints["ssat"].read_bytes())
    table = probe.measure("accuracy", [checkpoints["ssat"], *copies], num_images=13, device="cpu")
    name = "vit_nano-digits-ssat-seed0"
    assert table["checkpoint"].tolist() == [name, f"{name} (copy)", f"{name} ({copies[1]})"]


def test_options_are_those_of_the_probe_and_of_the_sample(checkpoints: Paths) -> None:
    table = probe.measure("attention", [checkpoints["ssat"]], num_images=13, queries="cls", blocks=[1], device="cpu")
    assert set(table["queries"]) == {"cls"}
    assert set(table["block"]) == {1}
    assert set(table["num_images"]) == {13}


def test_an_unknown_probe_or_option_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"No 'acuracy' in probes: .* Did you mean 'accuracy'\?"):
        probe.make("acuracy")
    with pytest.raises(ValueError, match=r"No 'querys' in the options of attention: .* Did you mean 'queries'\?"):
        probe.make("attention", querys="cls")


def test_the_record_says_how_the_table_was_made(checkpoints: Paths) -> None:
    paths = list(checkpoints.values())
    seen: list[tuple[int, int, str]] = []
    _, record = probe.measure_all(
        probe.make("attention", queries="cls", blocks=[1, 2]), paths, SAMPLE, lambda *told: seen.append(told)
    )
    assert record == json.loads(json.dumps(record))
    assert record["probe"] == "attention"
    assert record["options"] == {"queries": "cls", "keys": "patch", "blocks": [1, 2], "untrained_twin": True}
    assert (record["sample"]["num_images"], record["sample"]["split"]) == (13, "test")
    hashes = [entry["hash"] for entry in record["checkpoints"]]
    assert hashes[:-1] == [load_checkpoint(path).hash for path in paths]
    assert record["checkpoints"][-1]["path"] == ""  # the untrained twin
    assert {entry["num_images"] for entry in record["checkpoints"]} == {13}
    assert len({entry["images"] for entry in record["checkpoints"]}) == 1
    assert record["versions"]["torch"] == version("torch")
    assert set(record["versions"]) == {"python", *RECORDED_PACKAGES}
    assert record["device"] == "cpu"
    assert record["seconds"] > 0
    assert [(done, total) for done, total, _ in seen] == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_every_measure_has_a_row_of_its_own_that_says_all_about_it(checkpoints: Paths, tmp_path: Path) -> None:
    one = probe.make("attention", queries="all", blocks=[1, 2])
    table = probe.run(one, list(checkpoints.values()), SAMPLE, tmp_path)
    rows = read_table(tmp_path / "attention_rows.csv")
    said = ["value", "sd", "low", "high", "num_images", "undefined", "unit", "definition", "policy"]
    assert list(rows.columns) == [*(c.name for c in probe.IDENTITY), "block", "head", "measure", *said]
    entropy = rows[rows["measure"] == "entropy"].reset_index()
    np.testing.assert_allclose(entropy["value"], table["entropy"])
    np.testing.assert_allclose(entropy["sd"], table["entropy_sd"])
    np.testing.assert_allclose(entropy["high"], table["entropy_high"])
    assert set(entropy["unit"]) == {"nat"}
    assert set(entropy["policy"]) == {"queries all, keys patch"}
    assert set(entropy["definition"]) == {"attention.entropy/1"}
    assert (rows["num_images"] == 13).all()
    means = rows[~rows["measure"].str.endswith("_difference")]
    assert len(means) == len(table) * len(means["measure"].unique())
    apart = rows[rows["measure"] == "entropy_difference"].reset_index()
    others = table[table["entropy_difference"].notna()].reset_index()  # all but the first checkpoint, and the twin
    assert len(apart) == len(others) == 3 * 2 * 4
    for end in ("", "_low", "_high"):
        np.testing.assert_allclose(apart[end.lstrip("_") or "value"], others[f"entropy_difference{end}"])
    assert apart[["sd", "undefined"]].isna().all(axis=None)
    assert set(apart["definition"]) == {"attention.entropy_difference/1"}
    assert set(apart["unit"]) == {"nat"}


@pytest.mark.parametrize("name", ["attention", "heads", "histogram", "tokens", "variance", "fourier"])
def test_all_probes_of_measures_say_of_what_they_are_taken(name: str) -> None:
    one = probe.make(name)
    assert one.policy
    assert one.untrained_twin
    spread = [column for column in one.columns if column.name.endswith("_sd")]
    names = {column.name for column in one.columns}
    assert spread
    for column in spread:
        assert {f"{column.of}{end}" for end in ("", "_low", "_high", "_undefined")} <= names


def test_checkpoints_of_other_settings_have_no_differences_and_lines_of_their_own(
    checkpoints: Paths, fine_checkpoints: Paths
) -> None:
    paths = [checkpoints["ssat"], fine_checkpoints["ssat"]]
    table, _ = probe.measure_all(probe.make("variance", untrained_twin=False), paths, SAMPLE)
    assert table["setting"].str.split(",").str[1].unique().tolist() == [" 4x4 patches", " 8x8 patches"]
    assert table["variance_difference"].isna().all()
    seeds = table.assign(seed=(table["setting"] != table["setting"][0]).astype(int), method="ssat", epoch=1)
    assert len(drawing.series(seeds)) == 2


def test_a_run_writes_table_record_and_figure(checkpoints: Paths, tmp_path: Path) -> None:
    table = probe.run(probe.make("accuracy"), [checkpoints["ssat"]], SAMPLE, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"accuracy.{e}" for e in ("csv", "json", "png", "pdf")
    }
    pd.testing.assert_frame_equal(read_table(tmp_path / "out" / "accuracy.csv"), table, check_exact=True)
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "accuracy.pdf").read_bytes().startswith(b"%PDF")


class TestSeveralProcesses:
    def run(self, options: list[str], out: Path, num: int) -> pd.DataFrame:
        """Through the command line, as so many processes; what was printed must be one table."""
        start = ["torch.distributed.run", f"--nproc-per-node={num}", "--standalone", "-m"] if num > 1 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "COLUMNS": "200"}
        words = [sys.executable, "-m", *start, "ssat_probe", "hessian", *options, "--device", "cpu", "--out", str(out)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("Wrote") == done.stdout.count("checkpoint ") == 1
        assert json.loads((out / "hessian.json").read_text())["processes"] == num
        assert not list(out.glob(".*"))
        return read_table(out / "hessian.csv")

    @pytest.mark.parametrize(
        "options",
        [
            ["--steps", "7", "--probes", "2", "--num-images", "21", "--batch-size", "5"],
            ["--compare", "exact", "lanczos", "--params", "head.bias", "--num-images", "7", "--steps", "5"],
        ],
        ids=["lanczos", "compare, one batch"],
    )
    def test_the_command_line_gives_the_numbers_of_one(
        self, checkpoints: Paths, tmp_path: Path, options: list[str]
    ) -> None:
        options = ["--ckpt", str(checkpoints["ssat"]), "--dtype", "float64", *options]
        one, two = (self.run(options, tmp_path / str(num), num) for num in (1, 2))
        measured = "seconds|check_|asymmetry|noise_floor"
        if "--compare" in options:  # ratios to an eigenvalue that is zero
            measured += "|(?:lambda_min|bottom_eigenvalue)_error"
        tables = [table[~table["quantity"].str.contains(measured)] for table in (one, two)]
        assert len(tables[0]) > 40
        scale = float(one.loc[one["quantity"].str.endswith("lambda_max"), "value"].max())
        pd.testing.assert_frame_equal(*tables, rtol=1e-9, atol=1e-10 * scale)

    def test_what_cannot_share_is_refused(self, checkpoints: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "place", lambda: (1, 2))
        with pytest.raises(ValueError, match="attention must run in one process, got 2 of them; only hessian shares"):
            probe.join(probe.make("attention"), SAMPLE)
        assert not probe.join(probe.make("hessian"), SAMPLE)
        subject = Subject.of(checkpoints["ssat"], SAMPLE)
        with pytest.raises(ValueError, match=r"The method pyhessian must run in one process, .* got 2 processes"):
            probe.make("hessian", compare=("lanczos", "pyhessian")).measure(subject)


def test_a_figure_can_be_drawn_from_a_table_read_back(checkpoints: Paths, tmp_path: Path) -> None:
    probe.run(probe.make("accuracy"), list(checkpoints.values()), SAMPLE, tmp_path)
    assert probe.draw("accuracy", read_table(tmp_path / "accuracy.csv")).axes


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    checkpoints: Paths, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    seen: list[object] = []
    with pytest.raises(ValueError, match="must be a folder that can be written, got 'Not a directory'"):
        probe.run(
            probe.make("accuracy"), [checkpoints["ssat"]], SAMPLE, tmp_path / "file" / "sub", lambda *t: seen.append(t)
        )
    assert not seen


FIGURES = Path(__file__).parents[1] / "figures"


@pytest.mark.parametrize("path", sorted(FIGURES.glob("mechanisms/*.csv")), ids=lambda path: path.stem)
def test_tables_of_earlier_versions_can_be_drawn(path: Path) -> None:
    if path.stem in registry.names("probes"):
        assert probe.draw(path.stem, read_table(path)).axes


def test_a_table_without_a_column_is_named() -> None:
    with pytest.raises(ValueError, match="A table of variance must have a column 'checkpoint', got none; pass one"):
        probe.draw("variance", pd.DataFrame({"a": [1]}))


def test_a_long_measurement_tells_how_far_it_is(checkpoints: dict[str, Path]) -> None:
    told: list[tuple[int, int, str]] = []
    sample = Sample(num_images=5, device="cpu")
    hessian = probe.make("hessian", steps=3)
    probe.measure_all(hessian, [checkpoints["scratch"]], sample, lambda *news: told.append(news))
    assert [news[:2] for news in told if news[2].endswith("scratch-seed0")] == [
        (done, 14)
        for done in (1, 2, 3, 14)  # and the jackknife's eleven products of the one batch
    ]
