"""Jackknife over batches: closed form, brute force with dense Hessians, coverage in simulation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from ssat_probe.measures.dense import dense
from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.jackknife import QUANTITIES, data_errors, standard_error
from ssat_probe.measures.lanczos import lanczos


def run(operator: HessianOperator, steps: int):
    return lanczos(operator.product, operator.size, steps, with_basis=True)


def quantities(matrix: np.ndarray) -> list[float]:
    values = np.linalg.eigvalsh(matrix)
    return [values[-1], values[0], values.sum(), -values[values < 0].sum() / np.abs(values).sum()]


def brute_force(matrices: list[np.ndarray], sizes: list[int]) -> dict[str, float]:
    """The whole jackknife, each leave-out with all its eigenvalues."""
    weights = np.array(sizes, dtype=float)
    whole = quantities(np.average(matrices, axis=0, weights=weights))
    without = []
    for place in range(len(sizes)):
        rest = np.where(np.arange(len(sizes)) == place, 0, weights)
        without.append(quantities(np.average(matrices, axis=0, weights=rest)))
    pairs = zip(QUANTITIES, whole, np.array(without).T, strict=True)
    return {name: standard_error(value, values, weights) for name, value, values in pairs}


class TestStandardError:
    def test_of_a_mean_it_is_the_usual_one(self):
        values = np.array([2.0, 3.0, 7.0, 11.0, 1.0])
        without = (values.sum() - values) / 4
        expected = values.std(ddof=1) / 5**0.5
        assert standard_error(values.mean(), without, np.full(5, 13.0)) == pytest.approx(expected, rel=1e-12)

    def test_unequal_batches_weigh_by_their_size(self):
        generator = np.random.default_rng(0)
        sizes = np.array([2.0, 3.0, 5.0, 7.0, 11.0, 13.0])
        errors, means = [], []
        for _ in range(4000):
            values = generator.normal(0, 1 / np.sqrt(sizes))
            whole = (sizes * values).sum() / sizes.sum()
            without = (sizes.sum() * whole - sizes * values) / (sizes.sum() - sizes)
            errors.append(standard_error(whole, without, sizes))
            means.append(whole)
        assert np.mean(np.square(errors)) == pytest.approx(np.var(means), rel=0.1)

    def test_one_batch_says_nothing(self):
        assert np.isnan(standard_error(1.0, np.array([1.0]), np.array([3.0])))


class Quadratic:
    """Half wᵀAw averaged over the A of a batch: its Hessian is their mean."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches = batches
        weight = nn.Parameter(torch.zeros(batches[0].shape[-1], dtype=torch.float64))
        pairs = [(one, len(one)) for one in batches]
        self.operator = HessianOperator({"w": weight}, lambda b: weight @ b.mean(0) @ weight / 2, pairs)


