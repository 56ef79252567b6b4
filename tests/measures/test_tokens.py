import math

import numpy as np
import pytest
import torch

from ssat_probe.measures import tokens as measures
from ssat_probe.measures.features import relative_variance

IMAGES, TOKENS, DIM = 2, 11, 7


def random(generator, word: str, shape=(IMAGES, TOKENS, DIM)) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(word), dtype=torch.float64)


def test_an_orthonormal_basis_has_cosine_0_and_centred_rank_one_less_than_its_size():
    basis = torch.eye(TOKENS, dtype=torch.float64)[None]
    assert measures.cosine_similarity(basis).item() == pytest.approx(0, abs=1e-15)
    values = measures.singular_values(basis)
    for rank in (measures.effective_rank, measures.energy_rank, measures.stable_rank):
        assert rank(values).item() == pytest.approx(TOKENS - 1)
    assert measures.absolute_cosine_similarity(basis).item() == pytest.approx(1 / TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_tokens_have_cosine_1_residual_0_and_no_rank(generator, dtype):
    equal = random(generator, "equal", (IMAGES, 1, DIM)).to(dtype).expand(-1, TOKENS, -1)
    torch.testing.assert_close(measures.cosine_similarity(equal), torch.ones(IMAGES).double(), rtol=0, atol=1e-12)
    assert measures.rank_collapse_residual(relative_variance(equal)).max() < 1e-12
    assert measures.effective_rank(measures.singular_values(equal)).isnan().all()


def test_cosine_against_the_sum_over_pairs(generator):
    tokens = random(generator, "pairs")
    for image, ours, absolute in zip(
        tokens.numpy(), measures.cosine_similarity(tokens), measures.absolute_cosine_similarity(tokens), strict=True
    ):
        cosines = [
            [a @ b / math.sqrt((a @ a) * (b @ b)) for j, b in enumerate(image) if j != i] for i, a in enumerate(image)
        ]
        assert ours.item() == pytest.approx(np.mean(cosines))
        # Parity anti_oversmoothing: |cos| with the diagonal, whose cosine is 1.
        everything = [[*map(abs, row), 1.0] for row in cosines]
        assert absolute.item() == pytest.approx(np.mean(everything))


def test_cosine_is_within_its_bounds():
    opposite = torch.tensor([[[1.0], [-1.0]]])
    assert measures.cosine_similarity(opposite).item() == -1


@pytest.mark.parametrize("shape", [(IMAGES, TOKENS, DIM), (IMAGES, DIM, TOKENS)])
def test_ranks_against_numpy_and_in_their_order(generator, shape):
    tokens = random(generator, "ranks", shape)
    values = measures.singular_values(tokens)
    ceiling = measures.rank_ceiling(*shape[1:])
    assert values.shape == (IMAGES, ceiling)
    for i, image in enumerate(tokens.numpy()):
        spectrum = np.sqrt(np.linalg.eigvalsh(np.cov(image.T, ddof=0) * len(image))[::-1][:ceiling])
        np.testing.assert_allclose(values[i], spectrum, rtol=1e-6)
        for rank, power in ((measures.effective_rank, 1), (measures.energy_rank, 2)):
            share = spectrum**power / (spectrum**power).sum()
            assert rank(values)[i].item() == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    stable, energy, effective = (
        f(values) for f in (measures.stable_rank, measures.energy_rank, measures.effective_rank)
    )
    assert (stable >= 1).all()
    assert (stable <= energy).all()
    assert (energy <= effective).all()
    assert (effective <= ceiling).all()


def test_one_direction_has_rank_1(generator):
    line = torch.arange(TOKENS).double()[None, :, None] * random(generator, "line", (1, 1, DIM))
    values = measures.singular_values(line)
    for rank in (measures.effective_rank, measures.energy_rank, measures.stable_rank):
        assert rank(values).item() == pytest.approx(1, abs=1e-9)


def test_permutation_scale_and_rotation_change_nothing(generator):
    tokens = random(generator, "invariant")
    rotation = torch.linalg.qr(random(generator, "rotation", (DIM, DIM)))[0]
    order = torch.randperm(TOKENS, generator=generator("order"))
    for other in (tokens[:, order], 5 * tokens, tokens @ rotation):
        for measure in (
            measures.cosine_similarity,
            measures.absolute_cosine_similarity,
            lambda x: measures.effective_rank(measures.singular_values(x)),
            lambda x: measures.rank_collapse_residual(relative_variance(x)),
        ):
            torch.testing.assert_close(measure(other), measure(tokens), rtol=1e-12, atol=1e-12)


def test_the_residual_is_the_share_of_the_norm(generator):
    tokens = random(generator, "residual")
    centred = tokens - tokens.mean(1, keepdim=True)
    expected = torch.linalg.matrix_norm(centred) / torch.linalg.matrix_norm(tokens)
    torch.testing.assert_close(measures.rank_collapse_residual(relative_variance(tokens)), expected)


@pytest.mark.parametrize(
    "measure", [measures.cosine_similarity, measures.absolute_cosine_similarity, measures.singular_values]
)
def test_one_token_is_refused(measure):
    with pytest.raises(ValueError, match=r"at least 2 tokens per image, got 1\."):
        measure(torch.ones(IMAGES, 1, DIM))


def test_standardised_tokens_have_mean_0_and_deviation_1_in_every_channel():
    tokens = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    tokens[..., 1] *= 1000
    tokens[..., 3] = 0.3
    found = measures.standardized(tokens)
    torch.testing.assert_close(found.mean(1), torch.zeros(2, 5).double(), rtol=0, atol=1e-12)
    expected = torch.tensor([1, 1, 1, 0, 1]).double().expand(2, 5)
    torch.testing.assert_close(found.square().mean(1), expected, rtol=0, atol=1e-12)
    plain, fair = (measures.effective_rank(measures.singular_values(x)) for x in (tokens, found))
    assert (plain < 1.1).all()
    assert (fair > 2).all()
