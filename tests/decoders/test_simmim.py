from collections.abc import Callable

import pytest
import torch

from ssat_probe.decoders.simmim import Decoder
from ssat_probe.patches import Features, patchify

BATCH, GRID, DIM, PATCH, CHANNELS = 3, (2, 5), 7, (3, 3), 2


def made() -> Decoder:
    torch.manual_seed(4)
    return Decoder(encoder_dim=DIM, patch_values=PATCH[0] * PATCH[1] * CHANNELS, grid=GRID, depth=1).double()


def test_it_is_a_1x1_convolution_and_a_pixel_shuffle(generator: Callable[[str], torch.Generator]) -> None:
    decoder = made()
    tokens = torch.randn(BATCH, 10, DIM, generator=generator("tokens"), dtype=torch.float64)
    convolution = torch.nn.Conv2d(DIM, 18, 1).double()
    # A pixel shuffle wants channels outer and pixels inner.
    order = torch.arange(18).view(3, 3, CHANNELS).permute(2, 0, 1).flatten()
    convolution.weight.data = decoder.pred.weight.data[order, :, None, None]
    convolution.bias.data = decoder.pred.bias.data[order] + 0.5  # type: ignore[union-attr]
    decoder.pred.bias.data += 0.5
    images = torch.nn.functional.pixel_shuffle(convolution(tokens.mT.unflatten(2, GRID)), 3)
    got = decoder(Features(tokens, None, GRID, None))
    torch.testing.assert_close(got, patchify(images, PATCH), rtol=0, atol=1e-13)


def test_features_without_the_hidden_patches_are_refused() -> None:
    features = Features(torch.zeros(BATCH, 3, DIM), None, GRID, torch.tensor([[1, 4, 6]] * BATCH))
    with pytest.raises(ValueError, match="needs a token for each of the 10 patches, got 3; use the shallow decoder"):
        made().float()(features)
