"""A batch over two processes: the same training as in one, in float64, whatever looks beyond one image."""

import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ssat_probe import epoch, sharing, update
from ssat_probe.checkpoint import load_checkpoint, load_tensors
from ssat_probe.images import normalise
from ssat_probe.recipe import Recipe
from ssat_probe.sharing import Share, share_network, share_of, shared, whole
from ssat_probe.training import train

TWO = """
import sys
from accelerate import debug_launcher
sys.path.insert(0, sys.argv[1])
from test_sharing import trained

if __name__ == "__main__":
    debug_launcher(trained, (sys.argv[2],), num_processes=2)
"""

# Two parts of a batch, of five images each: the processes hold three and two of the first, two and three of the second.
EVERYTHING: dict[str, Any] = {"drop_path": 0.5, "augmentation": "standard", "accumulate": 2, "clip_grad": 1.0}
MIXED: dict[str, Any] = {**EVERYTHING, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "scratch": {"method": "scratch", **MIXED, "ema_decay": 0.9},
    "ssl_ft": {"method": "ssl_ft", **MIXED},
    "ssat": {**MIXED, "optimiser": "sgd", "momentum": 0.9},
    "odd batch": {**MIXED, "batch_size": 7, "accumulate": 1},
    "shared pass": {**EVERYTHING, "cls_view": "masked"},
    **{
        f"{method} {task}": {"method": method, "task": task, **EVERYTHING}
        for method in ("ssl_ft", "ssat")
        for task in ("contrastive", "dino", "simmim")
    },
    "swin": {"model": "swin_nano", **EVERYTHING},
    "cvt": {"model": "cvt_nano", **EVERYTHING, "ema_decay": 0.9},
    "cvt dino": {"model": "cvt_nano", "task": "dino", **EVERYTHING},
    "interrupted": {"method": "scratch", **EVERYTHING},  # within an epoch, and gone on with
}


