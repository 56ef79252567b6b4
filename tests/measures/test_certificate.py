"""The certificate lets right operators pass and names what is wrong with the others."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssat_probe.measures.certificate import DOUBLE, SINGLE, certify
from ssat_probe.measures.hessian import HessianOperator

NUM_IMAGES = 13


def vit(dtype: torch.dtype = torch.float64, **options: float) -> VisionTransformer:
    torch.manual_seed(7)
    sizes = {"img_size": 4, "patch_size": 2, "in_chans": 1, "num_classes": 3, "embed_dim": 10, "depth": 2}
    model = VisionTransformer(**sizes, num_heads=2, mlp_ratio=2, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


def batches(dtype: torch.dtype = torch.float64, size: int = 5) -> list:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(NUM_IMAGES, 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 3, (NUM_IMAGES,), generator=generator)
    return [(pair, len(pair[0])) for pair in zip(pixels.split(size), labels.split(size), strict=True)]


def operator_of(model: nn.Module, images: list, kind: type[HessianOperator] = HessianOperator) -> HessianOperator:
    return kind(dict(model.named_parameters()), lambda b: F.cross_entropy(model(b[0]), b[1]), images)


class TestPasses:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_vit_passes_with_a_wide_margin(self, dtype):
        model = vit(dtype)
        operator = operator_of(model, batches(dtype))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        random_state = torch.get_rng_state()
        certificate = certify(operator)
        names = ["determinism", "reduction", "symmetry", "finite difference"]
        assert [check.name for check in certificate.checks] == names
        allowed = DOUBLE if dtype == torch.float64 else SINGLE
        assert [check.allowed for check in certificate.checks] == [
            allowed.determinism,
            allowed.determinism,
            allowed.symmetry,
            allowed.finite_difference,
        ]
        assert all(check.measured < check.allowed / 3 for check in certificate.checks)
        eps = torch.finfo(dtype).eps
        assert 0 < certificate.noise < 1000 * eps
        torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_noise_floor_is_the_error_of_float32_products_within_a_factor_of_ten(self):
        double, single = operator_of(vit(), batches()), operator_of(vit(torch.float32), batches(torch.float32))
        vector = torch.randn(double.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for _ in range(10):  # towards the large curvature, where errors are largest
            vector = double.product(vector / vector.norm())
        vector = vector / vector.norm()
        error = float((double.product(vector) - single.product(vector)).norm())
        assert 0.1 < error / certify(single).noise < 10

    def test_zero_hessian_passes(self):
        weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
        data = torch.randn(3, 5, dtype=torch.float64)
        certificate = certify(HessianOperator({"weight": weight}, lambda batch: (batch @ weight).mean(), [(data, 3)]))
        assert all(check.measured <= check.allowed for check in certificate.checks)

    def test_graph_kept_before_is_not_used_afterwards(self):
        operator = operator_of(vit(), batches(size=NUM_IMAGES))
        with operator:
            operator.product(torch.ones(operator.size, dtype=torch.float64))
            certify(operator)
            assert not operator._kept


class TestImagesAlone:
    """Losses in which the images of a batch do not count by themselves."""

    def net(self) -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()

    def test_batch_norm_in_training_mode_is_named_and_left_alone(self):
        model = self.net()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"got BatchNorm1d in training mode, .* Call model\.eval\(\)"):
            certify(operator_of(model, batches()))
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert model.training
        model(batches()[0][0][0])  # nobody watches any more

    def test_batch_norm_in_eval_mode_passes(self):
        assert certify(operator_of(self.net().eval(), batches())).checks[1].measured < 1e-14

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_loss_that_compares_images_is_refused(self, dtype):
        model = vit(dtype)

        def contrast(batch):
            logits = model(batch[0])
            return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)))

        with pytest.raises(
            ValueError, match=r"check of reduction, got .* is allowed: .* not the mean .* compare images"
        ):
            certify(HessianOperator(dict(model.named_parameters()), contrast, batches(dtype)))

    @pytest.mark.parametrize("declared", ["mean", "sum"])
    def test_wrongly_declared_reduction_is_refused(self, declared):
        model, other = vit(), {"mean": "sum", "sum": "mean"}[declared]
        operator = HessianOperator(
            dict(model.named_parameters()),
            lambda b: F.cross_entropy(model(b[0]), b[1], reduction=other),
            batches(),
            reduction=declared,
        )
        with pytest.raises(ValueError, match="check of reduction"):
            certify(operator)

    def test_batches_that_cannot_be_cut_go_without_this_check(self):
        weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
        found = certify(HessianOperator({"weight": weight}, lambda _: (weight**4).sum(), [(None, 7)]))
        assert [check.name for check in found.checks if math.isnan(check.measured)] == ["reduction"]
        assert len(found.checks) == 4


class TestNoise:
    def test_order_of_the_images_is_part_of_it_and_comes_back(self):
        seen = []

        class Ordered:
            def __iter__(self):
                seen.append(1)
                return iter(batches(torch.float32))

        source = Ordered()
        operator = operator_of(vit(torch.float32), source)
        vector = torch.ones(operator.size, dtype=torch.float64)
        before = operator.product(vector)
        certify(operator)
        assert operator.batches is source
        assert torch.equal(operator.product(vector), before)

        labels: list[list[int]] = []
        model = vit()

        def loss(batch):
            labels.append(batch[1].tolist())
            return F.cross_entropy(model(batch[0]), batch[1])

        certify(HessianOperator(dict(model.named_parameters()), loss, batches()))
        forward = [batch[1].tolist() for batch, _ in batches()]
        assert labels[-3:] == [one[::-1] for one in forward[::-1]]


class TestDeterminism:
    def test_dropout_is_named(self):
        model = vit(proj_drop_rate=0.1).train()
        with pytest.raises(
            ValueError, match=r"check of determinism, got .* 1e-10 is allowed: .* dropout .* model.eval"
        ):
            certify(operator_of(model, batches()))

    def test_dropout_is_found_also_in_one_batch_whose_graph_is_kept(self):
        with (
            operator_of(vit(proj_drop_rate=0.1).train(), batches(size=13)) as operator,
            pytest.raises(ValueError, match="dropout"),
        ):
            certify(operator)

    def test_masks_from_an_own_generator_are_named(self):
        model, generator = vit(), torch.Generator().manual_seed(0)

        def loss(batch):
            mask = torch.rand(len(batch[1]), generator=generator, dtype=torch.float64)
            return (mask * F.cross_entropy(model(batch[0]), batch[1], reduction="none")).mean()

        with pytest.raises(ValueError, match=r"determinism.* freeze random masks and augmentation"):
            certify(HessianOperator(dict(model.named_parameters()), loss, batches()))

    @pytest.mark.parametrize("source", [random, torch])
    def test_shuffled_batches_are_named(self, source):
        class Shuffled:
            def __iter__(self):
                found = batches(size=1)
                order = torch.randperm(13).tolist() if source is torch else random.sample(range(13), 13)
                return iter([found[i] for i in order])

        with pytest.raises(
            ValueError, match=r"determinism.* the mean is the same but the batches are not; switch shuff"
        ):
            certify(operator_of(vit(), Shuffled()))

    def test_other_number_of_images_is_named(self):
        class Growing:
            reads = 1

            def __iter__(self):
                self.reads += 1
                return iter(batches()[: self.reads // 2])

        with pytest.raises(ValueError, match=r"determinism.* number of images went from 5 to 10"):
            certify(operator_of(vit(), Growing()))


class ThroughJvp(HessianOperator):
    """Products by a recipe that torch gets wrong through layer normalisation."""

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        names, values = list(self.parameters), list(self.parameters.values())

        def loss(flat: torch.Tensor) -> torch.Tensor:
            parts = flat.to(values[0].dtype).split([value.numel() for value in values])
            named = {n: part.view_as(value) for n, part, value in zip(names, parts, values, strict=True)}
            losses = [
                F.cross_entropy(functional_call(self.model, named, (b[0],)), b[1]) * num for b, num in self.batches
            ]
            return sum(losses) / NUM_IMAGES

        place = torch.cat([value.detach().reshape(-1) for value in values])
        with sdpa_kernel(SDPBackend.MATH):
            return torch.stack([self.recipe(loss, place, vector.to(place.dtype)).double() for vector in vectors])


class ForwardOverJacobian(ThroughJvp):
    recipe = staticmethod(lambda f, x, v: torch.func.jvp(torch.func.jacrev(f), (x,), (v,))[1])


class ReverseOverForward(ThroughJvp):
    recipe = staticmethod(lambda f, x, v: torch.func.grad(lambda y: torch.func.jvp(f, (y,), (v,))[1])(x))


class WrongBackward(torch.autograd.Function):
    """Square of x, with a right first derivative whose own derivative is unsymmetric."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x**2).sum()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (2 * x + 0.01 * (x.roll(1) - x.roll(1).detach()))


