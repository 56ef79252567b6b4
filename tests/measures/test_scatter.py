import numpy as np
import pytest
import torch

from ssat_probe.measures.scatter import StreamingSingularValues
from ssat_probe.measures.tokens import effective_rank, energy_rank, stable_rank

IMAGES, DIM = 23, 7


def rows_of(generator, word: str, shape=(IMAGES, DIM)) -> torch.Tensor:
    return 3 + torch.randn(*shape, generator=generator(word), dtype=torch.float64)


def streamed(*batches: torch.Tensor) -> StreamingSingularValues:
    seen = StreamingSingularValues()
    for batch in batches:
        seen.add(batch)
    return seen


@pytest.mark.parametrize("shape", [(23, 7), (7, 23), (7, 7), (8, 7)])
@pytest.mark.parametrize("size", [1, 3, 5, 23])
def test_batches_give_the_singular_values_of_the_whole(generator, shape, size):
    rows = rows_of(generator, "rows", shape)
    expected = np.linalg.svd(rows.numpy() - rows.numpy().mean(0), compute_uv=False)[: min(shape[0] - 1, shape[1])]
    seen = streamed(*rows.split(size))
    np.testing.assert_allclose(seen.values, expected, rtol=0, atol=1e-13 * expected[0])
    assert (seen.count, seen.ceiling) == (shape[0], min(shape[0] - 1, shape[1]))


def test_order_does_not_enter(generator):
    rows = rows_of(generator, "rows")
    other = rows[torch.randperm(IMAGES, generator=generator("order"))]
    torch.testing.assert_close(streamed(*other.split(4)).values, streamed(rows).values, rtol=0, atol=1e-12)


def test_small_values_keep_their_accuracy(generator):
    """The eigenvalues of a summed covariance lose everything below 1e-8 of the largest singular value."""
    u = torch.linalg.qr(rows_of(generator, "u", (IMAGES, 3)) - rows_of(generator, "u", (IMAGES, 3)).mean(0))[0]
    v = torch.linalg.qr(rows_of(generator, "v", (DIM, 3)))[0]
    rows = u @ torch.tensor([1.0, 1e-5, 1e-10]).double().diag() @ v.T
    np.testing.assert_allclose(streamed(*rows.split(5)).values[:3], [1, 1e-5, 1e-10], rtol=1e-5)


def test_ranks_of_known_spectra():
    corners = torch.eye(11).double()  # centred: 10 equal singular values
    values = streamed(*corners.split(3)).values
    for rank in (effective_rank, energy_rank, stable_rank):
        assert rank(values).item() == pytest.approx(10)
    line = torch.arange(11).double()[:, None] * torch.ones(1, 5)
    assert effective_rank(streamed(*line.split(3)).values).item() == pytest.approx(1)


def test_equal_rows_have_no_spectrum():
    assert streamed(torch.full((3, 5), 0.1), torch.full((2, 5), 0.1)).values.isnan().all()
