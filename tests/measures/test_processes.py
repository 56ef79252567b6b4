"""Two processes that share the batches give the numbers of one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssat_probe.measures import processes
from ssat_probe.measures.hessian import HessianOperator

TWO = """
import sys
import numpy as np
import torch
from accelerate import debug_launcher
sys.path.insert(0, sys.argv[1])
from test_processes import everything

def run(folder):
    rank = torch.distributed.get_rank()
    np.savez(f"{folder}/{rank}.npz", **everything())

if __name__ == "__main__":
    debug_launcher(run, (sys.argv[2],), num_processes=2)
"""


def everything() -> dict[str, np.ndarray]:
    """Loss, gradient and products of a small network, over this process's share of five unequal batches."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(3, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 3)).double()
    images, labels = torch.randn(29, 3).double(), torch.randint(3, (29,))
    parts = list(zip(images.split(7), labels.split(7), strict=True))
    rank, num = processes.place()
    shares = [(part, len(part[0])) for part in parts[rank::num]]
    loss = lambda batch: F.cross_entropy(net(batch[0]), batch[1])  # noqa: E731
    operator = HessianOperator(dict(net.named_parameters()), loss, shares, is_sharded=True)
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


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TWO, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one = everything()
    zero, first = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    for name, value in one.items():
        np.testing.assert_array_equal(zero[name], first[name], err_msg=name)
        np.testing.assert_allclose(zero[name], value, rtol=1e-13, atol=1e-15, err_msg=name)
    assert one["images"].tolist() == [1, 7, 7, 7, 7]


def test_one_process_is_all_there_is() -> None:
    tensor = torch.ones(3)
    assert processes.place() == (0, 1)
    assert processes.summed(tensor) is tensor
    assert processes.gathered([1, 2]) == [1, 2]
    assert processes.first("a") == "a"


def test_a_process_that_was_started_alone_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes.join()
    assert processes.place() == (0, 1)
