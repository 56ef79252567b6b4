"""Analyses: what the files say, what is reused, and what a killed run leaves behind."""

import dataclasses
import hashlib
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torchvision.datasets import CIFAR10

from ssat_probe import analysis, report
from ssat_probe.cli import main
from ssat_probe.data import cifar10
from ssat_probe.models import vit
from ssat_probe.recipe import Recipe
from ssat_probe.registry import PACKAGE

FOLDER = PACKAGE.parent / "analyses"
FILES = sorted(FOLDER.glob("*.yaml"))
TINY = """
title: Tiny
recipe: {model: vit_pico, data: digits, subset: 40, epochs: 2, batch_size: 20, augmentation: crop}
methods: [ssl_ft, ssat]
seeds: [0, 1]
probes:
  accuracy: {num_images: 30}
  hessian: {steps: 5, num_images: 10, jackknife: false}
measures:
  test accuracy: {probe: accuracy, column: accuracy}
  λmax: {probe: hessian, column: value, where: quantity == 'lambda_max'}
  training time: {probe: cost, column: seconds, unit: s}
claims:
  - {claim: SSAT is sharper, measure: λmax, sign: 1}
threads: 1
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_analysis_parses_and_its_header_says_what_it_takes(path: Path) -> None:
    chosen = analysis.read(path)
    if chosen.claims:  # about methods
        assert {recipe.method for recipe in chosen.recipes} == {"scratch", "ssl_ft", "ssat"}
    assert len({recipe.seed for recipe in chosen.recipes}) >= 3
    header = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    for word in ("Claim:", "Run:", "Takes:", "Needs:", "Got:"):
        assert f" {word} " in header


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_analysis_plans_the_trainings_that_its_results_are_of(path: Path) -> None:
    folder = PACKAGE.parent / "figures" / path.stem
    if not folder.is_dir():
        pytest.skip("never run to its end")
    chosen = analysis.read(path)
    recorded = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))["recipes"]
    assert [Recipe.from_dict(one) for one in recorded] == list(chosen.recipes)
    accuracy = pd.read_csv(folder / "accuracy.csv")["checkpoint"]
    assert list(dict.fromkeys(accuracy)) == [cell.name for cell in chosen.cells]


def test_a_change_of_what_a_file_varies_is_refused() -> None:
    path = FOLDER / "lambda_sweep.yaml"
    assert len(analysis.read(path, changes={"warmup_epochs": 2}).cells) == 42
    for changes in ({"epochs": 5}, {"subset": 60}, {"lambda_weight": 0.3}, {"seed": 9}, {"method": "ssat"}):
        (field,) = changes
        with pytest.raises(
            ValueError, match=rf"field {field} of the recipe, in .*lambda_sweep\.yaml or with --set, must"
        ):
            analysis.read(path, changes=changes)


def test_estimate_is_that_of_what_is_done_in_multiply_adds(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    chosen = analysis.read(tiny)
    budgets = [budget for _, budget in analysis.plan(chosen)]
    told = analysis.estimate(chosen, budgets, tmp_path)
    total = sum(budget.training_multiply_adds for budget in budgets)
    assert told == (
        f"4 trainings, {total:.3g} multiply-adds forward and backward; 0 are done, and how long the others take is not "
        "known before one is."
    )
    for cell in chosen.cells[:2]:  # both of one seed, so half of all
        folder = tmp_path / cell.name
        folder.mkdir()
        (folder / f"{cell.recipe.method}.pt").touch()
        (folder / "cost.json").write_text(
            '{"a": {"train_s": 500, "evaluation_s": 40}, "b": {"train_s": 60, "evaluation_s": 0}}'
        )
    assert "; 2 are done, the others take about 10.0 min at their speed, 2 side" in analysis.estimate(
        chosen, budgets, tmp_path, jobs=2
    )
    for threads, jobs in ((1, 2), (4, 2), (8, 1), (0, 1)):  # of 8 cores, and 2 are left to be trained
        told = analysis.estimate(dataclasses.replace(chosen, threads=threads), budgets, tmp_path)
        assert f"take about {20 / jobs:.1f} min at their speed, {jobs} side by side;" in told
    (folder / "cost.json").write_text('{"a": {"train_s": 500}}')  # which does not say all: the other one counts alone
    (tmp_path / chosen.cells[0].name / "cost.json").write_text('{"a": {"train_s": 1200, "evaluation_s": 0}}')
    minutes = 1200 / 60 * total / 2 / budgets[0].training_multiply_adds / 2
    assert f"the others take about {minutes:.1f} min at" in analysis.estimate(chosen, budgets, tmp_path, jobs=2)
    (folder / "cost.json").write_text('{"a":')
    with pytest.raises(
        ValueError, match=r"cost\.json must say in numbers what each stage of a training cost, got a dam"
    ):
        analysis.estimate(chosen, budgets, tmp_path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_analysis_has_a_smoke_form_with_the_same_points(path: Path) -> None:
    whole, small = analysis.read(path), analysis.read(path, is_smoke=True)
    assert {recipe.epochs for recipe in small.recipes} == {1}
    assert {recipe.subset for recipe in small.recipes} == {20}
    assert all(sum(recipe.stage_epochs.values()) <= 2 for recipe in small.recipes)
    assert {cell.folder for cell in small.cells} == {cell.folder for cell in whole.cells}
    assert len({recipe.seed for recipe in small.recipes}) == 2


def test_default_analysis_is_mechanisms() -> None:
    assert analysis.default_path().name == "mechanisms.yaml"
    assert analysis.read(analysis.default_path()).name == "mechanisms"


def test_plan_matches_the_cost_of_ssl_ft_to_that_of_ssat() -> None:
    cells = analysis.plan(analysis.read(FOLDER / "mechanisms.yaml"))
    budgets = {recipe.method: budget for recipe, budget in cells}
    cost = {method: budget.multiply_adds for method, budget in budgets.items()}
    embeddings = budgets["ssat"].images * 16 * 4 * 32  # which ssat makes once for both passes
    assert cost["ssl_ft"] == cost["ssat"] + embeddings
    assert cost["scratch"] < cost["ssat"] > 500 * embeddings
    assert [(recipe.method, recipe.seed) for recipe, _ in cells] == [
        (method, seed) for seed in (3, 4, 5) for method in ("scratch", "ssl_ft", "ssat")
    ]
    assert all(budget.encoder_parameters + budget.decoder_parameters <= 60_000 for _, budget in cells)


def test_run_writes_all_and_a_second_run_reuses_all(tiny: Path, tmp_path: Path) -> None:
    chosen = analysis.read(tiny)
    told = []
    first = analysis.run(
        chosen, tmp_path / "out", tmp_path / "runs", device="cpu", jobs=1, progress=lambda *news: told.append(news)
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    tables = {f"{name}.{kind}" for name in ("accuracy", "hessian") for kind in ("csv", "json", "png", "pdf")}
    assert names == tables | {"analysis.json", "claims.csv", "claims.md", "cost.csv"} | {
        f"comparison.{kind}" for kind in ("csv", "md", "tex")
    }
    assert told[-1][0] == told[-1][1]
    accuracy = pd.read_csv(tmp_path / "out" / "accuracy.csv")
    assert accuracy["checkpoint"].tolist() == [recipe.name for recipe in chosen.recipes]
    cost = pd.read_csv(tmp_path / "out" / "cost.csv").groupby("method")[["images", "multiply_adds"]].first()
    budgets = {recipe.method: budget for recipe, budget in analysis.plan(chosen)}
    for method, budget in budgets.items():
        assert cost.loc[method].tolist() == [budget.images, budget.training_multiply_adds]
    made = json.loads((tmp_path / "out" / "analysis.json").read_text())
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.*")}
    second = analysis.run(chosen, tmp_path / "out", tmp_path / "runs", device="cpu", jobs=1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.*")} == written
    assert json.loads((tmp_path / "out" / "analysis.json").read_text()) == made
    pd.testing.assert_frame_equal(first[0], second[0])
    pd.testing.assert_frame_equal(first[1], second[1])
    page = report.write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "SSAT is sharper" in page
    # What is lost is left blank, and nothing is trained for it.
    lost = tmp_path / "runs" / chosen.cells[0].name / "cost.json"
    lost.unlink()
    written.pop(lost)
    assert analysis.estimate(chosen, [budget for _, budget in analysis.plan(chosen)], tmp_path / "runs").endswith(
        "4 are done."
    )
    with pytest.warns(UserWarning, match=r"cost\.json is not there"):
        third = analysis.run(chosen, tmp_path / "out", tmp_path / "runs", device="cpu", jobs=1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.*")} == written
    pd.testing.assert_frame_equal(third[1], second[1])
    assert pd.read_csv(tmp_path / "out" / "cost.csv")["seconds"].isna().tolist() == [True, False, False, False]


TWO_MODELS = """
title: Two models
recipe: {data: digits, subset: 40, epochs: 1, batch_size: 20, augmentation: none}
models: [vit_pico, vit_nano]
methods: [scratch]
seeds: [0]
probes:
  accuracy: {num_images: 30}
  small: {probe: hessian, models: [vit_pico], steps: 3, num_images: 10}
  head_of_large: {probe: hessian, models: [vit_nano], steps: 5, num_images: 10, params: ['head.*']}
