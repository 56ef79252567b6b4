"""Two processes that share the batches give the numbers of one."""

import functools
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from pandas import DataFrame
from torch import nn

from ssat_probe.measures import methods, processes
from ssat_probe.measures.certificate import certify
from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.methods import Settings, rows_of

TWO = """
import sys
import numpy as np
import torch
from accelerate import debug_launcher
sys.path.insert(0, sys.argv[1])
from test_processes import everything, resumed, spectra
from pathlib import Path

def run(folder):
    rank = torch.distributed.get_rank()
    np.savez(f"{folder}/{rank}.npz", **everything())
    for name, table in spectra().items():
        table.to_json(f"{folder}/{name}-{rank}.json", double_precision=15)
    (Path(folder) / f"resumed-{rank}.json").write_text(resumed(Path(folder) / f"unfinished-{rank}"))

if __name__ == "__main__":
    debug_launcher(run, (sys.argv[2],), num_processes=2)
"""


METHODS = ("lanczos", "exact", "lissa", "batches")


class Stop(Exception):  # noqa: N818
    """Somebody pulled the plug."""


def small() -> HessianOperator:
    """Of a small network, over this process's share of five unequal batches."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(3, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 3)).double()
    images, labels = torch.randn(29, 3).double(), torch.randint(3, (29,))
    parts = list(zip(images.split(7), labels.split(7), strict=True))
    rank, num = processes.place()
    shares = [(part, len(part[0])) for part in parts[rank::num]]
    loss = lambda batch: F.cross_entropy(net(batch[0]), batch[1])  # noqa: E731
    return HessianOperator(dict(net.named_parameters()), loss, shares, is_sharded=num > 1)


@functools.cache
def spectra() -> dict[str, DataFrame]:
    """What each method says of it."""
    found = {}
    for method in METHODS:
        operator = small()
        certificate, evaluation = certify(operator), operator.evaluate()
        settings = Settings(steps=12, solvers=True, jackknife=True)
        found[method] = DataFrame(rows_of(method, operator, certificate, evaluation, settings))
    return found


def resumed(folder: Path) -> str:
    """Coefficients of a Lanczos run that is interrupted twice, each time after a few products, and what was saved."""
    left: list[int] = []
    for most in (4, 9, 12):

        def stop(spent: int, most: int = most) -> None:
            if spent == most:
                raise Stop

        operator = small()
        certificate, evaluation = certify(operator), operator.evaluate()
        settings = Settings(steps=12, on_step=stop if most < 12 else None, folder=folder, key="this one")
        before = operator.num_products
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(methods, "SAVE_EVERY_S", 0.0)
            with suppress(Stop):
                rows = rows_of("lanczos", operator, certificate, evaluation, settings)
        state = json.loads((folder / "probe0" / "lanczos.json").read_text())
        left += [len(state["alphas"]), operator.num_products - before]
    coefficients = [row["value"] for row in rows if row["quantity"] in ("alpha", "beta")]
    return json.dumps({"left": left, "coefficients": coefficients})


def everything() -> dict[str, np.ndarray]:
    """Loss, gradient and products."""
    operator = small()
    vectors = torch.randn(3, operator.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = operator.evaluate()
    with operator:
        single = operator.product(vectors[0])
        many = operator.products(vectors)
    return {
        "loss": np.array(found.loss),
        "gradient": found.gradient.numpy(),
        "single": single.numpy(),
        "many": many.numpy(),
        "images": np.array(sorted(found.batch_sizes)),
        "seen": np.array(operator.num_images),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found."""
    found = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TWO, str(Path(__file__).parent), str(found)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return found


def test_two_processes_give_the_numbers_of_one(folder: Path) -> None:
    one = everything()
    zero, first = (np.load(folder / f"{rank}.npz") for rank in range(2))
    for name, value in one.items():
        np.testing.assert_array_equal(zero[name], first[name], err_msg=name)
        np.testing.assert_allclose(zero[name], value, rtol=1e-13, atol=1e-15, err_msg=name)
    assert one["images"].tolist() == [1, 7, 7, 7, 7]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_spectra_of_one(folder: Path, method: str) -> None:
    one = spectra()[method]
    zero, first = (pd.read_json(folder / f"{method}-{rank}.json", precise_float=True) for rank in range(2))
    measured = "seconds|check_|asymmetry|noise_floor"  # of time and of rounding
    if method == "lissa":  # its recursion over mini-batches needs all of them in one process, and its products count
        measured += "|lissa_batches|scale_batches|batch_size|num_products"
    tables = [table[~table["quantity"].str.contains(measured)].reset_index(drop=True) for table in (one, zero, first)]
    assert len(tables[0]) > 15
    scale = float(one.loc[one["quantity"].isin(["lambda_max", "batch_max"]), "value"].max())
    for table in tables[1:]:
        assert table["quantity"].tolist() == tables[0]["quantity"].tolist()
        for column in tables[0].columns.difference(["quantity", "unit"]):
            values = [one_table[column].to_numpy(dtype=float) for one_table in (table, tables[0])]
            np.testing.assert_allclose(*values, rtol=1e-7, atol=1e-9 * scale, err_msg=column)


def test_an_interrupted_run_goes_on_over_processes_as_in_one(folder: Path, tmp_path: Path) -> None:
    one = json.loads(resumed(tmp_path))
    assert one["left"] == [4, 4, 9, 9, 12, 12]  # products: those before an interruption are counted, not repeated
    found = [json.loads((folder / f"resumed-{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["left"] == one["left"]
    operator = small()
    straight = rows_of("lanczos", operator, certify(operator), operator.evaluate(), Settings(steps=12))
    expected = [row["value"] for row in straight if row["quantity"] in ("alpha", "beta")]
    assert one["coefficients"] == expected
    np.testing.assert_allclose(found[0]["coefficients"], expected, rtol=1e-9, atol=1e-12)


def test_one_process_is_all_there_is() -> None:
    tensor = torch.ones(3)
    assert processes.place() == (0, 1)
    assert processes.summed(tensor) is tensor
    assert processes.gathered([1, 2]) == [1, 2]
    assert processes.first("a") == "a"
    assert processes.woven([3, 1]) == [3, 1]


def test_a_process_that_was_started_alone_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes.join()
    assert processes.place() == (0, 1)
