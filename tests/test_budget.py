"""Costs against closed forms and the paper's numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssat_probe import budget, objectives, registry
from ssat_probe.budget import budget_of, steps_per_epoch
from ssat_probe.network import build_encoder

Make = Callable[..., tuple]


def full_pass(tokens: int, values: int, dim: int, depth: int, mlp_ratio: int, classes: int) -> int:
    """Multiply-adds by hand: patches, then per block qkv, scores, values, projection, MLP; then the head."""
    return tokens * values * dim + blocks(1 + tokens, dim, depth, mlp_ratio) + dim * classes


def blocks(tokens: int, dim: int, depth: int, mlp_ratio: int) -> int:
    return depth * (tokens * dim * dim * (3 + 1 + 2 * mlp_ratio) + 2 * tokens * tokens * dim)


def masked_pass(tokens: int, visible: int, values: int, dim: int, depth: int, mlp_ratio: int) -> int:
    """Every patch is embedded; only the visible ones and the class token pass the blocks."""
    return tokens * values * dim + blocks(1 + visible, dim, depth, mlp_ratio)


def decoding(tokens: int, visible: int, values: int, dim: int, width: int, depth: int) -> int:
    """The visible tokens and the class token are embedded; all pass the blocks but the last, which makes the hidden."""
    hidden, all_of_last = tokens - visible, blocks(1 + tokens, width, 1, 4)
    last = (1 + tokens) * 3 * width**2 + hidden * (1 + 2 * 4) * width**2 + 2 * hidden * (1 + tokens) * width
    return (1 + visible) * dim * width + (depth - 1) * all_of_last + last + hidden * width * values


def test_multiply_adds_of_vit_tiny_at_224_are_the_closed_form_and_the_papers(make_recipe: Make) -> None:
    full = full_pass(196, 768, 192, 12, 4, 10)
    masked, decoder = masked_pass(196, 49, 768, 192, 12, 4), decoding(196, 49, 768, 192, 128, 2)
    embedding = 196 * 768 * 192  # which ssat makes once for both passes
    assert [round(count / 1e9, 3) for count in (full, masked, decoder, embedding)] == [1.253, 0.306, 0.103, 0.029]
    costs = {}
    for method in ("scratch", "ssl_ft", "ssat"):
        recipe, facts = make_recipe((224, 224), 3, 10, model="vit_tiny", method=method)
        costs[method] = [stage.multiply_adds_per_image for stage in budget_of(recipe, facts, 1000).stages]
    assert costs == {
        "scratch": [full],
        "ssl_ft": [masked + decoder, full],
        "ssat": [full + masked + decoder - embedding],
    }
    whole = (1 + 49) * 192 * 128 + blocks(197, 128, 2, 4) + 197 * 128 * 768  # of which we leave the visible patches out
    assert (full + masked + whole) / full == pytest.approx(1.34, abs=0.005)
    assert costs["ssat"][0] / full == pytest.approx(1.303, abs=0.001)


@pytest.mark.parametrize(
    ("model", "patch", "dim", "depth", "giga", "millions"),
    [
        ("vit_base", 16, 768, 12, 17.6, 86),
        ("vit_large", 16, 1024, 24, 61.6, 303),
        ("vit_huge", 14, 1280, 32, 167.3, 630),
    ],
)
def test_the_large_models_are_counted_without_making_them(
    make_recipe: Make, model: str, patch: int, dim: int, depth: int, giga: float, millions: int
) -> None:
    recipe, facts = make_recipe((224, 224), 3, 10, model=model, patch_size=patch, method="scratch")
    budget = budget_of(recipe, facts, 100)
    expected = full_pass((224 // patch) ** 2, 3 * patch**2, dim, depth, 4, 10)
    assert budget.stages[0].multiply_adds_per_image == expected
    assert round(expected / 1e9, 1) == giga
    # By hand: patches, class token, per block qkv, projection, MLP and two norms, the last norm, the head.
    block = 4 * dim * dim + 4 * dim + 8 * dim * dim + 5 * dim + 4 * dim
    parameters = (3 * patch**2 + 1) * dim + dim + depth * block + 2 * dim + 10 * (dim + 1)
    assert budget.encoder_parameters == parameters
    assert round(parameters / 1e6) == millions


@pytest.mark.parametrize(
    ("img_size", "patch_size", "channels", "tokens", "values", "visible"),
    [((8, 8), (2, 2), 1, 16, 4, 4), ((12, 20), (3, 5), 3, 16, 45, 4), ((28, 28), (4, 4), 1, 49, 16, 12)],
)
def test_multiply_adds_at_any_size(
    make_recipe: Make,
    img_size: tuple[int, int],
    patch_size: tuple[int, int],
    channels: int,
    tokens: int,
    values: int,
    visible: int,
) -> None:
    recipe, facts = make_recipe(img_size, channels, 7, method="ssl_ft", patch_size=patch_size)
    pretrain, finetune = budget_of(recipe, facts, 100).stages
    expected = masked_pass(tokens, visible, values, 32, 6, 2) + decoding(tokens, visible, values, 32, 16, 2)
    assert pretrain.multiply_adds_per_image == expected
    assert finetune.multiply_adds_per_image == full_pass(tokens, values, 32, 6, 2, 7)


@pytest.mark.parametrize(("model", "dim"), [("vit_nano", 32), ("vit_tiny", 192)])
def test_under_the_matched_budget_ssl_ft_costs_what_ssat_costs_and_its_second_embedding(
    make_recipe: Make, model: str, dim: int
) -> None:
    ssat, ssl_ft, scratch = (
        budget_of(*make_recipe((32, 32), 3, method=method, model=model, epochs=13), 1009)
        for method in ("ssat", "ssl_ft", "scratch")
    )
    embedding = 64 * 48 * dim  # of an image, which ssat makes once for both passes
    assert ssl_ft.multiply_adds == ssat.multiply_adds + ssat.images * embedding
    assert ssat.multiply_adds > scratch.multiply_adds
    assert ssl_ft.images == 2 * ssat.images == 2 * scratch.images
    assert ssl_ft.steps == 2 * ssat.steps


def test_equal_epochs_cost_less(make_recipe: Make) -> None:
    budget = budget_of(*make_recipe(method="ssl_ft", epochs=13, budget="equal_epochs"), 1009)
    assert [stage.epochs for stage in budget.stages] == [6, 7]
    assert budget.images == budget_of(*make_recipe(method="scratch", epochs=13), 1009).images


@pytest.mark.parametrize(
    ("fields", "has_decoder"),
    [
        ({"method": "scratch"}, False),
        ({"method": "ssat", "lambda_weight": 1.0}, False),
        ({"method": "ssat", "lambda_weight": 0.0}, True),
        ({"method": "ssat"}, True),
        ({"method": "ssl_ft"}, True),
    ],
)
def test_a_decoder_is_counted_where_there_is_one(make_recipe: Make, fields: dict, *, has_decoder: bool) -> None:
    recipe, facts = make_recipe((224, 224), 3, 10, model="vit_tiny", **fields)
    budget = budget_of(recipe, facts, 100)
    assert budget.encoder_parameters == 5_488_522
    assert budget.decoder_parameters == (520_704 if has_decoder else 0)


def test_a_term_of_weight_zero_costs_nothing(make_recipe: Make) -> None:
    def cost(**fields: object) -> list[int]:
        return [stage.multiply_adds_per_image for stage in budget_of(*make_recipe(**fields), 100).stages]

    pretrain, finetune = cost(method="ssl_ft")
    assert cost(method="ssat", lambda_weight=0.0) == [pretrain]
    assert cost(method="ssat", lambda_weight=1.0) == [finetune] == cost(method="scratch")


@pytest.mark.parametrize(
    ("num_images", "batch_size", "steps"), [(128, 64, 2), (127, 64, 1), (63, 64, 1), (1, 64, 1), (1009, 7, 144)]
)
def test_whole_batches_make_an_epoch_and_a_small_set_makes_one(num_images: int, batch_size: int, steps: int) -> None:
    assert steps_per_epoch(num_images, batch_size) == steps


def test_images_and_steps_over_the_stages(make_recipe: Make) -> None:
    budget = budget_of(*make_recipe(method="ssl_ft", epochs=3, pretrain_epochs=5, batch_size=64), 150)
    assert [(stage.name, stage.steps, stage.images) for stage in budget.stages] == [
        ("pretrain", 10, 640),
        ("finetune", 6, 384),
    ]
    assert (budget.steps, budget.images) == (16, 1024)
    small = budget_of(*make_recipe(method="scratch", epochs=3, batch_size=64), 37)
    assert (small.steps, small.images) == (3, 111)


def test_the_backward_pass_costs_twice_the_forward_one_but_for_the_gradient_of_the_pixels(make_recipe: Make) -> None:
    recipe, facts = make_recipe((32, 32), 3, 10, model="vit_tiny", method="scratch", patch_size=4)
    (stage,) = budget_of(recipe, facts, 100).stages
    assert stage.training_multiply_adds_per_image == 3 * stage.multiply_adds_per_image - 64 * 48 * 192


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_convolution_costs_as_much_for_each_of_its_gradients_as_forward(groups: int, *, is_transposed: bool) -> None:
    kind = torch.nn.ConvTranspose2d if is_transposed else torch.nn.Conv2d
    layer = kind(6, 12, 3, stride=2, padding=1, groups=groups, bias=False)
    images = torch.rand(2, 6, 8, 10, requires_grad=True)
    mapping = {torch.ops.aten.convolution_backward: budget._of_both_gradients}
    costs = []
    for needs_gradient in (True, False):
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            out = layer(images.requires_grad_(needs_gradient) if needs_gradient else images.detach())
            forward = counter.get_total_flops()
            out.sum().backward()
        costs.append((counter.get_total_flops() - forward) / forward)
    places = 8 * 10 if is_transposed else out.shape[2] * out.shape[3]
    assert forward == 2 * 2 * places * 9 * 6 * 12 // groups  # 2 images, a multiplication and an addition
    assert costs == [2, 1]


@pytest.mark.parametrize(
    "fields", [{"method": "scratch"}, {"method": "ssat"}, {"method": "ssat", "masked_convolutions": True}]
)
def test_training_cvt_costs_three_times_its_forward_pass_at_most(make_recipe: Make, fields: dict[str, Any]) -> None:
    (stage,) = budget_of(*make_recipe((32, 32), 3, 10, model="cvt_nano", **fields), 100).stages
    assert 2.8 < stage.training_multiply_adds_per_image / stage.multiply_adds_per_image <= 3


@pytest.mark.parametrize("method", ["scratch", "ssl_ft", "ssat"])
def test_the_cost_of_a_step_is_what_torch_counts_in_a_real_one(make_recipe: Make, method: str) -> None:
    recipe, facts = make_recipe((8, 8), 1, 10, method=method, batch_size=7)
    encoder = build_encoder(recipe, facts)
    behind = objectives.behind_encoder(recipe, facts, encoder)
    for stage in budget_of(recipe, facts, 100).stages:
        encoder.zero_grad()
        name = objectives.name_of(recipe, stage.name)
        objective = registry.load("objectives", name).Objective(recipe, encoder, behind)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            objective(torch.rand(7, 1, 8, 8), torch.zeros(7, dtype=torch.long), torch.rand(7, 16)).total.backward()
        assert counter.get_total_flops() == 2 * 7 * stage.training_multiply_adds_per_image
        assert stage.training_multiply_adds == stage.images * stage.training_multiply_adds_per_image