class TestKinks:
    """Of ReLU: the Hessian is that between them; a step that crosses one says nothing about it."""

    def operator(self, dtype: torch.dtype) -> HessianOperator:
        torch.manual_seed(1)
        layers = nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 3)
        model = nn.Sequential(*layers).double()
        images, labels = torch.randn(300, 1, 8, 8).double(), torch.randint(3, (300,))
        return operator_of(model.to(dtype), [((images.to(dtype), labels), 300)])

    def test_float64_steps_between_them(self):
        assert certify(self.operator(torch.float64)).checks[-1].measured < 1e-8

    def test_float32_cannot_and_says_what_can(self):
        with pytest.raises(ValueError, match=r"check of finite difference, .*kinks of ReLU, take --dtype float64"):
            certify(self.operator(torch.float32))

    def test_the_nearest_may_be_some_1e_7_away_and_a_kink_itself_is_refused(self):
        weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        for distance, is_fine in ((2e-7, True), (0.0, False)):
            operator = HessianOperator(
                {"weight": weight}, lambda at: weight.square().sum() + F.relu(weight - at).sum(), [(distance, 1)]
            )
            if is_fine:
                assert certify(operator).checks[-1].measured < 1e-8
            else:
                with pytest.raises(ValueError, match=r"loss that is not smooth \(weights on a kink of ReLU\)"):
                    certify(operator)


