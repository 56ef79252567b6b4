import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ssat_probe import registry
from ssat_probe.losses import Losses
from ssat_probe.network import build_decoder, build_encoder
from ssat_probe.objectives import behind_encoder, reconstruction, ssat, supervised
from ssat_probe.patches import random_mask

Make = Callable[..., tuple]
BATCH = 5


@pytest.fixture
def batch(generator: Callable[[str], torch.Generator]) -> tuple[torch.Tensor, ...]:
    """Images, labels, noise."""
    images = torch.randn(BATCH, 1, 8, 8, generator=generator("images"), dtype=torch.float64)
    return images, torch.tensor([3, 1, 4, 1, 5]), torch.rand(BATCH, 16, generator=generator("noise"))


def parts(make_recipe: Make, lambda_weight: float) -> tuple:
    recipe, facts = make_recipe(lambda_weight=lambda_weight)
    return recipe, build_encoder(recipe, facts).double(), build_decoder(recipe, facts).double()


def gradients(module: nn.Module, losses: Losses) -> dict[str, torch.Tensor]:
    """By the name the parameter has in the encoder or decoder."""
    module.zero_grad()
    losses.total.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_lambda_one_is_supervised_with_no_decoder_in_the_graph(make_recipe: Make, batch: tuple) -> None:
    recipe, encoder, decoder = parts(make_recipe, 1.0)
    objective = ssat.Objective(recipe, encoder, decoder)
    got, expected = objective(*batch), supervised.Objective(recipe, encoder)(*batch)
    assert torch.equal(got.total, expected.total)
    assert got.reconstruction is None
    assert {id(p) for p in objective.parameters()} == {id(p) for p in encoder.parameters()}
    first, second = gradients(encoder, got), gradients(encoder, expected)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(p.grad is None for p in decoder.parameters())
    assert ssat.Objective(recipe, encoder, None)(*batch).total == expected.total


def test_lambda_zero_is_reconstruction_alone(make_recipe: Make, batch: tuple) -> None:
    recipe, encoder, decoder = parts(make_recipe, 0.0)
    got = ssat.Objective(recipe, encoder, decoder)(*batch)
    expected = reconstruction.Objective(recipe, encoder, decoder)(*batch)
    assert torch.equal(got.total, expected.total)
    assert got.cross_entropy is None
    assert got.logits is None
    first, second = gradients(encoder, got), gradients(encoder, expected)
    assert first.keys() == second.keys()
    assert "head.weight" not in first
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("lambda_weight", [0.1, 0.5, 0.73])
def test_total_and_gradient_are_the_convex_combination(make_recipe: Make, batch: tuple, lambda_weight: float) -> None:
    recipe, encoder, decoder = parts(make_recipe, lambda_weight)
    both = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    full, masked = supervised.Objective(recipe, encoder), reconstruction.Objective(recipe, encoder, decoder)
    losses = [objective(*batch) for objective in (full, masked, ssat.Objective(recipe, encoder, decoder))]
    expected = lambda_weight * losses[0].total + (1 - lambda_weight) * losses[1].total
    torch.testing.assert_close(losses[2].total, expected, rtol=1e-14, atol=0)
    first, second, total = (gradients(both, one) for one in losses)
    assert total.keys() == first.keys() | second.keys()
    for name, value in total.items():
        zero = torch.zeros_like(value)
        mixed = lambda_weight * first.get(name, zero) + (1 - lambda_weight) * second.get(name, zero)
        torch.testing.assert_close(value, mixed, rtol=1e-9, atol=1e-14)


def test_the_terms_are_returned_unweighted(make_recipe: Make, batch: tuple) -> None:
    recipe, encoder, decoder = parts(make_recipe, 0.1)
    got = ssat.Objective(recipe, encoder, decoder)(*batch)
    assert got.cross_entropy == supervised.Objective(recipe, encoder)(*batch).total
    assert got.reconstruction == reconstruction.Objective(recipe, encoder, decoder)(*batch).total
    assert not got.cross_entropy.requires_grad
    assert not got.reconstruction.requires_grad
    torch.testing.assert_close(got.logits, encoder(batch[0]).detach(), rtol=0, atol=0)


def test_both_passes_share_one_encoder(make_recipe: Make) -> None:
    recipe, encoder, decoder = parts(make_recipe, 0.1)
    objective = ssat.Objective(recipe, encoder, decoder)
    assert {id(p) for p in objective.parameters()} == {id(p) for p in [*encoder.parameters(), *decoder.parameters()]}


