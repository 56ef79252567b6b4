"""Directions: every normalisation against a reference of three lines, the parts of a ViT, eigenvectors."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from ssat_probe.measures.directions import (
    cosine,
    eigenvectors,
    flat,
    heads_of,
    named,
    normalised,
    random_direction,
)
from ssat_probe.measures.lanczos import lanczos

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Tensors:
    torch.manual_seed(3)
    sizes = {"img_size": 6, "patch_size": 2, "in_chans": 1, "num_classes": 5}
    model = VisionTransformer(**sizes, embed_dim=6, depth=1, num_heads=3, mlp_ratio=2)
    return {name: parameter.detach() + 0.1 for name, parameter in model.named_parameters()}


HEADS = {"blocks.0.attn.qkv": 3}


def raw(weights: Tensors) -> Tensors:
    return random_direction(weights, 7, "none")


def test_heads_are_found_beside_fused_projections() -> None:
    model = VisionTransformer(img_size=6, patch_size=2, embed_dim=6, depth=2, num_heads=3)
    assert heads_of(model, "decoder.") == {"decoder.blocks.0.attn.qkv": 3, "decoder.blocks.1.attn.qkv": 3}


def test_flat_and_named_are_inverse(weights: Tensors) -> None:
    there = named(flat(weights), weights)
    assert list(there) == list(weights)
    assert all(torch.equal(there[name], weights[name].double()) for name in weights)


def test_filter_normalises_each_output_unit_as_li_et_al(weights: Tensors) -> None:
    direction = raw(weights)
    result = normalised(direction, weights, "filter", heads=HEADS)
    for name in ("blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "head.weight"):
        for d, w, got in zip(direction[name], weights[name].double(), result[name], strict=True):
            torch.testing.assert_close(got, d * w.norm() / (d.norm() + 1e-10))


def test_filter_takes_each_token_as_a_unit(weights: Tensors) -> None:
    result = normalised(raw(weights), weights, "filter")
    for name in ("cls_token", "pos_embed"):
        torch.testing.assert_close(result[name][0].norm(dim=1), weights[name][0].double().norm(dim=1))


def test_layer_normalises_a_whole_tensor(weights: Tensors) -> None:
    name, direction = "blocks.0.mlp.fc1.weight", raw(weights)
    result = normalised(direction, weights, "layer", heads=HEADS)
    torch.testing.assert_close(result[name], direction[name] * weights[name].double().norm() / direction[name].norm())


def test_layer_splits_a_fused_qkv_by_q_k_v_and_head(weights: Tensors) -> None:
    name, direction = "blocks.0.attn.qkv.weight", raw(weights)
    result = normalised(direction, weights, "layer", heads=HEADS)
    parts = [t[name].double().reshape(3, 3, 2, 6) for t in (direction, weights, result)]  # q k v, head, row, column
    for kind in range(3):
        for head in range(3):
            d, w, got = (part[kind, head] for part in parts)
            torch.testing.assert_close(got, d * w.norm() / d.norm())


def test_park_kim_normalises_along_the_first_axis_as_their_code(weights: Tensors) -> None:
    direction = raw(weights)
    result = normalised(direction, weights, "park_kim", vectors="keep")
    for name, d in direction.items():
        w = weights[name].double()
        expected = d * w.norm(dim=0, keepdim=True) / (d.norm(dim=0, keepdim=True) + 1e-7)
        expected = torch.zeros_like(d) if d.ndim < 2 or "pos_embed" in name else expected
        torch.testing.assert_close(result[name], expected)
    torch.testing.assert_close(result["cls_token"].abs(), weights["cls_token"].double().abs(), atol=1e-5, rtol=1e-4)


def test_filter_and_park_kim_are_not_the_same_thing(weights: Tensors) -> None:
    one, two = (normalised(raw(weights), weights, kind)["head.weight"] for kind in ("filter", "park_kim"))
    assert (one - two).norm() > 0.05 * one.norm()


def test_none_is_the_gaussian_itself(weights: Tensors) -> None:
    size = sum(w.numel() for w in weights.values())
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(flat(raw(weights)), torch.randn(size, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("name", ["norm.weight", "blocks.0.mlp.fc1.bias"])
def test_vectors_are_zeroed_scaled_or_kept_as_said(weights: Tensors, name: str) -> None:
    direction = raw(weights)
    kinds = {kind: normalised(direction, weights, "filter", vectors=kind)[name] for kind in ("zero", "scale", "keep")}
    assert not kinds["zero"].any()
    torch.testing.assert_close(kinds["scale"].norm(), weights[name].double().norm())
    assert torch.equal(kinds["keep"], direction[name])


def test_a_fused_bias_is_scaled_per_q_k_v_and_head(weights: Tensors) -> None:
    name = "blocks.0.attn.qkv.bias"
    result = normalised(raw(weights), weights, "filter", vectors="scale", heads=HEADS)[name]
    torch.testing.assert_close(result.view(9, 2).norm(dim=1), weights[name].double().view(9, 2).norm(dim=1))


@pytest.mark.parametrize("normalisation", ["filter", "layer", "none"])
def test_the_second_direction_is_orthogonal_and_still_normalised(weights: Tensors, normalisation: str) -> None:
    first = random_direction(weights, 1, normalisation, heads=HEADS)
    second = random_direction(weights, 2, normalisation, heads=HEADS, against=first)
    assert abs(cosine(flat(first), flat(second))) < 1e-14
    if normalisation == "filter":
        name = "blocks.0.mlp.fc1.weight"
        torch.testing.assert_close(second[name].norm(dim=1), weights[name].double().norm(dim=1))


def test_unknown_conventions_are_named() -> None:
    weights = {"a": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"No 'filtr' in normalisations: .* Did you mean 'filter'\?"):
        normalised(weights, weights, "filtr")
    with pytest.raises(ValueError, match="No 'drop' in ways to treat vectors"):
        normalised(weights, weights, "filter", vectors="drop")


def test_eigenvectors_of_both_ends_are_those_of_the_matrix(generator: Callable[[str], torch.Generator]) -> None:
    size = 13
    square = torch.randn(size, size, generator=generator("matrix"), dtype=torch.float64)
    matrix = square + square.T
    top, bottom = eigenvectors(lanczos(lambda v: matrix @ v, size, size, with_basis=True), 2)
    values, vectors = np.linalg.eigh(matrix.numpy())
    for found, place in ((top[0], -1), (top[1], -2), (bottom[0], 0), (bottom[1], 1)):
        assert found.value == pytest.approx(values[place])
        assert abs(found.vector.numpy() @ vectors[:, place]) == pytest.approx(1)
        assert found.converged


def test_eigenvectors_say_what_they_need() -> None:
    run = lanczos(lambda v: 2 * v, 7, 3)
    with pytest.raises(ValueError, match=r"got none\. Run it with with_basis=True"):
        eigenvectors(run)
    run = lanczos(lambda v: 2 * v, 7, 1, with_basis=True)
    with pytest.raises(ValueError, match="at least 2 Lanczos steps for 1 each, got 1"):
        eigenvectors(run)