class TestWrongProducts:
    @pytest.mark.xfail(not torch.__version__.startswith("2.14."), reason="torch may be right by now", strict=False)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("kind", [ForwardOverJacobian, ReverseOverForward])
    def test_recipes_that_are_wrong_through_layer_norm_are_caught(self, kind, dtype):
        model = vit(dtype)
        operator = operator_of(model, batches(dtype), kind)
        operator.model = model
        with pytest.raises(ValueError, match=r"check of (symmetry|finite difference), got"):
            certify(operator)

    def test_unsymmetric_second_derivative_fails_symmetry(self):
        weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
        with pytest.raises(ValueError, match=r"check of symmetry, got .* 1e-10 is allowed: u·Hv differs"):
            certify(HessianOperator({"weight": weight}, lambda batch: WrongBackward.apply(weight), [(None, 1)]))

    def test_detached_tensor_fails_the_finite_difference(self):
        weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
        with pytest.raises(ValueError, match=r"check of finite difference, got .* 1e-06 is allowed: .* detached"):
            certify(HessianOperator({"weight": weight}, lambda batch: weight @ weight.detach() ** 3, [(None, 1)]))
        assert weight.grad is None

    def test_own_operation_whose_second_derivative_is_silently_zero_fails_the_finite_difference(self):
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x**2

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, gradient):
                return 2 * ctx.saved_tensors[0] * gradient

        weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
        operator = HessianOperator({"weight": weight}, lambda _: Square.apply(weight).sum(), [(None, 1)])
        assert operator.product(torch.ones(5, dtype=torch.float64)).eq(0).all()  # torch says nothing
        with pytest.raises(ValueError, match=r"check of finite difference, got .* is not the derivative"):
            certify(operator)

    def test_parameters_are_restored_when_the_loss_fails_on_the_way(self):
        weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
        before = weight.detach().clone()

        def loss(batch):
            if not torch.equal(weight.detach(), before):
                raise RuntimeError("moved")
            return (weight**3).sum()

        with pytest.raises(RuntimeError, match="moved"):
            certify(HessianOperator({"weight": weight}, loss, [(None, 1)]))
        assert torch.equal(weight.detach(), before)

    def test_coarse_arithmetic_is_refused(self):
        weight = torch.ones(5, dtype=torch.bfloat16, requires_grad=True)
        with pytest.raises(ValueError, match=r"float32 or float64, got a machine epsilon of 0.0078"):
            certify(HessianOperator({"weight": weight}, lambda batch: (weight**2).sum(), [(None, 1)]))