def test_hidden_pixels_get_no_gradient_from_the_prediction(make_recipe: Make, batch: tuple) -> None:
    # The hidden pixels are the target, so the loss itself depends on them; what is predicted must not.
    recipe, encoder, decoder = parts(make_recipe, 0.0)
    images, labels, noise = batch
    seen = []
    decoder.register_forward_hook(lambda module, args, out: seen.append(out))
    images.requires_grad_()
    ssat.Objective(recipe, encoder, decoder)(images, labels, noise)
    (gradient,) = torch.autograd.grad(seen[0].square().sum(), images)
    per_patch = gradient.unfold(2, 2, 2).unfold(3, 2, 2).abs().sum((1, 4, 5)).flatten(1)
    hidden = torch.zeros(BATCH, 16, dtype=torch.bool).scatter_(1, noise.topk(12, dim=1).indices, value=True)
    assert torch.equal(per_patch == 0, hidden)


def test_without_a_decoder_only_lambda_one_works(make_recipe: Make) -> None:
    recipe, encoder, _ = parts(make_recipe, 0.9)
    with pytest.raises(ValueError, match="needs a decoder, got none"):
        ssat.Objective(recipe, encoder, None)


@pytest.mark.parametrize("task", ["reconstruction", "simmim", "contrastive", "dino"])
@pytest.mark.parametrize("view", ["full", "masked"])
def test_any_task_is_combined_with_the_classification_of_either_view(
    make_recipe: Make, batch: tuple, generator: Callable[[str], torch.Generator], task: str, view: str
) -> None:
    recipe, facts = make_recipe(model="vit_pico", task=task, cls_view=view, lambda_weight=0.3)
    encoder = build_encoder(recipe, facts)
    behind = behind_encoder(recipe, facts, encoder)
    assert behind is not None
    objective = ssat.Objective(recipe, encoder.double(), behind.double())
    other = torch.randn(BATCH, 1, 8, 8, generator=generator("other"), dtype=torch.float64)
    views = {"other": other} if objective.num_views == 2 else {}
    assert bool(views) == (task in ("contrastive", "dino"))
    alone = registry.load("objectives", task).Objective(recipe, encoder, behind).eval()
    own = alone(*batch, **views).total
    mask = random_mask(batch[2], 0.75) if view == "masked" else None
    logits = encoder.logits_of(encoder.encode(batch[0], mask))
    entropy = torch.nn.functional.cross_entropy(logits, batch[1], label_smoothing=0.1)
    embeddings, passes = [], []
    handles = [
        module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        for module, seen in ((encoder.patch_embed, embeddings), (encoder.blocks[0], passes))
    ]
    got = objective.eval()(*batch, **views)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got.total, 0.3 * entropy + 0.7 * own, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.logits, logits.detach(), rtol=0, atol=1e-12)
    # A pass that both terms need is made once, and so is the embedding of a full and a masked pass.
    masks = task in ("reconstruction", "simmim")
    shared = masks == (view == "masked")
    assert len(passes) == (2 if views else 1) + (not shared)
    assert len(embeddings) == (1 if masks else len(passes))


@pytest.mark.parametrize("fields", [{}, {"masked_convolutions": True}, {"task": "simmim"}, {"lambda_weight": 1.0}])
def test_batch_norms_learn_of_whole_images_where_parts_are_classified(
    make_recipe: Make, batch: tuple, fields: dict
) -> None:
    recipe, facts = make_recipe(model="cvt_nano", cls_view="masked", **fields)
    encoder = build_encoder(recipe, facts).double()
    reference = copy.deepcopy(encoder)
    behind = behind_encoder(recipe, facts, encoder)
    behind = behind.double() if behind is not None else None
    images, labels, noise = batch
    objective = ssat.Objective(recipe, encoder, behind)
    objective(images, labels, noise[:, :4]).total.backward()
    reference.encode(images)
    norms = [name for name, _ in encoder.named_buffers() if "running" in name]
    assert norms
    for name in norms:
        assert torch.equal(encoder.get_buffer(name), reference.get_buffer(name)), name
    assert objective.counts_apart
    assert not ssat.Objective(dataclasses.replace(recipe, cls_view="full"), encoder, behind).counts_apart


@pytest.mark.parametrize("model", ["vit_pico", "swin_nano", "cvt_nano"])
@pytest.mark.parametrize("task", ["reconstruction", "simmim"])
def test_a_shared_embedding_has_the_gradient_of_both_passes(
    make_recipe: Make, batch: tuple, model: str, task: str
) -> None:
    recipe, facts = make_recipe(model=model, task=task, lambda_weight=0.3, drop_path=0.4, patch_size=())
    encoder = build_encoder(recipe, facts).double()
    behind = behind_encoder(recipe, facts, encoder)
    assert behind is not None
    objective = ssat.Objective(recipe, encoder, behind.double()).train()
    noise = torch.rand(BATCH, encoder.num_tokens, generator=torch.Generator().manual_seed(0))
    found = []
    for shares in (objective.shares_embedding, False):
        objective.shares_embedding = shares
        torch.manual_seed(1)
        losses = objective(*batch[:2], noise)
        found.append((losses.total, gradients(objective, losses)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-12, atol=1e-14)
