from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from ssat_probe.decoders.shallow import Decoder
from ssat_probe.patches import Features, sincos_positions

BATCH, GRID, ENCODER_DIM, WIDTH, HEADS, DEPTH, VALUES = 3, (2, 5), 7, 20, 5, 2, 11
VISIBLE = [[1, 4, 6], [0, 2, 9], [3, 5, 7]]


def made(**fields: object) -> Decoder:
    torch.manual_seed(4)
    options = {"encoder_dim": ENCODER_DIM, "grid": GRID, "patch_values": VALUES, "depth": DEPTH, "width": WIDTH}
    return Decoder(**(options | {"heads": HEADS} | fields)).double()  # type: ignore[arg-type]


@pytest.fixture
def features(generator: Callable[[str], torch.Generator]) -> Features:
    tokens = torch.randn(BATCH, 3, ENCODER_DIM, generator=generator("tokens"), dtype=torch.float64)
    class_token = torch.randn(BATCH, ENCODER_DIM, generator=generator("class"), dtype=torch.float64)
    return Features(tokens, class_token, GRID, torch.tensor(VISIBLE))


def test_hidden_places_hold_the_mask_token_and_visible_ones_their_own(features: Features) -> None:
    decoder = made()
    # The blocks of timm's transformer, fed token by token.
    blocks = VisionTransformer(
        img_size=GRID, patch_size=1, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0
    ).double().blocks  # fmt: skip
    blocks.load_state_dict(decoder.blocks.state_dict())
    table = sincos_positions(WIDTH, GRID, with_class_token=True).double()
    for row, ids in enumerate(VISIBLE):
        tokens = [decoder.embed(features.class_token[row])]
        for place in range(GRID[0] * GRID[1]):
            seen = place in ids
            tokens.append(decoder.embed(features.tokens[row, ids.index(place)]) if seen else decoder.mask_token[0, 0])
        out = decoder.pred(decoder.norm(blocks((torch.stack(tokens) + table)[None])))[0, 1:]
        torch.testing.assert_close(decoder(features)[row], out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("has_class_token", [True, False])
@pytest.mark.parametrize("is_fused", [True, False])
def test_hidden_patches_alone_are_as_among_all(
    features: Features, depth: int, has_class_token: bool, is_fused: bool
) -> None:
    decoder = made(depth=depth, with_class_token=has_class_token)
    for block in decoder.blocks:
        block.attn.fused_attn = is_fused
    if not has_class_token:
        features = Features(features.tokens, None, GRID, features.visible_ids)
    features.tokens.requires_grad_()
    given = [features.tokens, *(value for value in decoder.parameters() if value.requires_grad)]
    chosen = decoder(features, hidden_only=True)
    among_all = decoder(features).gather(1, features.hidden_ids[:, :, None].expand(-1, -1, VALUES))
    assert chosen.shape == (BATCH, 7, VALUES)
    torch.testing.assert_close(chosen, among_all, rtol=0, atol=1e-13)
    of_chosen, of_all = (torch.autograd.grad(out.square().sum(), given) for out in (chosen, among_all))
    for one, other in zip(of_chosen, of_all, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_full_pass_has_no_hidden_patches_to_choose(generator: Callable[[str], torch.Generator]) -> None:
    decoder = made()
    tokens = torch.randn(BATCH, 10, ENCODER_DIM, generator=generator("full"), dtype=torch.float64)
    full = Features(tokens, tokens.mean(1), GRID, None)
    assert torch.equal(decoder(full, hidden_only=True), decoder(full))


def test_the_order_in_which_visible_tokens_come_does_not_matter(features: Features) -> None:
    decoder = made()
    order = torch.tensor([2, 0, 1])
    assert features.visible_ids is not None
    other = Features(features.tokens[:, order], features.class_token, GRID, features.visible_ids[:, order])
    torch.testing.assert_close(decoder(other), decoder(features), rtol=0, atol=1e-13)


def test_all_tokens_of_a_full_pass_are_taken_in_raster_order(generator: Callable[[str], torch.Generator]) -> None:
    decoder = made()
    tokens = torch.randn(BATCH, 10, ENCODER_DIM, generator=generator("full"), dtype=torch.float64)
    class_token = tokens.mean(1)
    ids = torch.arange(10).expand(BATCH, -1)
    full, by_ids = Features(tokens, class_token, GRID, None), Features(tokens, class_token, GRID, ids)
    assert torch.equal(decoder(full), decoder(by_ids))
    assert decoder(full).shape == (BATCH, 10, VALUES)
    assert decoder(by_ids, hidden_only=True).shape == (BATCH, 0, VALUES)


def test_an_encoder_without_class_token_is_decoded_too(features: Features) -> None:
    decoder = made(with_class_token=False)
    assert decoder.pos_embed.shape == (1, 10, WIDTH)
    assert decoder(Features(features.tokens, None, GRID, features.visible_ids)).shape == (BATCH, 10, VALUES)


def test_positions_are_fixed_and_the_mask_token_is_learnt(features: Features) -> None:
    decoder = made()
    decoder(features).sum().backward()
    assert not decoder.pos_embed.requires_grad
    assert decoder.mask_token.grad is not None
    assert decoder.mask_token.grad.any()


def test_heads_that_do_not_divide_the_width_are_named() -> None:
    with pytest.raises(ValueError, match="decoder_width must be a multiple of decoder_heads 3, got 20; change either"):
        made(heads=3)
