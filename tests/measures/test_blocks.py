"""Blocks in lock-step against operators of their own; how often the graph is made."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from ssat_probe.measures.blocks import BlockOperator, block_runs, grouped
from ssat_probe.measures.dense import dense
from ssat_probe.measures.hessian import HessianOperator
from ssat_probe.measures.lanczos import lanczos


class Counted:
    """Cross-entropy of a small ViT in float64, with the number of its forward passes."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 6, "depth": 2}
        self.model = VisionTransformer(**sizes, num_heads=2, mlp_ratio=2).double().eval()
        self.calls = 0
        images, labels = torch.randn(11, 1, 8, 8).double(), torch.randint(3, (11,))
        self.pairs = [((x, y), len(x)) for x, y in zip(images.split(7), labels.split(7), strict=True)]

    def __call__(self, batch: tuple) -> torch.Tensor:
        self.calls += 1
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def groups(self) -> dict[str, dict[str, torch.Tensor]]:
        parameters = dict(self.model.named_parameters())
        return {label: {name: parameters[name] for name in names} for label, names in grouped(parameters).items()}


@pytest.fixture
def loss() -> Counted:
    return Counted()


def test_parameters_are_grouped_by_part(loss):
    assert list(loss.groups()) == ["embedding", "blocks.0", "blocks.1", "norm", "head"]
    names = ["layers.0.blocks.1.attn.qkv.weight", "layers.0.downsample.norm.bias", "stages.2.blocks.0.gamma"]
    assert grouped(names) == {
        "layers.0.blocks.1": [names[0]],
        "layers": [names[1]],
        "stages.2.blocks.0": [names[2]],
    }


def test_products_are_those_of_operators_of_their_own(loss):
    operator = BlockOperator(loss.groups(), loss, loss.pairs)
    generator = torch.Generator().manual_seed(0)
    vectors = {
        label: torch.randn(operator.block_size(label), generator=generator, dtype=torch.float64)
        for label in operator.blocks
    }
    found = operator.block_products(vectors)
    for label, block in loss.groups().items():
        alone = HessianOperator(block, loss, loss.pairs).product(vectors[label])
        torch.testing.assert_close(found[label], alone, rtol=1e-11, atol=1e-13)


def test_blocks_are_those_on_the_diagonal_of_the_whole(loss):
    groups = {label: loss.groups()[label] for label in ("norm", "head")}
    operator = BlockOperator(groups, loss, loss.pairs)
    whole = dense(operator)
    runs = block_runs(operator, 40)
    place = 0
    for label, run in runs.items():
        stop = place + operator.block_size(label)
        true = torch.linalg.eigvalsh(whole[place:stop, place:stop]).numpy()
        np.testing.assert_allclose(np.linalg.eigvalsh(run.matrix)[[0, -1]], true[[0, -1]], rtol=1e-8, atol=1e-10)
        place = stop


def test_runs_in_step_are_those_one_after_the_other_for_a_fraction_of_the_forward_passes(loss):
    operator = BlockOperator(loss.groups(), loss, loss.pairs)
    told: list[int] = []
    runs = block_runs(operator, 15, seed=3, on_step=told.append)
    assert told == list(range(1, 16))
    assert loss.calls == 15 * 2 == operator.num_graphs  # batches, not batches times blocks
    for label, block in loss.groups().items():
        own = HessianOperator(block, loss, loss.pairs)
        alone = lanczos(own.product, own.size, 15, seed=3)
        num = min(8, own.size)
        np.testing.assert_allclose(runs[label].alphas[:num], alone.alphas[:num], rtol=1e-7, atol=1e-9)
        assert len(runs[label].alphas) == min(15, own.size)


def test_frozen_and_unused_parameters_are_zero(loss):
    loss.model.norm.weight.requires_grad_(False)
    groups = loss.groups() | {"spare": {"spare": torch.nn.Parameter(torch.ones(3).double())}}
    operator = BlockOperator(groups, loss, loss.pairs)
    found = operator.block_products({"norm": torch.ones(12).double(), "spare": torch.ones(3).double()})
    assert (found["spare"] == 0).all()
    assert (found["norm"][:6] == 0).all()
    assert (found["norm"][6:] != 0).any()
