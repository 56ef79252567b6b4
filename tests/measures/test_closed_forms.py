"""Closed second derivatives against finite differences and against torch's own, and what they leave to torch."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssat_probe.measures.closed_forms import ClosedForms


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def heads() -> list[Tensor]:
    """Queries, keys and values as a model hands them over: cut from one tensor, heads before tokens."""
    return [random(2, 5, 3, 7, seed=seed).transpose(1, 2) for seed in range(3)]


# name: operation, its tensors, and the node of the graph that shows that the closed form was taken
CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor], str]] = {
    "gelu": (F.gelu, [random(3, 5)], "_Gelu"),
    "norm": (
        lambda x, weight, bias: F.layer_norm(x, (7,), weight, bias, 1e-3),
        [random(2, 5, 7), random(7, seed=1), random(7, seed=2)],
        "_Norm",
    ),
    "linear": (F.linear, [random(2, 5, 7), random(3, 7, seed=1), random(3, seed=2)], "_Linear"),
    "attention": (F.scaled_dot_product_attention, heads(), "_Attention"),
    "scaled attention": (lambda *qkv: F.scaled_dot_product_attention(*qkv, scale=0.3), heads(), "_Attention"),
}

ASKED = [
    (name, asked)
    for name, (_, tensors, _) in CASES.items()
    for num in range(1, len(tensors) + 1)
    for asked in itertools.combinations(range(len(tensors)), num)
]


def closed(operation: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
    with ClosedForms(tensors), sdpa_kernel(SDPBackend.MATH):
        return operation(*tensors)


def plain(operation: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return operation(*tensors)


def nodes(output: Tensor) -> set[str]:
    """Names of the graph's nodes."""
    found, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return {type(node).__name__ for node in found}


def is_closed(output: Tensor) -> bool:
    return any(name.startswith("_") for name in nodes(output))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], list[Tensor], str]:
    return CASES[request.param]


class TestDerivatives:
    def test_the_closed_form_is_taken_and_gives_the_same_value(self, case):
        operation, tensors, node = case
        output = closed(operation, tensors)
        assert f"{node}Backward" in nodes(output)
        torch.testing.assert_close(output, plain(operation, tensors), rtol=1e-13, atol=1e-13)

    def test_second_derivatives_are_those_of_finite_differences(self, case):
        operation, tensors, _ = case
        assert gradgradcheck(lambda *given: closed(operation, list(given)), tensors)

    @pytest.mark.parametrize("num_vectors", [1, 3])
    @pytest.mark.parametrize(("name", "asked"), ASKED)
    def test_products_are_torchs_own_whichever_gradients_are_asked_for(self, name, asked, num_vectors):
        operation, tensors, _ = CASES[name]
        wanted = [tensors[place] for place in asked]
        along = [random(num_vectors, *one.shape, seed=5) for one in wanted]
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        products = []
        for way in (closed, plain):
            loss = (way(operation, tensors) ** 3).sum()
            first = torch.autograd.grad(loss, wanted, create_graph=True)
            if num_vectors == 1:
                products.append(torch.autograd.grad(first, wanted, [one[0] for one in along], **options))
            else:
                products.append(torch.autograd.grad(first, wanted, along, is_grads_batched=True, **options))
        for ours, theirs in zip(*products, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)

    def test_a_kept_graph_gives_the_same_product_again(self, case):
        operation, tensors, _ = case
        first = torch.autograd.grad((closed(operation, tensors) ** 3).sum(), tensors, create_graph=True)
        along = [random(*one.shape, seed=5) for one in tensors]
        one, two = (torch.autograd.grad(first, tensors, along, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    def test_a_third_derivative_is_refused_rather_than_wrong(self, case):
        operation, tensors, _ = case
        first = torch.autograd.grad((closed(operation, tensors) ** 3).sum(), tensors, create_graph=True)
        with pytest.raises(ValueError, match="twice at most, got a third time"):
            torch.autograd.grad(sum(one.square().sum() for one in first), tensors, create_graph=True)

    def test_a_loss_may_take_a_gradient_of_its_own(self, case):
        operation, tensors, _ = case

        def steepness(*given: Tensor) -> Tensor:
            inner = torch.autograd.grad((operation(*given) ** 3).sum(), given, create_graph=True)
            return sum((one.square().sum() for one in inner), start=operation(*given).sum())

        along = [random(*one.shape, seed=5) for one in tensors]
        products = []
        for way in (closed, plain):
            first = torch.autograd.grad(way(steepness, tensors), tensors, create_graph=True)
            products.append(torch.autograd.grad(first, tensors, along))
        for ours, theirs in zip(*products, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


class TestWhatIsLeft:
    @pytest.mark.parametrize(
        "operation",
        [
            lambda x: F.gelu(x, approximate="tanh"),
            lambda x: F.layer_norm(x, (7,)),
            lambda x: F.layer_norm(x, (5, 7), x[0].detach(), x[0].detach()),
            lambda x: F.linear(x, torch.ones(3, 7, dtype=x.dtype)),
            lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
            lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], torch.zeros(5, 5, dtype=x.dtype)),
            lambda x: F.scaled_dot_product_attention(x[None], x[None, :, :3], x[None, :, :3]),
            lambda x: F.gelu(x.bfloat16()),
            lambda x: torch.func.grad(lambda y: F.gelu(y).sum())(x),
        ],
    )
    def test_what_has_no_closed_form_is_torchs(self, operation):
        x = random(2, 5, 7)
        output = closed(operation, [x])
        assert not is_closed(output)
        torch.testing.assert_close(output, plain(operation, [x]))

    def test_linear_maps_of_other_parameters_are_torchs(self):
        operation, tensors, _ = CASES["linear"]
        with ClosedForms(tensors[:2]):
            assert not is_closed(operation(*tensors))

    @pytest.mark.parametrize("context", [torch.no_grad(), torch.autocast("cpu", torch.bfloat16)])
    def test_neither_without_gradients_nor_under_autocast(self, context):
        with ClosedForms([]), context:
            assert not is_closed(F.gelu(random(3, 5)))

    def test_nothing_lasts_beyond_the_context(self):
        with pytest.raises(ZeroDivisionError), ClosedForms([]):
            _ = 1 / 0
        assert not is_closed(F.gelu(random(3, 5)))


@pytest.mark.parametrize("selected", ["", "blocks.1.", "norm", "blocks.0.attn.qkv.weight", "head.bias"])
def test_products_of_a_vit_are_those_of_torch(selected):
    torch.manual_seed(11)
    sizes = {"img_size": 6, "patch_size": 2, "in_chans": 1, "num_classes": 3}
    model = VisionTransformer(**sizes, embed_dim=10, depth=2, num_heads=2, mlp_ratio=3).double()
    images, labels = random(5, 1, 6, 6).detach(), torch.tensor([0, 1, 2, 1, 0])
    wanted = [one for name, one in model.named_parameters() if selected in name]
    along = [random(*one.shape, seed=5) for one in wanted]
    products = []
    for context in (ClosedForms(wanted), nullcontext()):
        with context, sdpa_kernel(SDPBackend.MATH):
            loss = F.cross_entropy(model(images), labels)
        assert is_closed(loss) == isinstance(context, ClosedForms)
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        products.append(torch.cat([one.reshape(-1) for one in torch.autograd.grad(first, wanted, along)]))
    ours, theirs = products
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-12
