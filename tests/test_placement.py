"""Places of tokens against what the models themselves do to a map of coordinates."""

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssat_probe import capture
from ssat_probe.models import cvt
from ssat_probe.placement import PADDING, PATCH, PREFIX, Layout, Place, lay_out, output_grid


def layouts(model: nn.Module, x: Tensor) -> list[tuple[Place, Layout]]:
    found: list[tuple[Place, Layout]] = []

    def reduce(seen: capture.Attention) -> None:
        assert isinstance(seen.place, Place)
        found.append((seen.place, lay_out(seen.place, len(seen.rows), seen.num_queries, seen.rows.shape[3])))

    with torch.no_grad(), capture.attention(model, reduce):
        model(x)
    return found


class Recorder(nn.Module):
    """Takes the place of the attention and remembers its windows."""

    def forward(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        self.windows, self.mask = windows, mask
        return windows


@pytest.mark.parametrize("name", ["swin", "swin padded", "our swin", "swinv2"])
def test_slots_of_windows_are_where_the_model_puts_a_map_of_coordinates(make_family: Callable, name: str):
    model, x = make_family(name)
    for place, layout in layouts(model, x):
        rows, columns = place.grid
        numbers = torch.arange(rows * columns).reshape(1, rows, columns, 1) + 1.0
        block, recorder = place.module, Recorder()
        block.attn = recorder
        block._attn(numbers)
        slots = recorder.windows[..., 0].long() - 1  # padding is 0 in the model, so -1 here
        assert torch.equal(layout.query_kinds, torch.where(slots < 0, PADDING, PATCH))
        here = slots >= 0
        expected = torch.stack([slots // columns * place.stride[0], slots % columns * place.stride[1]], -1)
        assert torch.equal(layout.query_places[here].long(), expected[here])
        same = layout.query_regions[:, :, None] == layout.key_regions[:, None]
        allowed = torch.ones_like(same) if recorder.mask is None else recorder.mask == 0
        pairs = here[:, :, None] & here[:, None]
        assert torch.equal(same & pairs, allowed & pairs)
    assert any(one.query_regions.unique().numel() > len(one.query_regions) for _, one in layouts(*make_family(name)))


def test_slots_of_the_groups_of_twins_are_where_the_model_puts_a_map_of_coordinates(make_family: Callable):
    class Recorder(nn.Module):
        """Takes the place of the projection to queries, keys and values, the first to see the groups."""

        def forward(self, groups: Tensor) -> Tensor:
            self.groups = groups
            return groups.repeat_interleave(3, -1)

    model, x = make_family("twins")
    found = [(place, layout) for place, layout in layouts(model, x) if place.windows]
    assert [(place.grid, place.windows) for place, _ in found] == [
        ((8, 12), ((3, 3), (0, 0))), ((4, 6), ((4, 4), (0, 0)))
    ]  # fmt: skip
    for place, layout in found:
        rows, columns = place.grid
        numbers = torch.arange(rows * columns)[None, :, None] + torch.ones(len(place.module.norm1.weight))
        attention, recorder = place.attention, Recorder()
        attention.qkv = recorder
        attention(numbers, place.grid)
        slots = recorder.groups[0, ..., 0].flatten(0, 1).flatten(1).long() - 1  # padding is 0 in the model, -1 here
        assert torch.equal(layout.query_kinds, torch.where(slots < 0, PADDING, PATCH))
        assert (slots < 0).any()
        here = slots >= 0
        expected = torch.stack([slots // columns * place.stride[0], slots % columns * place.stride[1]], -1)
        assert torch.equal(layout.query_places[here].long(), expected[here])
        assert layout.query_regions.unique().tolist() == list(range(len(slots)))


@pytest.mark.parametrize("name", ["pvt", "pvt linear", "twins global", "mvit", "mvit class token", "our cvt"])
def test_centres_of_pooled_keys_are_those_of_a_pooled_map_of_coordinates(make_family: Callable, name: str):
    model, x = make_family(name.removesuffix(" global"))
    for place, layout in layouts(model, x):
        if place.windows:
            continue
        axes = [torch.arange(n, dtype=torch.float64) for n in place.grid]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"))[:, None]
        for kinds, places, names in (
            (layout.query_kinds, layout.query_places, ("pool_q", "conv_proj_q")),
            (layout.key_kinds, layout.key_places, ("pool_k", "pool", "sr", "conv_proj_k")),
        ):
            pooled = coordinates
            for pool in (getattr(place.attention, one, None) for one in names):
                pool = getattr(pool, "conv", pool)
                if isinstance(pool, nn.Conv2d):
                    # The mean of what a window sees, with the grid continued beyond its border.
                    step, kernel, pad = pool.stride[0], pool.kernel_size[0], pool.padding[0]
                    wide = torch.stack(torch.meshgrid(
                        *(torch.arange(-pad, n + pad, dtype=torch.float64) for n in place.grid), indexing="ij"
                    ))[:, None] if pad else pooled  # fmt: skip
                    pooled = nn.functional.avg_pool2d(wide, kernel, step)
                elif isinstance(pool, nn.AdaptiveAvgPool2d):
                    pooled = pool(pooled)
            expected = pooled[:, 0].flatten(1).T * torch.tensor(place.stride)
            torch.testing.assert_close(places[0][kinds[0] == PATCH], expected)
            has_class = name == "mvit class token" or place.name.startswith("stage2.")
            assert int((kinds == PREFIX).sum()) == has_class


def test_places_of_strided_keys_are_the_centres_of_the_pixels_that_they_see() -> None:
    """CvT's queries and keys traced back to pixels by gradients through all its convolutions, stage after stage."""
    model = cvt.Model(
        img_size=(128, 192), patch_size=(4, 4), channels=1, num_classes=2, dims=(2, 2, 2), depths=(1, 1, 1),
        heads=(1, 1, 1),
    ).double().eval()  # fmt: skip
    found = layouts(model, torch.zeros(1, 1, 128, 192, dtype=torch.float64))
    image = torch.zeros(1, 1, 128, 192, dtype=torch.float64, requires_grad=True)
    maps = image
    for (place, layout), stage in zip(found, (model.stage0, model.stage1, model.stage2), strict=True):
        convolutions = [stage.patch_embed.proj, *(getattr(stage.blocks[0].attn, f"conv_proj_{n}").conv for n in "qk")]
        for convolution in convolutions:
            nn.init.ones_(convolution.weight)  # every pixel of a window counts
        maps = stage.patch_embed.proj(maps)
        centres = {}
        for kind, convolution in zip("qk", convolutions[1:], strict=True):
            projected = convolution(maps).sum(1)[0]
            for i, j in [(a, b) for a in range(len(projected)) for b in range(projected.shape[1])]:
                (seen,) = torch.autograd.grad(projected[i, j], image, retain_graph=True)
                rows, columns = (seen[0, 0] != 0).nonzero().T
                is_whole = min(rows.min(), columns.min()) > 0 and rows.max() < 127 and columns.max() < 191
                if is_whole:
                    ends = [(int(one.min()) + int(one.max())) / 2 for one in (rows, columns)]
                    centres[kind, i * projected.shape[1] + j] = torch.tensor(ends, dtype=torch.float64)
        first = next(one for (kind, _), one in centres.items() if kind == "q")
        number = next(number for kind, number in centres if kind == "q")
        prefix = place.num_prefix
        assert prefix == (place.name == "stage2.blocks.0")
        assert {kind for kind, _ in centres} == {"q", "k"}
        offset = first - layout.query_places[0, prefix + number]  # of the first patch's centre, the same for all
        for (kind, number), centre in centres.items():
            places = (layout.query_places if kind == "q" else layout.key_places)[0, prefix:]
            torch.testing.assert_close(places[number] + offset, centre, rtol=0, atol=0)


def test_strides_double_where_grids_halve(make_family: Callable):
    for name, expected in {"swin": [4, 4, 8, 8], "pvt": [4, 8, 8], "mvit": [4, 4, 8], "vit": [8, 8, 8],
                           "our cvt": [2, 4, 8, 8]}.items():  # fmt: skip
        assert [place.stride for place, _ in layouts(*make_family(name))] == [(step, step) for step in expected]
    first, *_ = layouts(*make_family("mvit"))
    assert output_grid(first[0]) == first[0].grid
    model, x = make_family("mvit")
    assert [output_grid(place) for place, _ in layouts(model, x)] == [(8, 8), (4, 4), (4, 4)]


def test_the_grid_follows_the_image_where_the_model_does():
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2, dynamic_img_size=True)
    ((place, layout),) = layouts(model.eval(), torch.zeros(1, 3, 8, 20))
    assert (place.grid, place.stride) == ((2, 5), (4, 4))
    assert layout.key_kinds.tolist() == [[PREFIX] + [PATCH] * 10]


def test_other_numbers_of_tokens_are_refused_with_what_they_were():
    place = Place("a", nn.Identity(), None, 2, (3, 5), (4, 4), 1)
    for shape in [(2, 7, 7), (6, 16, 16), (2, 16, 9), (2, 17, 17)]:
        with pytest.raises(ValueError, match=rf"a must attend over the 3 x 5 patches .* got {shape[0]} x {shape[1]}"):
            lay_out(place, *shape)
    assert lay_out(place, 2, 16, 16).query_kinds.shape == (1, 16)
    assert lay_out(place, 2, 1, 16).query_kinds.tolist() == [[PREFIX]]