def symmetric(generator: np.random.Generator, num: int, size: int, spread: float) -> torch.Tensor:
    """Around a matrix with eigenvalues apart at both ends."""
    centre = np.diag(np.concatenate([[-3.0, -1.0], np.linspace(-0.3, 0.3, size - 4), [4.0, 9.0]]))
    noise = generator.normal(0, spread, (num, size, size))
    return torch.from_numpy(centre + (noise + noise.transpose(0, 2, 1)) / 2)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    images = torch.randn(207, 5).double()
    labels = (images @ torch.randn(5, 3).double()).argmax(1)
    parameters = dict(net.named_parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    net.zero_grad(set_to_none=True)
    pairs = [((x, y), len(x)) for x, y in zip(images.split(23), labels.split(23), strict=True)]
    return parameters, lambda b: F.cross_entropy(net(b[0]), b[1]), pairs


class TestAgainstBruteForce:
    def test_with_every_vector_the_ends_and_the_trace_are_exact(self):
        generator = np.random.default_rng(1)
        parts = [symmetric(generator, num, 7, 2.0) for num in (3, 5, 4, 2)]
        problem = Quadratic(parts)
        found = data_errors(problem.operator, run(problem.operator, 7), num_vectors=7)
        true = brute_force([one.mean(0).numpy() for one in parts], [len(one) for one in parts])
        for name in QUANTITIES[:3]:
            assert found.errors[name] == pytest.approx(true[name], rel=1e-9)
        assert found.errors["negative_energy"] == pytest.approx(true["negative_energy"], rel=0.3)
        assert (found.num_batches, found.num_products) == (4, 8)

    def test_on_a_network(self, net):
        parameters, loss, pairs = net
        operator = HessianOperator(parameters, loss, pairs)
        matrices = [dense(HessianOperator(parameters, loss, [pair])).numpy() for pair in pairs]
        true = brute_force(matrices, [num for _, num in pairs])
        found = data_errors(operator, run(operator, 50)).errors
        assert found["lambda_max"] == pytest.approx(true["lambda_max"], rel=0.05)
        assert found["lambda_min"] == pytest.approx(true["lambda_min"], rel=0.2)
        for name in ("trace", "negative_energy"):
            assert 0.7 * true[name] < found[name] < 2 * true[name], name

    def test_what_one_start_vector_misses_makes_the_error_of_the_trace_larger_not_smaller(self):
        generator = np.random.default_rng(2)
        parts = [symmetric(generator, 6, 41, 0.5) for _ in range(9)]
        problem = Quadratic(parts)
        true = brute_force([one.mean(0).numpy() for one in parts], [6] * 9)["trace"]
        found = []
        for seed in range(30):
            krylov = lanczos(problem.operator.product, 41, 30, seed=seed, with_basis=True)
            found.append(data_errors(problem.operator, krylov).errors["trace"])
        assert np.sqrt(np.mean(np.square(found))) > true

    @pytest.mark.parametrize("tail", [0.0, 1e-12])
    def test_a_null_space_is_no_eigenvector_to_be_taken_out(self, tail):
        # a Gauss-Newton matrix: low rank; its Ritz value at zero converges, and stands for nearly all directions
        generator = np.random.default_rng(4)
        size = 400
        scales = torch.from_numpy(np.array([9.0, 4.0, 1.0]) ** 0.5)
        factors = [
            torch.from_numpy(generator.normal(0, 0.02, (8, 3, size))) + torch.eye(3, size) * scales[:, None]
            for _ in range(9)
        ]
        parts = [factor.transpose(1, 2) @ factor + tail * torch.eye(size) for factor in factors]
        problem = Quadratic(parts)
        true = brute_force([one.mean(0).numpy() for one in parts], [8] * 9)["trace"]
        found = []
        for seed in range(20):
            krylov = lanczos(problem.operator.product, size, 20, seed=seed, precision=2.0**-23, with_basis=True)
            found.append(data_errors(problem.operator, krylov).errors["trace"])
        assert true < np.sqrt(np.mean(np.square(found))) < 4 * true


def test_nominal_intervals_over_the_data_cover_the_truth():
    """Images drawn anew each time; 95 % t intervals with one degree of freedom fewer than batches."""
    generator = np.random.default_rng(3)
    size, num_batches, num_runs = 8, 9, 150
    true = quantities(symmetric(generator, 1, size, 0.0)[0].numpy())
    width = stats.t.ppf(0.975, num_batches - 1)
    hits = dict.fromkeys(QUANTITIES, 0)
    for _ in range(num_runs):
        parts = [symmetric(generator, 7, size, 1.0) for _ in range(num_batches)]
        problem = Quadratic(parts)
        found = data_errors(problem.operator, run(problem.operator, size)).errors
        seen = quantities(torch.cat(parts).mean(0).numpy())
        for place, name in enumerate(QUANTITIES):
            hits[name] += abs(seen[place] - true[place]) <= width * found[name]
    assert min(hits.values()) >= 0.9 * num_runs, hits


def test_one_batch_gives_no_error(net):
    parameters, loss, pairs = net
    operator = HessianOperator(parameters, loss, pairs[:1])
    assert np.isnan(list(data_errors(operator, run(operator, 12)).errors.values())).all()


def test_a_run_without_its_basis_is_refused(net):
    parameters, loss, pairs = net
    operator = HessianOperator(parameters, loss, pairs)
    krylov = lanczos(operator.product, operator.size, 5)
    with pytest.raises(ValueError, match="needs the basis of the run, got none"):
        data_errors(operator, krylov)
