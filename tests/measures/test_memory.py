"""Memory of graphs: what is counted, what is predicted, and how a budget is divided."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssat_probe.measures import memory
from ssat_probe.measures.basis import BLOCK_BYTES
from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.memory import Meter, Need, need, room

GIB = 2**30


@dataclass(frozen=True)
class Batch:
    images: Tensor
    labels: Tensor
    name: str = "digits"


class TestMeter:
    def test_counts_what_lives_and_its_peak(self):
        with Meter() as meter:
            kept = torch.ones(1000)
            other = kept + 1
            del other
            view = kept[:10]
            assert meter.now == 4000
        assert meter.peak == 8000
        del kept
        assert meter.now == 4000  # the view holds it
        del view
        assert meter.now == 0

    def test_counts_what_a_graph_holds(self):
        weight = torch.ones(100, requires_grad=True)
        with Meter() as meter:
            loss = weight.exp().exp().sum()
            held = meter.now
            del loss
        assert held >= 2 * 400
        assert meter.now == 0


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(31, 67), nn.GELU(), nn.Linear(67, 53), nn.GELU(), nn.Linear(53, 3)).double()


def parts(num: int) -> tuple[nn.Module, dict, list]:
    net = network()
    images, labels = torch.randn(num, 31).double(), torch.randint(3, (num,))
    return net, dict(net.named_parameters()), [(Batch(images, labels), num)]


def loss_of(net: nn.Module):
    return lambda batch: F.cross_entropy(net(batch.images), batch.labels)


class TestNeed:
    def test_few_images_predict_the_peak_of_many(self):
        net, parameters, batches = parts(200)
        found = need(parameters, loss_of(net), batches, 3_000_000)  # stops at 128 images
        operator = HessianOperator(parameters, loss_of(net), batches)
        vector = torch.ones(operator.size, dtype=torch.float64)
        with Meter() as meter:
            operator.product(vector)
        peak = meter.peak - 3 * vector.nbytes
        assert found.of(200) / memory.MARGIN == pytest.approx(peak, rel=0.1)
        assert found.of(200) >= peak

    def test_one_image_counts_as_its_own(self):
        net, parameters, batches = parts(1)
        found = need(parameters, loss_of(net), batches, 10**9)
        assert found.fixed == 0
        assert found.per_image > 0

    def test_model_is_left_as_found(self):
        net, parameters, batches = parts(3)
        before = [value.clone() for value in parameters.values()]
        need(parameters, loss_of(net), batches, 10**9)
        torch.testing.assert_close(list(parameters.values()), before, rtol=0, atol=0)
        assert all(value.grad is None for value in parameters.values())


class TestRoom:
    needs = Need(fixed=2**20, per_image=20 * 2**20)

    def test_vit_tiny_with_80_steps_lies_on_disk_and_is_cut(self):
        found = room(2 * GIB, 5_350_282, 80, self.needs, 512, 128)
        assert found.home == "disk"
        assert not found.is_cached
        assert 20 < found.micro_batch < 60
        assert found.num_bytes <= 2 * GIB
        more = dataclasses.replace(found, micro_batch=found.micro_batch + 1)
        assert found.num_bytes + self.needs.of(more.micro_batch) - self.needs.of(found.micro_batch) > 2 * GIB

    def test_more_memory_keeps_graphs_and_vectors(self):
        found = room(40 * GIB, 5_350_282, 80, self.needs, 512, 128)
        assert found.micro_batch == 128
        assert found.is_cached
        assert found.home == "device"
        assert found.num_bytes > 512 * self.needs.per_image

    @pytest.mark.parametrize(
        ("own", "gib", "home"),
        [
            (True, 8, "device"),
            (True, 6, "cpu"),
            (True, 4, "cpu"),
            (True, 3, "disk"),
            (False, 8, "device"),
            (False, 6, "disk"),
        ],
    )
    def test_vectors_lie_on_the_device_or_the_cpu_or_on_disk_as_the_budget_says(self, own, gib, home):
        found = room(gib * GIB, 5_350_282, 80, self.needs, 512, 128, has_own_memory=own)  # 3.19 GiB of vectors
        assert found.home == home
        assert found.num_bytes <= gib * GIB

    def test_vectors_on_the_cpu_keep_the_budget_there_too(self):
        size, num = 5_350_282, 20
        found = room(int(1.5 * GIB), size, num, Need(0, 2**10), 512, 128, has_own_memory=True)
        assert found.home == "cpu"
        assert 1 <= found.max_chunk <= 1.5 * GIB / (8 * size * num)
        bound = room(100 * GIB, size, num, Need(0, 2**10), 512, 128, has_own_memory=True)
        assert bound.home == "device"
        assert bound.num_bytes + (bound.max_chunk - 1) * 8 * size * num <= 100 * GIB

    @pytest.mark.parametrize("gib", [1.0, 1.5, 3.0, 7.0, 20.0])
    def test_budget_is_kept(self, gib):
        found = room(int(gib * GIB), 3_000_017, 97, self.needs, 211, 64)
        assert found.num_bytes <= gib * GIB
        assert 1 <= found.micro_batch <= 64

    def test_dense_matrices_leave_less_for_images(self):
        plain, beside = (room(3 * GIB, 50_021, 0, self.needs, 512, 128, taken=taken) for taken in (0, GIB))
        assert beside.micro_batch < plain.micro_batch
        assert GIB < beside.num_bytes <= 3 * GIB

    def test_too_little_is_refused_with_what_would_fit(self):
        least = (8 * memory.VECTORS * 5_000_011 + BLOCK_BYTES + 8 * 5_000_011 + self.needs.of(1)) / GIB
        with pytest.raises(
            ValueError, match=rf"at least {least:.3g} GiB .* of 5000011 parameters .*, got 0\.5\. Raise"
        ):
            room(GIB // 2, 5_000_011, 80, self.needs, 512, 128)
        assert room(int(least * GIB) + 1, 5_000_011, 80, self.needs, 512, 128).micro_batch == 1
        with pytest.raises(
            ValueError, match=r"one image at a time, 2 of it for dense .* \(--jackknife=false\), got 1\."
        ):
            room(GIB, 5_000_011, 80, self.needs, 512, 128, taken=2 * GIB)
