import numpy as np
import pytest
import torch

from ssat_probe.measures.scatter import NUM_GROUPS, JackknifedSingularValues, StreamingSingularValues
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


def jackknifed(rows: torch.Tensor, size: int = 3) -> JackknifedSingularValues:
    seen = JackknifedSingularValues()
    for ids in torch.arange(len(rows)).split(size):
        seen.add(ids, rows[ids])
    return seen


def test_groups_together_are_the_whole_whatever_the_batches(generator):
    rows = rows_of(generator, "rows", (211, DIM))
    for size in (1, 64, 211):
        torch.testing.assert_close(jackknifed(rows, size).whole.values, streamed(rows).values, rtol=1e-13, atol=0)


def held(seen: JackknifedSingularValues) -> int:
    """Bytes of everything that hangs on it, views counted with all that they keep alive."""
    storages: dict[int, int] = {}
    places: list[object] = [seen]
    while places:
        one = places.pop()
        if isinstance(one, torch.Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, list | tuple):
            places += one
        elif hasattr(one, "__dict__"):
            places += vars(one).values()
    return sum(storages.values())


def test_what_is_held_is_half_a_square_a_group_whatever_the_number_of_images(generator):
    dim, seen, found, start = 31, JackknifedSingularValues(), [], 0
    for until in (50, 640, 6400, 12800):  # multiples of 640: 64 of each group, so that none waits
        rows = torch.randn(until - start, dim, generator=generator(f"{until}"), dtype=torch.float64)
        for ids in torch.arange(start, until).split(320):
            seen.add(ids, rows[ids - start])
        found.append(held(seen))
        start = until
    assert found[0] == 50 * dim * 8  # a few rows are kept as they are
    assert found[1:] == [NUM_GROUPS * (dim * (dim + 1) // 2 + dim) * 8] * 3


def test_leaving_out_groups_is_as_if_they_had_not_been_there(generator):
    rows = rows_of(generator, "rows")
    counts, others = jackknifed(rows).without_each()
    assert counts == [3] * 3 + [2] * 7
    for place, values in enumerate(others):
        kept = rows[torch.arange(IMAGES) % NUM_GROUPS != place].numpy()
        np.testing.assert_allclose(values, np.linalg.svd(kept - kept.mean(0), compute_uv=False), rtol=1e-9)


def test_with_an_image_per_group_it_is_the_ordinary_jackknife(generator):
    rows = rows_of(generator, "rows", (NUM_GROUPS, 5))
    found = jackknifed(rows).spread({"rank": effective_rank})
    kept = [rows[[j for j in range(NUM_GROUPS) if j != i]] for i in range(NUM_GROUPS)]
    left_out = np.array([effective_rank(streamed(one).values).item() for one in kept])
    error = np.sqrt((NUM_GROUPS - 1) * left_out.var())
    assert found["rank"] == effective_rank(streamed(rows).values).item()
    assert found["rank_sd"] == pytest.approx(error * NUM_GROUPS**0.5, rel=1e-9)
    assert found["rank_high"] - found["rank_low"] == pytest.approx(2 * 2.2621571628 * error, rel=1e-9)  # t, 9 degrees


@pytest.mark.parametrize("size", [40, 63])
def test_the_interval_holds_the_rank_of_so_many_images(generator, size: int):
    """In about 95 of 100 samples: the mean rank over the samples, which is what so many images give on average."""
    scales = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1]).double()
    ranks = {"effective": effective_rank, "stable": stable_rank}
    found = [jackknifed(scales * rows_of(generator, f"{size} {i}", (size, DIM)), 64).spread(ranks) for i in range(200)]
    for name in ranks:
        truth = np.mean([one[name] for one in found])
        held = [one[f"{name}_low"] < truth < one[f"{name}_high"] for one in found]
        assert 0.88 < np.mean(held) < 0.99, name
        variance = np.mean([one[f"{name}_sd"] ** 2 / size for one in found])
        assert variance == pytest.approx(np.var([one[name] for one in found]), rel=0.4), name


def test_two_images_and_equal_images_have_no_interval(generator):
    for rows in (rows_of(generator, "few", (2, DIM)), torch.full((12, DIM), 0.1)):
        found = jackknifed(rows).spread({"rank": effective_rank})
        assert np.isnan([found["rank_sd"], found["rank_low"], found["rank_high"]]).all()
    assert found["rank_undefined"] == 1
