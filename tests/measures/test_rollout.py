import numpy as np
import torch

from ssat_probe.measures.rollout import rollout, with_block

BLOCKS, BATCH, HEADS, TOKENS = 3, 2, 5, 7


def weights() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BLOCKS, BATCH, HEADS, TOKENS, TOKENS, generator=generator, dtype=torch.float64).softmax(-1)


def test_attention_to_oneself_rolls_out_to_oneself():
    identity = torch.eye(TOKENS, dtype=torch.float64)
    torch.testing.assert_close(rollout(identity.expand(BLOCKS, BATCH, HEADS, -1, -1)), identity.expand(BATCH, -1, -1))


def test_uniform_attention_mixes_half_of_what_is_left_in_every_block():
    uniform = torch.full((BLOCKS, BATCH, HEADS, TOKENS, TOKENS), 1 / TOKENS, dtype=torch.float64)
    share = 0.5**BLOCKS  # (I + U)/2 to the power b is 2^-b I + (1 - 2^-b) U, because U U = U
    expected = share * torch.eye(TOKENS) + (1 - share) / TOKENS
    torch.testing.assert_close(rollout(uniform), expected.double().expand(BATCH, -1, -1))


def test_one_step_to_the_left_in_every_block():
    shift = torch.eye(TOKENS, dtype=torch.float64).roll(-1, 0)  # token i attends to token i + 1
    found = rollout(shift.expand(2, 1, 1, -1, -1))[0]
    np.testing.assert_allclose(found[0, :4], [1 / 4, 1 / 2, 1 / 4, 0])


def test_against_a_plain_loop_on_rows_that_are_not_symmetric():
    for image in range(BATCH):
        product = np.eye(TOKENS)
        for block in weights()[:, image].numpy():
            mixed = 0.5 * block.mean(0) + 0.5 * np.eye(TOKENS)
            product = (mixed / mixed.sum(axis=1, keepdims=True)) @ product
        np.testing.assert_allclose(rollout(weights())[image], product, atol=1e-14)


def test_rows_sum_to_1_columns_do_not_and_order_matters():
    found = rollout(weights())
    torch.testing.assert_close(found.sum(-1), torch.ones(BATCH, TOKENS).double())
    assert (found.sum(-2) - 1).abs().max() > 1e-3
    assert (rollout(weights().flip(0)) - found).abs().max() > 1e-3


def test_block_by_block_is_all_at_once():
    found = torch.eye(TOKENS).double().expand(BATCH, -1, -1)
    for block in weights():
        found = with_block(found, block)
    torch.testing.assert_close(found, rollout(weights()))
