from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssat_probe import capture, geometry
from ssat_probe.models.vit import Model


def test_ours_and_timms_models_say_where_their_patches_lie():
    ours = Model(img_size=(6, 10), patch_size=(3, 2), channels=1, num_classes=2, dim=8, depth=1, heads=2)
    timms = VisionTransformer(img_size=(6, 10), patch_size=(3, 2), in_chans=1, embed_dim=8, depth=1, num_heads=2)
    for model in (ours, timms):
        assert geometry.grid(model) == (2, 5)
        assert geometry.patch_size(model) == (3, 2)


@pytest.mark.parametrize("question", [geometry.grid, geometry.patch_size])
def test_a_model_that_does_not_say_is_refused(question):
    with pytest.raises(ValueError, match=r"The model must say .* got a Linear with None\."):
        question(nn.Linear(2, 3))


def test_distances_are_euclidean_in_pixels_and_in_raster_order():
    found = geometry.distances((3, 5), (2, 7))
    assert found.shape == (15, 15)
    for q in range(15):
        for k in range(15):
            expected = ((2 * (q // 5 - k // 5)) ** 2 + (7 * (q % 5 - k % 5)) ** 2) ** 0.5
            assert found[q, k] == pytest.approx(expected)


def test_uniform_attention_on_14_by_14_patches_of_16_pixels_reaches_116_pixels():
    # The mean of the closed form 16 * sqrt(i² + j²) over all pairs of patches.
    assert geometry.distances((14, 14), (16, 16)).mean().item() == pytest.approx(116.492, abs=5e-4)
    assert torch.equal(geometry.distances((1, 1), (16, 16)), torch.zeros(1, 1).double())


def seen_rows(model: nn.Module, x: Tensor, most_weights: int = 0, **kinds: str) -> dict[int, list[geometry.Rows]]:
    """Rows by block in chunks of queries, those of all images together."""
    found: dict[int, list[list[geometry.Rows]]] = {}

    def reduce(seen: capture.Attention) -> None:
        chunks = found.setdefault(seen.block, [])
        if seen.first_query == 0:
            chunks.append([])
        chunks[-1].append(geometry.arranged(seen, **kinds))  # type: ignore[arg-type]

    with torch.no_grad(), capture.attention(model, reduce, most_weights=most_weights):
        model(x)
    return {block: [together(parts) for parts in zip(*chunks, strict=True)] for block, chunks in found.items()}


def together(parts: Sequence[geometry.Rows]) -> geometry.Rows:
    """The same queries of some images and of others."""
    first = parts[0]
    assert all(torch.equal(one.regions, first.regions) for one in parts)
    valid = first.is_valid
    if valid is not None and len(valid) > 1:
        valid = torch.cat([one.is_valid for one in parts if one.is_valid is not None])
    return replace(first, rows=torch.cat([one.rows for one in parts]), is_valid=valid)


def by_brute_force(model: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Attention of Swin as one matrix over the whole map, slot by slot: weights, and which pairs count."""
    results = []
    operations: list[capture.Attention] = []
    with torch.no_grad(), capture.attention(model, operations.append):
        model(x)
    for seen in operations:
        rows, columns = seen.place.grid  # type: ignore[union-attr]
        block = seen.place.module  # type: ignore[union-attr]
        (high, wide), (down, right) = block.window_size, block.shift_size
        padded = (-(-rows // high) * high, -(-columns // wide) * wide)
        windows_across = padded[1] // wide
        per_image = padded[0] // high * windows_across
        heads = seen.rows.shape[1]
        whole = torch.zeros(len(x), heads, rows * columns, rows * columns)
        counts = torch.zeros(rows * columns, rows * columns, dtype=torch.bool)
        weights = seen.rows.softmax(-1)

        def slot(r: int, c: int) -> tuple[int, int]:
            r, c = (r - down) % rows, (c - right) % columns  # noqa: B023
            return r // high * windows_across + c // wide, r % high * wide + c % wide  # noqa: B023

        for q in range(rows * columns):
            window, i = slot(q // columns, q % columns)
            for k in range(rows * columns):
                other, j = slot(k // columns, k % columns)
                if other == window:
                    whole[:, :, q, k] = weights[torch.arange(len(x)) * per_image + window, :, i, j]
                    counts[q, k] = block.attn_mask is None or bool(block.attn_mask[window, i, j] == 0)
        whole = whole * counts
        results.append((whole / whole.sum(-1, keepdim=True), counts))
    return results


@pytest.mark.parametrize("name", ["swin", "swin padded", "swinv2"])
@pytest.mark.parametrize("most_weights", [0, 50])
def test_rows_of_windows_are_those_of_the_whole_map(make_family: Callable, name: str, most_weights: int):
    model, x = make_family(name)
    found = seen_rows(model, x, most_weights)
    distances: dict[int, Tensor] = {}
    for block, (weights, counts) in enumerate(by_brute_force(model, x)):
        chunks = found[block]
        grid = (8, 12) if block < 2 else (4, 6)
        between = geometry.distances(grid, (4, 4) if block < 2 else (8, 8))
        places = torch.cat([chunk.query_places for chunk in chunks]) / between[0, 1]
        numbers = places.round() @ torch.tensor([grid[1], 1.0]).double()
        order = numbers.long().argsort()
        assert numbers[order].tolist() == list(range(grid[0] * grid[1]))
        valid = [c.rows.new_ones(1, 1, *c.rows.shape[2:]).bool() if c.is_valid is None else c.is_valid for c in chunks]
        assert torch.equal(torch.cat([v.sum(-1)[0, 0] for v in valid])[order], counts.sum(-1))
        ours = torch.cat([c.rows.softmax(-1) for c in chunks], 2)
        distance = torch.cat([(c.rows.double().softmax(-1) * c.distances.nan_to_num(0)).sum(-1) for c in chunks], 2)
        torch.testing.assert_close(distance[:, :, order], (weights.double() * between).sum(-1), rtol=1e-4, atol=1e-4)
        for moment in (2, 4):
            torch.testing.assert_close(
                ours.pow(moment).sum(-1)[:, :, order], weights.pow(moment).sum(-1), rtol=1e-4, atol=1e-6
            )
        distances[block] = distance
    assert len(distances) == 4


@pytest.mark.parametrize(("name", "prefix"), [("vit", 1), ("deit distilled", 2), ("registers", 5), ("gap", 0)])
def test_tokens_in_front_of_the_patches_are_told_apart(make_family: Callable, name: str, prefix: int):
    model, x = make_family(name)
    whole = {block: chunks[0] for block, chunks in seen_rows(model, x, queries="all", keys="all").items()}
    patches = {block: chunks[0] for block, chunks in seen_rows(model, x).items()}
    front = {block: chunks[0] for block, chunks in seen_rows(model, x, queries="prefix", keys="all").items()}
    for block, one in whole.items():
        assert one.rows.shape[2:] == (24 + prefix, 24 + prefix)
        assert (one.num_prefix, patches[block].num_prefix) == (prefix, 0)
        assert torch.equal(patches[block].rows, one.rows[:, :, prefix:, prefix:])
        assert torch.equal(front[block].rows, one.rows[:, :, :prefix])
        torch.testing.assert_close(patches[block].distances, geometry.distances((4, 6), (8, 8)))
        assert patches[block].is_valid is None
    if prefix:
        for block, chunks in seen_rows(model, x, queries="cls", keys="patch").items():
            assert torch.equal(chunks[0].rows, whole[block].rows[:, :, :1, prefix:])


def test_chunks_hold_the_queries_of_their_kind(make_family: Callable):
    model, x = make_family("registers")
    whole, chunks = seen_rows(model, x), seen_rows(model, x, most_weights=2 * 29 * 3)
    assert len(chunks[0]) == 10
    for block in whole:
        torch.testing.assert_close(torch.cat([one.rows for one in chunks[block]], 2), whole[block][0].rows)
        torch.testing.assert_close(torch.cat([one.distances for one in chunks[block]]), whole[block][0].distances)


def test_keys_that_the_model_masks_do_not_count(make_family: Callable):
    model, x = make_family("vit")
    mask = torch.ones(25, 25, dtype=torch.bool).tril()

    class Causal(nn.Module):
        def __init__(self, attn: nn.Module) -> None:
            super().__init__()
            self.attn = attn

        def forward(self, x: Tensor, **_: object) -> Tensor:
            q, k, v = self.attn.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.attn.proj(x.transpose(1, 2).flatten(2))

    model.blocks[1].attn = Causal(model.blocks[1].attn)
    found = seen_rows(model, x)
    assert found[0][0].is_valid is None
    valid = found[1][0].is_valid
    assert valid is not None
    assert torch.equal(valid.expand(1, 1, 24, 24)[0, 0], mask[1:, 1:])


def test_attention_without_places_says_why(make_family: Callable):
    model, x = make_family("vit")
    model.patch_embed.grid_size = None
    model.patch_embed.dynamic_feat_size = lambda _: None
    with pytest.raises(ValueError, match=r"The model must say its grid of patches"):
        seen_rows(model, x)