measures:
  small: {probe: small, column: value, where: quantity == 'num_parameters'}
  large: {probe: head_of_large, column: value, where: quantity == 'num_parameters'}
  time: {probe: cost, column: seconds, where: model == 'vit_nano'}
threads: 1
"""


def test_probe_may_be_measured_twice_with_other_options_on_other_models(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(TWO_MODELS, encoding="utf-8")
    for _ in range(2):  # the second run reuses everything
        compared, _ = analysis.run(analysis.read(path), tmp_path / "out", tmp_path / "runs", device="cpu", jobs=1)
    assert compared.set_index("measure").loc[["small", "large"], "scratch"].tolist() == ["2,794", "330"]
    assert pd.read_csv(tmp_path / "out" / "accuracy.csv")["model"].tolist() == ["vit_pico", "vit_nano"]
    for name, model in (("small", "vit_pico"), ("head_of_large", "vit_nano")):
        assert set(pd.read_csv(tmp_path / "out" / f"{name}.csv")["model"]) == {model}
        assert (tmp_path / "out" / f"{name}.png").is_file()
    page = report.write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "<h2>Small</h2>" in page
    assert "<h2>Head of large</h2>" in page


def test_a_probe_may_look_along_the_training(tiny: Path, tmp_path: Path) -> None:
    text = TINY.replace("hessian: {", "hessian: {snapshots: [0, 1, 2], ")
    tiny.write_text(text.replace("'lambda_max'}", "'lambda_max' and epoch == epoch.max()}"), encoding="utf-8")
    chosen = analysis.read(tiny)
    compared, verdicts = analysis.run(chosen, tmp_path / "out", tmp_path / "runs", device="cpu", jobs=1)
    table = pd.read_csv(tmp_path / "out" / "hessian.csv")
    largest = table[table["quantity"] == "lambda_max"]
    names = [recipe.name for recipe in chosen.recipes for _ in range(3)]
    assert largest["checkpoint"].tolist() == names
    assert largest["epoch"].tolist() == [0, 1, 2] * 4
    last = largest[largest["epoch"] == 2].groupby("method")["value"].mean()
    row = compared.set_index("measure").loc["λmax"]
    assert [float(row[name].split()[0]) for name in ("SSL+FT", "SSAT")] == pytest.approx(last[["ssl_ft", "ssat"]], 1e-3)
    assert verdicts["num_seeds"].tolist() == [2]
    assert analysis.read(tiny, is_smoke=True).measurements[1].snapshots == (0, 1)


def test_edge_of_stability_runs_in_smoke_form(tmp_path: Path) -> None:
    chosen = analysis.read(FOLDER / "edge_of_stability.yaml", is_smoke=True)
    compared, _ = analysis.run(chosen, tmp_path / "out", tmp_path / "runs", device="cpu", jobs=1)
    assert compared.set_index("measure").loc["2 / learning rate [loss]", "scratch"] == "400"
    assert len(compared) == len(chosen.measures)


def test_other_probe_options_are_measured_anew(tiny: Path, tmp_path: Path) -> None:
    run = lambda: analysis.run(analysis.read(tiny), tmp_path / "out", tmp_path / "runs", device="cpu", jobs=1)  # noqa: E731
    tiny.write_text(TINY.replace("seeds: [0, 1]", "seeds: [0]"), encoding="utf-8")
    run()
    tiny.write_text(TINY.replace("seeds: [0, 1]", "seeds: [0]").replace("num_images: 30", "num_images: 20"))
    run()
    assert pd.read_csv(tmp_path / "out" / "accuracy.csv")["num_images"].tolist() == [20, 20]


def test_killed_and_resumed_run_gives_the_uninterrupted_comparison(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(SMALL, encoding="utf-8")
    command = [sys.executable, "-m", "ssat_probe", "reproduce", str(tiny), "--device", "cpu", "--intensity", "56"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(name: str, *options: str) -> subprocess.Popen[bytes]:
        folders = ["--out", str(tmp_path / name / "out"), "--checkpoints", str(tmp_path / name / "runs")]
        return subprocess.Popen(
            [*command, *folders, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    killed = start("killed")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").rglob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "out" / "comparison.csv").exists()
    for name in ("killed", "whole"):
        process = start(name, "--jobs", "1")
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    tables = [pd.read_csv(tmp_path / name / "out" / "comparison.csv") for name in ("killed", "whole")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    for name in ("killed", "whole"):  # trained in worker processes, and in that of the command
        assert (pd.read_csv(tmp_path / name / "out" / "cost.csv")["co2e_g"] > 0).all()
    assert (tmp_path / "whole" / "out" / "report.html").is_file()


SMALL = """
recipe: {model: vit_pico, data: digits, subset: 40, epochs: 1, batch_size: 20}
methods: [scratch, ssat]
seeds: [0, 1]
probes: {accuracy: {num_images: 30}}
measures: {accuracy: {probe: accuracy, column: accuracy}}
threads: 1
"""


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_cell_that_fails_is_named_the_others_are_done_and_the_same_command_does_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], jobs: str
) -> None:
    path, runs, out = tmp_path / "failing.yaml", tmp_path / "runs", tmp_path / "out"
    path.write_text(SMALL, encoding="utf-8")
    names = [cell.name for cell in analysis.read(path).cells]
    damaged = runs / names[1] / "training_state.pt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"PK\x03\x04 and no more")
    words = ["reproduce", str(path), "--device", "cpu", "--jobs", jobs, "--out", str(out), "--checkpoints", str(runs)]
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"All 4 trainings must be done, got 1 that failed: {names[1]} ({damaged} must be ")
    assert said.endswith("What is done is kept; the same command does these again and none of the others.\n")
    assert not (out / "comparison.csv").exists()
    done = {file: file.stat().st_mtime_ns for file in runs.rglob("*.*") if file != damaged}
    assert sorted(file.parent.name for file in done if file.name == "accuracy.csv") == sorted({*names} - {names[1]})
    damaged.unlink()
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert pd.read_csv(out / "accuracy.csv")["checkpoint"].tolist() == names


def test_date_and_seconds_stay_until_something_is_trained_or_measured_anew(tmp_path: Path) -> None:
    path, runs, out = tmp_path / "small.yaml", tmp_path / "runs", tmp_path / "out"
    record_path = out / "analysis.json"

    def run(text: str) -> dict[str, object]:
        path.write_text(text, encoding="utf-8")
        analysis.run(analysis.read(path), out, runs, device="cpu", jobs=1)
        return dict(json.loads(record_path.read_text(encoding="utf-8")))

    run(SMALL)
    first = json.loads(record_path.read_text(encoding="utf-8")) | {"date": "then", "seconds": 99.5, "cores": 3}
    record_path.write_text(json.dumps(first), encoding="utf-8")
    assert run(SMALL) == first
    assert run(f"# A comment\n{SMALL}") == first | {"source": f"# A comment\n{SMALL}"}
    before = record_path.read_bytes()
    checkpoint = runs / analysis.read(path).cells[0].name / "scratch.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ChildProcessError, match="got 1 that failed"):
        run(SMALL)
    assert record_path.read_bytes() == before
    checkpoint.write_bytes(whole)
    record_path.write_text('{"name":', encoding="utf-8")  # no reason to lose the work
    assert isinstance(run(SMALL)["seconds"], float)
    record_path.write_text(json.dumps(first), encoding="utf-8")
    assert run(SMALL.replace("num_images: 30", "num_images: 20"))["date"] != "then"


def test_a_run_whose_results_cannot_be_compared_is_not_finished(tmp_path: Path) -> None:
    path, runs, out = tmp_path / "small.yaml", tmp_path / "runs", tmp_path / "out"
    text = SMALL.replace("column: accuracy}", "column: accuracy, where: seed > 9}")
    for one in (SMALL, text):
        path.write_text(one, encoding="utf-8")
        with pytest.raises(ValueError, match="got none for") if one == text else nullcontext():
            analysis.run(analysis.read(path), out, runs, device="cpu", jobs=1)
    assert json.loads((out / "analysis.json").read_text(encoding="utf-8"))["seconds"] is None


def test_cifar10_analysis_runs_in_smoke_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    counts = {f"data_batch_{number}": 20 for number in range(1, 6)} | {"test_batch": 20}
    for name, count in counts.items():
        data = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 10 for i in range(count)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(cifar10.FACTS.classes)}))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in counts if name != "test_batch"])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    monkeypatch.setitem(cifar10.NUM_IMAGES, "train", 100)
    monkeypatch.setitem(cifar10.NUM_IMAGES, "test", 20)
    narrow = vit.VARIANTS["vit_tiny"] | {"dim": 24, "depth": 8, "decoder": (2, 16, 2)}  # quick, with a deeper half
    monkeypatch.setitem(vit.VARIANTS, "vit_tiny", narrow)
    chosen = analysis.read(FOLDER / "cifar10.yaml", is_smoke=True)
    chosen = dataclasses.replace(chosen, threads=1)  # other tests run beside this one
    assert chosen.name == "cifar10-smoke"
    compared, verdicts = analysis.run(chosen, tmp_path / "out", tmp_path / "runs", data_dir=tmp_path, device="cpu")
    assert len(compared) == len(chosen.measures)
    assert verdicts["num_seeds"].tolist() == [2] * len(chosen.claims)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("seeds:", "seed:"), r"No 'seed' in the keys of an analysis \(.*tiny.yaml\): .* Did you mean 'seeds'\?"),
        (("epochs:", "epoch:"), r"No 'epoch' in the keys of a recipe \(.*tiny.yaml\): .* Did you mean 'epochs'\?"),
        (("hessian: {steps", "hessian: {step"), r"No 'step' in the options of hessian: .* Did you mean 'steps'\?"),
        (("  accuracy: {", "  acuracy: {"), r"No 'acuracy' in probes: .* Did you mean 'accuracy'\?"),
        (
            ("hessian: {", "hessian: {models: [vit_nano], "),
            r"No 'vit_nano' in the models of this analysis, of which hes",
        ),
        (("ssat]", "sat]"), r"No 'sat' in method: .* Did you mean 'ssat'\?"),
        (("accuracy: {", "accuracy: {split: tset, "), r"No 'tset' in splits: .* Did you mean 'test'\?"),
        (
            ("methods:", "vary: {lambda_schedule: [constant]}\nmethods:"),
            r"The axis 'lambda_schedule' of .*tiny\.yaml must "
            r"make trainings differ, got one that changes none; leave it out",
        ),
        (
            ("hessian: {steps", "hessian: {snapshots: [0, 5], steps"),
            r"The snapshots of hessian must be after epochs that a training of 2 keeps, got 5; choose from 0, 1, 2\.",
        ),
        (("hessian: {", "hessian: {snapshots: 3, "), r"snapshots of hessian must be a list of epochs, got 3; write"),
        (("seeds: [0, 1]", "seeds: []"), r"tiny.yaml must say seeds, got nothing there"),
        (("title: Tiny", "title: [Tiny"), r"tiny.yaml must be YAML, got while parsing"),
        (("threads: 1", "threads: two"), r"threads of .*tiny.yaml must be a whole number, 0 for .*, got 'two'; choose"),
        (("threads: 1", "jobs: -1"), r"jobs of .*tiny.yaml must be a whole number, 0 for .*, got -1; choose another"),
        (
            ("probe: cost,", "probe: cots,"),
            r"No 'cots' in the probes that measure 'training time' may be of: .* 'cost'\?",
        ),
        (("column: seconds", "column: second"), r"No 'second' in the columns of cost that measure .* mean 'seconds'\?"),
        (("column: value", "column: quantities"), r"No 'quantities' in the columns of hessian that measure 'λmax' may"),
        (("column: value", "column: method"), r"No 'method' in the columns of hessian that measure 'λmax' may be of"),
        (
            ("sign: 1", "sign: 1, methods: [ssat, scratch]"),
            r"No 'scratch' in the methods of this analysis, about which",
        ),
        (("sign: 1", "sign: 1, methods: [ssat, untrained]"), r"No 'untrained' in the methods of this analysis, about"),
        (
            ("[ssl_ft, ssat]", "[ssat]"),
            r"No 'ssl_ft' in the methods of this analysis, about which claim 'SSAT is sharp",
        ),
        (
            ("hessian: {", "hessian: {models: vit_pico, "),
            r"models of hessian must be a list of names and its probe a name",
        ),
        (
            ("hessian: {", "hessian: {probe: 3, "),
            r"must be a list of names and its probe a name, got \[\] and 3; write",
        ),
        (
            ("epochs: 2", "epochs: 2, seed: 5"),
            r"The field seed of the recipe, in .*tiny.yaml or with --set, must have an",
        ),
        (
            ("  accuracy: {", "  cost: {probe: accuracy, "),
            r"not as a file of its own .*, got 'cost'; rename it, and say",
        ),
        ((TINY, "- 1"), r"tiny.yaml must hold keys and values, got list"),
    ],
)
def test_mistakes_in_a_file_are_named(tiny: Path, change: tuple[str, str], sentence: str) -> None:
    tiny.write_text(TINY.replace(*change), encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        analysis.read(tiny)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--data-dir", "there"),
            "--data-dir must have an effect, got one that has none: data digits is embedded; leave",
        ),
        (("--download",), "--download must have an effect, got one that has none: data digits is embedded"),
        (("--cluster-options", "timeout_min=3"), "--cluster-options must come with --cluster, got them alone; add "),
        (("--jobs", "-1"), "--jobs of the command line must be a whole number, 0 for what the cores allow, got -1; "),
    ],
)
def test_an_option_of_the_command_line_without_effect_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], sentence: str
) -> None:
    out, runs = tmp_path / "out", tmp_path / "runs"
    with pytest.raises(SystemExit) as caught:
        main(["reproduce", str(tiny), "--out", str(out), "--checkpoints", str(runs), *options])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(sentence)
    with pytest.raises(SystemExit):
        main(["reproduce", str(tiny), "--plan", *options])
    printed = capsys.readouterr()
    assert printed.err.startswith(sentence)
    assert not printed.out
    assert not out.exists()
    assert not runs.exists()


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ([], "ssat-probe reproduce"),
        (["{}"], "ssat-probe reproduce {}"),
        (["{}", "--set", "lr_rule=none", "patch_size=[4, 2]", "base_lr=1e-7", "norm_pix=true", "--smoke"],
         "ssat-probe reproduce {} --smoke --set lr_rule=none 'patch_size=[4, 2]' base_lr=1e-07 norm_pix=true"),
    ],
)  # fmt: skip
def test_an_analysis_knows_the_command_that_makes_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], command: str
) -> None:
    made: list[analysis.Analysis] = []

    def enough(chosen: analysis.Analysis, *others: object) -> None:
        made.append(chosen)
        raise ValueError("which is all that is looked at here")

    monkeypatch.setattr(analysis, "plan", enough)
    with pytest.raises(SystemExit):
        main(["reproduce", *(word.format(tiny) for word in words), "--plan"])
    assert made[0].command == command.format(tiny)
    with pytest.raises(SystemExit):
        main([*shlex.split(made[0].command)[1:], "--plan"])
    assert made[1] == made[0]


def test_checkpoints_that_cannot_be_written_are_refused_before_anything_is(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(["reproduce", str(tiny), "--out", str(tmp_path / "out"), "--checkpoints", str(tmp_path / "file" / "runs")])
    sentence = f"{tmp_path}/file/runs must be a folder that can be written, got 'Not a directory'; choose another with "
    assert capsys.readouterr().err == f"{sentence}--checkpoints.\n"
    assert not (tmp_path / "out").exists()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.yaml must be an analysis file \(YAML\), got no such file"):
        analysis.read(tmp_path / "nothing.yaml")
