"""The fastest exact way to products is measured; all ways give the same products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssat_probe.measures import mode as module
from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.mode import Mode, fastest


@pytest.fixture
def operator() -> HessianOperator:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 3)).double()
    images, labels = torch.randn(17, 3).double(), torch.randint(3, (17,))
    pairs = [((x, y), len(x)) for x, y in zip(images.split(7), labels.split(7), strict=True)]
    return HessianOperator(dict(net.named_parameters()), lambda b: F.cross_entropy(net(b[0]), b[1]), pairs)


class Clock:
    """Seconds per vector as they are told, for kept or fresh graphs and each number of vectors."""

    def __init__(self, operator: HessianOperator, told: dict[tuple[bool, int], float]) -> None:
        self.now, self.told = 0.0, told
        plain = operator.products

        def products(vectors):
            self.now += self.told[bool(operator.keeps), len(vectors)] * len(vectors)
            return plain(vectors)

        operator.products = products

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("told", "name", "chunk"),
    [
        ({(False, 1): 3.0, (True, 1): 2.0, (True, 4): 2.5, (True, 5): 2.4}, "cached", 1),
        ({(False, 1): 3.0, (True, 1): 2.0, (True, 4): 1.5, (True, 5): 1.4}, "batched", 5),
        ({(False, 1): 1.0, (True, 1): 2.0, (True, 4): 1.5, (True, 5): 1.4}, "fresh", 1),
    ],
)
def test_the_fastest_is_taken_and_the_seconds_are_told(operator, monkeypatch, told, name, chunk):
    monkeypatch.setattr(module, "time", Clock(operator, told))
    found = fastest(operator, num_vectors=5, is_cached=True, max_chunk=100)
    assert (found.name, found.chunk) == (name, chunk)
    assert operator.keeps is (name != "fresh")
    named = {"fresh": told[False, 1], "cached": told[True, 1], "batched_4": told[True, 4], "batched_5": told[True, 5]}
    assert found.seconds == pytest.approx(named)
    assert operator.num_products == 0


def test_every_mode_gives_the_same_products(operator):
    vectors = torch.randn(5, operator.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = {}
    for name in ("fresh", "cached", "batched"):
        chosen = fastest(operator, num_vectors=5, is_cached=True, max_chunk=4, asked=name)
        assert chosen == Mode(name, 4 if name == "batched" else 1)
        with operator:
            found[name] = torch.cat([operator.products(some) for some in vectors.split(chosen.chunk)])
            assert bool(operator._kept) is (name != "fresh")
        assert not operator._kept
    assert torch.equal(found["fresh"], found["cached"])
    torch.testing.assert_close(found["batched"], found["cached"], rtol=1e-12, atol=1e-14)


def test_graphs_of_all_batches_are_kept_and_read_once(operator):
    reads = []

    class Batches:
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            reads.append(1)
            return iter(self.batches)

    operator.batches = Batches(operator.batches)
    fastest(operator, num_vectors=1, is_cached=True, max_chunk=1, asked="cached")
    with operator:
        for _ in range(3):
            operator.product(torch.ones(operator.size, dtype=torch.float64))
    assert len(reads) == 1


def test_what_does_not_fit_is_fresh_or_refused(operator):
    assert fastest(operator, num_vectors=5, is_cached=False, max_chunk=9) == Mode("fresh")
    assert operator.keeps is False
    with pytest.raises(ValueError, match=r"must fit into --memory for --mode batched, got too many"):
        fastest(operator, num_vectors=5, is_cached=False, max_chunk=9, asked="batched")
    with pytest.raises(ValueError, match="No 'cache' in modes: auto, cached, fresh, batched"):
        fastest(operator, num_vectors=5, is_cached=True, max_chunk=9, asked="cache")
