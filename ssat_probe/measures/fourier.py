"""How much of a feature map lies at high spatial frequencies."""

import torch
from jaxtyping import Float
from torch import Tensor

HIGH = 2 / 3
"High frequencies: from two thirds of the Nyquist frequency on, in either direction."

SMALLEST_GRID = 7
"Rows and columns below which a spectrum says too little."

COARSE_GRID = 14
"Rows and columns below which a spectrum is coarse; Park & Kim look at 14 x 14 and 56 x 56."

_ROUNDINGS = 8


def log_amplitude(maps: Float[Tensor, "batch row column dim"]) -> Float[Tensor, " batch"]:
    """Log amplitude of the high frequencies relative to that of frequency 0: low-pass filters lower it.

    ln(|F| + e) averaged over channels and over all frequencies from `HIGH` on, the Nyquist frequency included, minus
    the same at frequency 0; e is 1e-6 times the root mean square of |F| over the image. For the convention of Park &
    Kim's code see `park_kim`, which cannot see the Nyquist frequency.

    Args:
        maps: Patch tokens as feature maps; a ValueError below 7 x 7.

    Returns:
        Natural logarithm, float64. NaN where all features are 0.

    References:
        Park & Kim (2022), "How do vision transformers work?", Fig. 2, https://arxiv.org/abs/2202.06709
    """
    amplitudes = _amplitudes(maps)
    size = amplitudes.square().mean((1, 2, 3), keepdim=True).sqrt()
    logs = (amplitudes + 1e-6 * torch.where(size > 0, size, torch.nan)).log()
    is_high = frequencies(*maps.shape[1:3]) >= HIGH - 1e-9
    return logs[:, is_high.to(logs.device)].mean((1, 2)) - logs[:, 0, 0].mean(-1)


def energy_share(maps: Float[Tensor, "batch row column dim"]) -> Float[Tensor, " batch"]:
    """Share of the energy at high frequencies in all energy but that of frequency 0.

    Args:
        maps: Patch tokens as feature maps; a ValueError below 7 x 7.

    Returns:
        Between 0 and 1 (all at high frequencies, as in a checkerboard), float64; `white_noise_share` for noise without
        spatial structure. NaN where the maps are constant up to rounding.
    """
    energies = _amplitudes(maps).square().sum(-1)
    everything = energies.sum((1, 2))
    varying = everything - energies[:, 0, 0]
    threshold = (_ROUNDINGS * torch.finfo(maps.dtype).eps) ** 2 * everything
    is_high = (frequencies(*maps.shape[1:3]) >= HIGH - 1e-9).to(energies.device)
    return energies[:, is_high].sum(-1) / torch.where(varying > threshold, varying, torch.nan)


def white_noise_share(rows: int, columns: int) -> float:
    """Expected `energy_share` of noise without spatial structure.

    Args:
        rows: Of the grid.
        columns: Of the grid.

    Returns:
        Number of high frequencies over that of all but 0.
    """
    return float((frequencies(rows, columns) >= HIGH - 1e-9).sum()) / (rows * columns - 1)


def park_kim(maps: Float[Tensor, "batch row column dim"]) -> Float[Tensor, " batch"]:
    """Parity with the code of Park & Kim: the last point of the half diagonal of the log spectrum, minus its first.

    ln(|F| + 1e-6), mean over channels, along the diagonal from frequency 0 outwards. Their figures call this point π;
    `park_kim_frequency` says where it lies. Blind to the Nyquist frequency of even grids.

    Args:
        maps: Patch tokens as feature maps; a ValueError below 7 x 7.

    Returns:
        Natural logarithm, float64. NaN for grids that are not square, which their code does not know.
    """
    amplitudes = _amplitudes(maps)
    rows, columns = maps.shape[1:3]
    if rows != columns:
        return amplitudes.new_full((len(maps),), torch.nan)
    last = (rows - 1) // 2
    return (amplitudes[:, last, last] + 1e-6).log().mean(-1) - (amplitudes[:, 0, 0] + 1e-6).log().mean(-1)


def park_kim_frequency(rows: int) -> float:
    """Frequency of the point that `park_kim` looks at.

    Args:
        rows: Of a square grid.

    Returns:
        In units of π: 6/7 for 14 and for 7 rows, 27/28 for 56, 3/4 for 8.
    """
    return 2 * ((rows - 1) // 2) / rows


def frequencies(rows: int, columns: int) -> Float[Tensor, "row column"]:
    """The larger of the two spatial frequencies of each entry of a discrete Fourier transform.

    Args:
        rows: Of the grid.
        columns: Of the grid.

    Returns:
        In units of π, between 0 and 1 (Nyquist, on even grids), in the order of `torch.fft.fft2`.
    """
    high, wide = (2 * torch.fft.fftfreq(count, dtype=torch.float64).abs() for count in (rows, columns))
    return torch.maximum(high[:, None], wide[None, :])


def check_grid(rows: int, columns: int) -> None:
    """Refuse a grid on which a spectrum says too little.

    Args:
        rows: Of the grid.
        columns: Of the grid.

    Raises:
        ValueError: If it is smaller than 7 x 7.
    """
    if min(rows, columns) < SMALLEST_GRID:
        raise ValueError(
            f"Spatial frequencies need a grid of at least {SMALLEST_GRID} x {SMALLEST_GRID} patches, got "
            f"{rows} x {columns}. Take a model with smaller patches or larger images."
        )


def _amplitudes(maps: Tensor) -> Tensor:
    check_grid(*maps.shape[1:3])
    return torch.fft.fft2(maps.double(), dim=(1, 2)).abs()
