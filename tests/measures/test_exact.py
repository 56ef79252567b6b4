"""Exact spectrum against closed forms and torch's own; costs told before, refusals that say what fits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssat_probe.measures import exact
from ssat_probe.measures.dense import dense
from ssat_probe.measures.exact import CHUNKS, assembled, cost, exact_spectrum
from ssat_probe.measures.hessian import HessianOperator


def quadratic(matrix: torch.Tensor, **names: slice) -> HessianOperator:
    """Operator of ½ θᵀAθ, whose Hessian is A; the parameters are pieces of θ."""
    names = names or {"theta": slice(None)}
    theta = torch.zeros(len(matrix), dtype=matrix.dtype)
    pieces = {name.replace("__", "."): torch.nn.Parameter(theta[place].clone()) for name, place in names.items()}

    def loss(_: None) -> torch.Tensor:
        whole = torch.cat(list(pieces.values()))
        return whole @ matrix @ whole / 2

    return HessianOperator(pieces, loss, [(None, 3)])


def symmetric(size: int, seed: int = 0) -> torch.Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return matrix + matrix.T


def test_all_eigenvalues_of_a_known_matrix():
    matrix = symmetric(131)
    told: list[int] = []
    found = exact_spectrum(quadratic(matrix), on_step=told.append)
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(matrix.numpy()), atol=1e-12)
    assert found.asymmetry < 1e-14
    assert found.disagreement < 1e-14
    assert told[-1] == 131
    assert found.cost.num_parameters == 131
    assert found.cost.seconds > 0


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    torch.manual_seed(5)
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 6, "depth": 2}
    return VisionTransformer(**sizes, num_heads=2, mlp_ratio=2).double().eval()


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    return torch.randn(11, 1, 8, 8, dtype=torch.float64), torch.randint(3, (11,))


def operator_of(vit: nn.Module, images: tuple[Tensor, Tensor], reduction: str = "mean", **options) -> HessianOperator:
    """Over batches of 4, 4 and 3."""
    pairs = [((x, y), len(x)) for x, y in zip(images[0].split(4), images[1].split(4), strict=True)]

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(vit(batch[0]), batch[1], reduction=reduction)

    parameters = options.pop("parameters", dict(vit.named_parameters()))
    return HessianOperator(parameters, loss, pairs, reduction=reduction, **options)


@pytest.fixture(scope="module")
def true(vit, images) -> Tensor:
    """Whole Hessian by torch's own double backward, over all images at once."""
    parameters = dict(vit.named_parameters())

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([one.numel() for one in parameters.values()])
        named = {name: part.view_as(parameters[name]) for name, part in zip(parameters, parts, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            return F.cross_entropy(functional_call(vit, named, (images[0],)), images[1])

    start = torch.cat([one.detach().reshape(-1) for one in parameters.values()])
    return torch.autograd.functional.hessian(loss, start)


class TestAssembled:
    @pytest.mark.parametrize("chunk", [1, 7, 64])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_of_a_vit_is_torchs_own(self, vit, images, true, chunk, reduction):
        operator = operator_of(vit, images, reduction)
        found = assembled(operator, chunk)
        assert float((found.matrix - true).norm() / true.norm()) < 1e-13
        assert torch.equal(found.matrix, found.matrix.T)
        assert found.asymmetry < 1e-13
        assert found.disagreement < 1e-13
        assert operator.num_products == operator.size + 1
        assert operator.num_images == 11 * operator.num_products

    def test_of_some_coordinates_is_the_part_of_the_whole(self, vit, images, true):
        places = torch.arange(0, len(true), 3)
        places = places[(places < 50) | (places > 180)]  # several parameters have none
        found = assembled(operator_of(vit, images, coordinates=places), 5)
        assert float((found.matrix - true[places][:, places]).norm() / true.norm()) < 1e-13

    def test_order_of_the_parameters_changes_nothing(self, vit, images):
        backwards = dict(reversed(dict(vit.named_parameters()).items()))
        operator = operator_of(vit, images, parameters=backwards)
        torch.testing.assert_close(assembled(operator).matrix, dense(operator), rtol=0, atol=1e-13)

    def test_frozen_and_unused_parameters_are_zero_blocks(self, vit, images):
        unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
        operator = operator_of(vit, images, parameters={"unused": unused, **dict(vit.named_parameters())})
        vit.cls_token.requires_grad_(False)
        try:
            found = assembled(operator).matrix
            torch.testing.assert_close(found, dense(operator), rtol=0, atol=1e-13)
        finally:
            vit.cls_token.requires_grad_(True)
        assert found[: 3 + vit.cls_token.numel()].eq(0).all()
        assert found.abs().max() > 0.1

    def test_late_rows_leave_early_layers_alone(self, vit, images):
        visited = []
        handle = vit.blocks[0].norm1.weight.register_hook(lambda _: visited.append("early"))
        try:
            operator = operator_of(vit, images)
            with torch.enable_grad():
                gradients, _, _ = next(operator.graphs())
                visited.clear()
                names = list(operator.parameters)
                operator.rows(gradients, names.index("blocks.1.mlp.fc1.weight"), torch.arange(2))
                assert not visited
                operator.rows(gradients, names.index("blocks.0.norm1.weight"), torch.arange(2))
                assert visited
        finally:
            handle.remove()

    def test_progress_counts_rows_of_every_batch(self, vit, images):
        told: list[int] = []
        operator = operator_of(vit, images)
        assembled(operator, 64, told.append)
        assert told[-1] == 3 * operator.size
        assert told == sorted(told)


def test_rows_that_are_not_those_of_the_products_are_refused(monkeypatch):
    product = HessianOperator.product
    monkeypatch.setattr(HessianOperator, "product", lambda self, vector: product(self, vector) * 1.25)
    with pytest.raises(ValueError, match=r"must agree with its products to 1e-10, got 0\.2:"):
        exact_spectrum(quadratic(symmetric(13)))


class TestCost:
    def test_counts_bytes_and_grows_with_the_size(self):
        (small, _), (large, chunk) = cost(quadratic(symmetric(61))), cost(quadratic(symmetric(601)))
        assert large.num_bytes == 16 * 601**2
        assert large.num_parameters == 601
        assert 0 < small.seconds < large.seconds
        assert chunk in CHUNKS

    def test_memory_limits_the_rows_of_a_pass(self):
        assert cost(quadratic(symmetric(61)), max_chunk=3)[1] == 1

    def test_rows_are_foretold_from_some_that_are_timed(self, monkeypatch):
        """On a clock that each row moves on by a known time: less the later its parameter, and 16 at once are best."""
        size = 400
        operator = quadratic(symmetric(size), **{f"p{i}": slice(20 * i, 20 * i + 20) for i in range(20)})
        clock, rows = [0.0], HessianOperator.rows
        per_row = {1: 2.0, 4: 1.5, 16: 1.0, 64: 1.2}

        def slow(self, gradients, tensor, entries):
            clock[0] += (20 - tensor) * per_row.get(len(entries), 1.0) * len(entries)
            return rows(self, gradients, tensor, entries)

        monkeypatch.setattr(HessianOperator, "rows", slow)
        monkeypatch.setattr(exact.time, "perf_counter", lambda: clock[0])
        found, chunk = cost(operator)
        assert chunk == 16
        assert found.row_seconds == pytest.approx(sum(20 * (20 - i) for i in range(20)), rel=0.03)


def test_refusal_for_memory_names_parts_that_fit():
    one = quadratic(symmetric(47), body__a=slice(0, 30), head__w=slice(30, 42), head__b=slice(42, 47))
    with pytest.raises(
        ValueError, match=r"got 47 parameters that need .* At most 25 parameters fit.*'head\.\*' \(17\)"
    ):
        exact_spectrum(one, max_bytes=16 * 25**2)
    assert one.num_products == 0


def test_refusal_for_time_names_how_many_fit():
    with pytest.raises(ValueError, match=r"must take at most 1e-09 s, got an estimate of .* for 47 parameters"):
        exact_spectrum(quadratic(symmetric(47)), max_seconds=1e-9)


def test_float32_is_refused():
    with pytest.raises(ValueError, match=r"needs a model in float64, got a machine epsilon of 1\.2e-07"):
        exact_spectrum(quadratic(symmetric(7).float()))
