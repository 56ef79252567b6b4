import cmath
import math

import numpy as np
import pytest
import torch

from ssat_probe.measures import fourier
from ssat_probe.measures.features import relative_variance


def random(generator, word: str, shape=(2, 7, 11, 3)) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(word), dtype=torch.float64)


def checkerboard(rows: int = 8, columns: int = 8) -> torch.Tensor:
    signs = (torch.arange(rows)[:, None] + torch.arange(columns)[None]) % 2 * 2.0 - 1
    return signs.double()[None, :, :, None]


def test_a_checkerboard_is_all_high_frequency_and_park_kim_is_blind_to_it():
    assert fourier.energy_share(checkerboard()).item() == pytest.approx(1)
    assert fourier.park_kim(checkerboard()).item() == pytest.approx(0, abs=1e-6)
    assert fourier.log_amplitude(1 + 0.5 * checkerboard()) > fourier.log_amplitude(1 + 0.25 * checkerboard())


def test_a_slow_wave_is_all_low_frequency():
    wave = torch.cos(2 * math.pi * torch.arange(16).double() / 16)[None, :, None, None].expand(1, 16, 16, 1)
    assert fourier.energy_share(wave).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_map_has_no_energy_share(dtype):
    constant = torch.full((2, 7, 7, 3), 0.3, dtype=dtype)
    assert fourier.energy_share(constant).isnan().all()
    assert fourier.log_amplitude(torch.zeros(1, 7, 7, 3)).isnan().all()


def test_against_the_transform_summed_by_hand(generator):
    maps = random(generator, "by hand", (1, 7, 8, 2))
    rows, columns = 7, 8
    transform = np.zeros((rows, columns, 2), dtype=complex)
    for u in range(rows):
        for v in range(columns):
            phases = [
                [cmath.exp(-2j * math.pi * (u * i / rows + v * j / columns)) for j in range(columns)]
                for i in range(rows)
            ]
            transform[u, v] = np.einsum("ij,ijc->c", np.array(phases), maps[0].numpy())
    size = np.abs(transform)
    floor = 1e-6 * np.sqrt((size**2).mean())
    # Frequency in units of pi: 2 * min(u, n - u) / n.
    high = [
        (u, v)
        for u in range(rows)
        for v in range(columns)
        if max(2 * min(u, rows - u) / rows, 2 * min(v, columns - v) / columns) >= 2 / 3
    ]
    expected = np.mean([np.log(size[u, v] + floor) for u, v in high]) - np.log(size[0, 0] + floor).mean()
    assert fourier.log_amplitude(maps).item() == pytest.approx(expected)
    total = (size**2).sum() - (size[0, 0] ** 2).sum()
    share = sum((size[u, v] ** 2).sum() for u, v in high) / total
    assert fourier.energy_share(maps).item() == pytest.approx(share)
    assert fourier.white_noise_share(rows, columns) == pytest.approx(len(high) / (rows * columns - 1))


@pytest.mark.parametrize("rows", [7, 8, 14])
def test_parity_with_the_half_diagonal_of_the_shifted_spectrum(generator, rows: int):
    maps = random(generator, f"parity {rows}", (3, rows, rows, 5))
    # Written from the description: shift frequency 0 to the middle, take the diagonal from there outwards.
    logs = np.log(np.abs(np.fft.fft2(maps.numpy(), axes=(1, 2))) + 1e-6)
    middle = np.fft.fftshift(logs, axes=(1, 2)).mean(axis=(0, 3))
    half = np.diagonal(middle)[rows // 2 :]
    assert fourier.park_kim(maps).mean().item() == pytest.approx(half[-1] - half[0])


@pytest.mark.parametrize(
    ("rows", "theirs"), [(7, -2.4389229413186824), (8, -2.622131127843547), (14, -2.8746897534511184)]
)
def test_parity_with_park_and_kim_is_the_number_of_their_code(rows: int, theirs: float):
    # xxxnell/how-do-vits-work at 9571ff1, fourier_analysis.ipynb, cell 10: last entry of ``fourier_latents``.
    tokens = torch.randn(3, rows**2, 5, generator=torch.Generator().manual_seed(42), dtype=torch.float64) + 1
    assert fourier.park_kim(tokens.unflatten(1, (rows, rows))).mean().item() == pytest.approx(theirs, rel=1e-12)


def test_parity_says_the_true_frequency():
    found = [fourier.park_kim_frequency(rows) for rows in (14, 7, 56, 8)]
    assert found == pytest.approx([6 / 7, 6 / 7, 27 / 28, 3 / 4])


def test_parity_knows_square_grids_alone(generator):
    assert fourier.park_kim(random(generator, "oblong")).isnan().all()


def test_parseval_joins_the_spectrum_to_the_relative_variance(generator):
    maps = random(generator, "parseval")
    energies = torch.fft.fft2(maps, dim=(1, 2)).abs().square().sum(-1)
    share = 1 - energies[:, 0, 0] / energies.sum((1, 2))
    torch.testing.assert_close(share, relative_variance(maps.flatten(1, 2)))


def test_nyquist_is_among_the_frequencies_of_even_grids_alone():
    assert fourier.frequencies(8, 8).max() == 1
    assert fourier.frequencies(7, 7).max().item() == pytest.approx(6 / 7)


def test_white_noise_has_the_share_of_white_noise(generator):
    found = fourier.energy_share(random(generator, "white", (64, 14, 14, 32))).mean().item()
    assert found == pytest.approx(fourier.white_noise_share(14, 14), abs=0.003)


def test_permuting_the_patches_changes_the_spectrum(generator):
    maps = torch.cos(torch.arange(7).double())[None, :, None, None].expand(1, 7, 7, 1)
    order = torch.randperm(49, generator=generator("order"))
    other = maps.flatten(1, 2)[:, order].unflatten(1, (7, 7))
    assert (fourier.energy_share(other) - fourier.energy_share(maps)).abs() > 0.1


@pytest.mark.parametrize("measure", [fourier.log_amplitude, fourier.energy_share, fourier.park_kim])
def test_grids_below_7_by_7_are_refused(measure):
    with pytest.raises(ValueError, match=r"at least 7 x 7 patches, got 6 x 8\. Take a model with smaller patches"):
        measure(torch.ones(1, 6, 8, 2))
