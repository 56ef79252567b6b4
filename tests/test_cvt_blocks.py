"""Parts of CvT one by one; the whole of them against the paper is in ``models/test_cvt.py``."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ssat_probe.cvt_blocks import Embedding, Mlp, Projection


@pytest.mark.parametrize(
    ("stride", "kernel", "padding"), [((1, 1), (3, 3), (1, 1)), ((2, 2), (3, 3), (1, 1)), ((4, 2), (7, 3), (2, 1))]
)
def test_an_embedding_overlaps_and_gives_one_token_per_stride(
    stride: tuple[int, int], kernel: tuple[int, int], padding: tuple[int, int]
) -> None:
    embedding = Embedding(3, 5, stride)
    assert (embedding.proj.kernel_size, embedding.proj.padding) == (kernel, padding)  # 7, 4, 2 and 3, 2, 1: the paper's
    tokens = embedding(torch.randn(2, 3, 12 * stride[0], 8 * stride[1]))
    assert tokens.shape == (2, 5, 12, 8)
    torch.testing.assert_close(tokens.mean(1), torch.zeros(2, 12, 8), rtol=0, atol=1e-6)


def test_a_pass_that_does_not_count_has_its_own_statistics_and_keeps_none(
    generator: Callable[[str], torch.Generator],
) -> None:
    projection = Projection(6, 2).double().train()
    maps = torch.randn(5, 6, 4, 3, generator=generator("maps"), dtype=torch.float64)
    before = {name: value.clone() for name, value in projection.named_buffers()}
    uncounted = projection(maps, False)
    assert all(torch.equal(value, before[name]) for name, value in projection.named_buffers())
    torch.testing.assert_close(uncounted, projection(maps, True), rtol=0, atol=1e-13)
    assert not any(torch.equal(value, before[name]) for name, value in projection.named_buffers())


def test_a_stride_of_two_keeps_every_second_place(generator: Callable[[str], torch.Generator]) -> None:
    projection = Projection(2, 2).eval()
    with torch.no_grad():
        projection.conv.weight.zero_()
        projection.conv.weight[:, :, 1, 1] = 1  # the centre of its window alone
    maps = torch.randn(3, 2, 7, 4, generator=generator("maps"))
    torch.testing.assert_close(projection(maps, True), maps[:, :, ::2, ::2] / (1 + 1e-5) ** 0.5)


def test_the_activation_is_microsofts_quick_gelu() -> None:
    mlp = Mlp(1, 1).double()
    for layer in (mlp.fc1, mlp.fc2):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.tensor([[[-3.0], [0.0], [0.5], [2.0]]], dtype=torch.float64)
    torch.testing.assert_close(mlp(x), x / (1 + torch.exp(-1.702 * x)), rtol=0, atol=1e-15)