def recipe_of(fields: dict[str, Any]) -> Recipe:
    shared_fields = {"model": "vit_pico", "method": "ssat", "subset": 30, "batch_size": 10, "epochs": 2}
    return Recipe(**{**shared_fields, "base_lr": 1e-2, "warmup_epochs": 0, **fields})


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """New networks and images in float64, on which rounding leaves no doubt."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (epoch, update):
            patch.setattr(module, "normalise", functools.partial(normalise, dtype=torch.float64))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def interrupt(done: int, total: int, text: str) -> None:
    """In the second step of the second epoch, before it is saved."""
    if done == 5:
        raise KeyboardInterrupt


def trained(folder: str) -> None:
    """Train every case, in as many processes as run this."""
    with in_float64():
        for name, fields in CASES.items():
            looks = int(fields.get("method", "ssat") == "ssat")
            if name == "interrupted":
                with contextlib.suppress(KeyboardInterrupt):
                    train(recipe_of(fields), Path(folder) / name, device="cpu", save_every_s=-1, progress=interrupt)
            train(recipe_of(fields), Path(folder) / name, device="cpu", gradients_every=looks)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    done = subprocess.run(
        [sys.executable, "-c", TWO, str(Path(__file__).parent), str(two)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    trained(str(one))
    return one, two


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(folders: tuple[Path, Path], name: str) -> None:
    recipe = recipe_of(CASES[name])
    runs = [folder / name / recipe.name for folder in folders]
    files = sorted(path.name for path in runs[0].glob("*.pt"))
    assert files == sorted(path.name for path in runs[1].glob("*.pt"))
    for file in files:
        one, two = (load_checkpoint(run / file).state for run in runs)
        assert torch.float64 in {value.dtype for value in one.values()}
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-9, atol=1e-11, msg=f"{file}: {key}")
    timings = ["seconds", "images_per_s", "data_wait_s"]
    logs = [pd.read_csv(run / "log.csv").drop(columns=[*timings, "stage"]) for run in runs]
    np.testing.assert_allclose(logs[1], logs[0], rtol=1e-9)
    for column in logs[0].columns.intersection(["val_accuracy", "train_accuracy", "ema_val_accuracy"]):
        pd.testing.assert_series_equal(logs[1][column], logs[0][column], check_exact=True)
    costs = [json.loads((run / "cost.json").read_text()) for run in runs]
    assert all(costs[1][stage]["images"] == cost["images"] for stage, cost in costs[0].items())


@pytest.mark.parametrize(("total", "processes", "num"), list(itertools.product((7, 12), (1, 2, 3), (1, 2, 3))))
def test_parts_of_shares_are_shares_of_parts(total: int, processes: int, num: int) -> None:
    values = torch.arange(total)
    shares = [Share(first, processes, total) for first in range(processes)]
    assert sum(share.weight for share in shares) == pytest.approx(1)
    for number, part in enumerate(values.chunk(num)):
        found = []
        for share in shares:
            rows, of_part = share.parts(num)[number]
            assert len(of_part) == len(rows)
            assert torch.equal(share.of(values)[rows], of_part.of(part))
            found += share.of(values)[rows].tolist()
        assert sorted(found) == part.tolist()


def test_what_is_not_shared_is_whole() -> None:
    values = torch.randn(5, 3)
    assert whole(values) is values
    assert sharing.summed(values) is values
    assert sharing.mean(values) is values
    assert share_of(5) == Share(0, 1, 5)
    with shared(Share(0, 1, 5)):
        assert whole(values) is values
    with shared(Share(1, 2, 9)):
        assert share_of(4) == Share(1, 2, 9)
    assert share_of(4) == Share(0, 1, 4)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm2d(3), (7, 3, 5, 2)),
        (nn.BatchNorm1d(3, momentum=None), (7, 3)),
        (nn.BatchNorm2d(3, affine=False), (7, 3, 5, 2)),
        (nn.BatchNorm2d(3, track_running_stats=False), (7, 3, 5, 2)),
    ],
)
def test_shared_batch_norms_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, norm: nn.Module, shape: tuple[int, ...], generator: Callable[..., Any]
) -> None:
    """Two processes that hold the same images are one that holds them twice; sums over both are doubled."""
    monkeypatch.setattr(sharing, "summed", lambda values: 2 * values)
    norm = norm.double()
    reference = type(norm)(3, momentum=norm.momentum, affine=norm.affine, track_running_stats=norm.track_running_stats)
    reference = reference.double()
    share_network(norm)
    for number in range(3):
        images = torch.randn(shape, generator=generator(f"images {number}"), dtype=torch.float64) * 3 + 2
        inputs = images.clone().requires_grad_(), images.clone().requires_grad_()
        with shared(Share(0, 2, 14)):
            found = norm(inputs[0])
        expected = reference(torch.cat([inputs[1], inputs[1]]))
        torch.testing.assert_close(found, expected[:7], rtol=1e-12, atol=1e-12)
        weights = torch.randn(shape, generator=generator(f"weights {number}"), dtype=torch.float64)
        (gradient,) = torch.autograd.grad((found * weights).sum(), inputs[0])
        (both,) = torch.autograd.grad((expected * torch.cat([weights, weights])).sum(), inputs[1])
        torch.testing.assert_close(gradient, both / 2, rtol=1e-9, atol=1e-12)
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[key], value, rtol=1e-12, atol=1e-12, msg=key)
    torch.testing.assert_close(norm.eval()(images), reference.eval()(images))
    assert norm.state_dict().keys() == reference.state_dict().keys()


def test_a_batch_that_leaves_a_process_without_images_is_refused(tmp_path: Path) -> None:
    recipe = Recipe(method="scratch", model="vit_pico", subset=9, batch_size=3, accumulate=3, epochs=1, warmup_epochs=0)
    options = [word for name in ("method", "model", "subset", "batch_size", "accumulate", "epochs", "warmup_epochs")
               for word in (f"--{name.replace('_', '-')}", str(getattr(recipe, name)))]  # fmt: skip
    words = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ssat_probe", "train", *options]
    done = subprocess.run(
        [sys.executable, "-m", *words, "--out", str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600,
    )  # fmt: skip
    assert done.returncode != 0
    assert "got parts of 1 (batch_size 3, accumulate 3) for 2 processes; use fewer processes." in done.stderr
    assert not list(tmp_path.rglob("*.pt"))


KILLED = """
import functools, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_sharing import in_float64
from ssat_probe import cli, training

if __name__ == "__main__":
    (Path(sys.argv[2]) / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    training.train = functools.partial(training.train, save_every_s=0)
    with in_float64():
        cli.main(sys.argv[3:])
"""


@pytest.mark.slow
def test_killing_one_process_stops_all_and_the_same_command_goes_on(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"method": "scratch", "model": "vit_pico", "subset": 30, "batch_size": 10, "epochs": 60}
    fields |= {"drop_path": 0.5, "mixup": 0.8, "warmup_epochs": 0.0}
    options = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    script, out = tmp_path / "killed.py", tmp_path / "two"
    script.write_text(KILLED)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    words = [*start, str(Path(__file__).parent), str(tmp_path), "train", *options, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    recipe, begun = Recipe(**fields), time.monotonic()
    log = out / recipe.name / "log.csv"
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as launched:
        while not (log.exists() and len(log.read_text().splitlines()) > 3):
            assert launched.poll() is None
            assert time.monotonic() < begun + 300
            time.sleep(0.02)
        pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
        os.kill(pids[1], signal.SIGKILL)
        _, said = launched.communicate(timeout=120)
    assert launched.returncode != 0
    assert "Signal 9 (SIGKILL)" in said  # torchrun says who was killed
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    kept = load_tensors(log.with_name("training_state.pt"), "a state")["state"]
    assert 3 <= kept["epoch"] < 60
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Wrote") == 1
    with in_float64():
        one = train(recipe, tmp_path / "one", device="cpu")
    two = load_checkpoint(out / recipe.name / "scratch.pt")
    assert len(pd.read_csv(log)) == 60
    for key, value in one.state.items():
        torch.testing.assert_close(two.state[key], value, rtol=1e-7, atol=1e-9, msg=key)
