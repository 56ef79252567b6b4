"""Mixed images against their parts, over many draws."""

from collections.abc import Callable

import pytest
import torch

from ssat_probe.mixing import mix

BATCH, HEIGHT, WIDTH = 7, 6, 9


def seeded(seed: int, images: torch.Tensor, **options: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return mix(images, torch.arange(len(images)), **options)  # the class of a partner is its place


@pytest.fixture
def images(generator: Callable[[str], torch.Generator]) -> torch.Tensor:
    return torch.randn(BATCH, 2, HEIGHT, WIDTH, generator=generator("images"))


def test_mixup_blends_each_image_with_its_partner(images: torch.Tensor) -> None:
    before = images.clone()
    for seed in range(20):
        mixed, partners, share = seeded(seed, images, mixup=0.8, cutmix=0.0)
        assert sorted(partners.tolist()) == list(range(BATCH))
        assert 0 <= share <= 1
        for i, partner in enumerate(partners):
            torch.testing.assert_close(mixed[i], share * images[i] + (1 - share) * images[partner])
    assert torch.equal(images, before)


def test_cutmix_replaces_one_box_and_the_share_is_what_is_left(images: torch.Tensor) -> None:
    shares = []
    for seed in range(60):
        mixed, partners, share = seeded(seed, images, mixup=0.0, cutmix=1.0)
        shares.append(share)
        own = (mixed == images).all(dim=1)
        its = (mixed == images[partners]).all(dim=1)
        assert bool((own | its).all())
        moved = partners != torch.arange(BATCH)
        if not moved.any():
            continue
        inside = ~own[moved][0]
        assert bool((own[moved] == ~inside).all())  # the same box in every image
        assert torch.equal(inside, inside.any(dim=1)[:, None] & inside.any(dim=0))
        assert share == pytest.approx(1 - float(inside.float().mean()))
    assert min(shares) < 0.3
    assert max(shares) > 0.9


def test_with_both_either_is_taken_in_half_of_the_calls(images: torch.Tensor) -> None:
    cut = 0
    for seed in range(200):
        mixed, partners, _ = seeded(seed, images, mixup=5.0, cutmix=5.0)
        cut += bool(((mixed == images) | (mixed == images[partners])).all())
    assert 100 - 4 * 50**0.5 < cut < 100 + 4 * 50**0.5


def test_shares_follow_the_beta_distribution() -> None:
    image = torch.zeros(2, 1, 1, 1)
    values = torch.tensor([seeded(seed, image, mixup=0.4, cutmix=0.0)[2] for seed in range(2000)])
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)); 4 standard errors
    assert abs(float(values.mean()) - 0.5) < 4 * (1 / 7.2 / 2000) ** 0.5
    assert float(values.var()) == pytest.approx(1 / 7.2, rel=0.12)
