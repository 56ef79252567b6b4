"""Gauss-Newton operator against JᵀHJ assembled from Jacobians, and cases where it is the Hessian."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssat_probe.measures.certificate import certify
from ssat_probe.measures.dense import dense
from ssat_probe.measures.gauss_newton import cross_entropy_output, gauss_newton, squared_error_output
from ssat_probe.measures.hessian import HessianOperator


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    torch.manual_seed(5)
    sizes = {"img_size": 6, "patch_size": 3, "in_chans": 1, "num_classes": 3, "embed_dim": 6, "depth": 1}
    return VisionTransformer(**sizes, num_heads=2, mlp_ratio=1).double().eval()


def pairs(size: int) -> list:
    images = torch.randn(11, 1, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [(one, len(one)) for one in images.split(size)]


def jacobian(vit: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Rows: image times class."""
    with sdpa_kernel(SDPBackend.MATH):
        logits = vit(images)
    rows = [torch.autograd.grad(one, list(vit.parameters()), retain_graph=True) for one in logits.reshape(-1)]
    return torch.stack([torch.cat([block.reshape(-1) for block in row]) for row in rows])


@pytest.mark.parametrize("size", [4, 11])
def test_cross_entropy_against_assembled_jacobians_through_layer_norm(vit, size):
    matrix = dense(gauss_newton(dict(vit.named_parameters()), lambda x: cross_entropy_output(vit(x)), pairs(size)))
    images = torch.cat([one for one, _ in pairs(11)])
    rows, shares = jacobian(vit, images).reshape(11, 3, -1), vit(images).softmax(dim=1).detach()
    output = torch.diag_embed(shares) - shares[:, :, None] * shares[:, None]
    wanted = torch.einsum("ncp,ncd,ndq->pq", rows, output, rows) / 11
    torch.testing.assert_close(matrix, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))
    values = torch.linalg.eigvalsh(matrix)
    assert values[0] > -1e-12 * values[-1]
    assert (values > 1e-9 * values[-1]).sum() <= 11 * 2


def test_squared_error_against_assembled_jacobians(vit):
    operator = gauss_newton(
        dict(vit.named_parameters()), lambda x: squared_error_output(vit(x), 1 / (3 * len(x))), pairs(4)
    )
    rows = jacobian(vit, torch.cat([one for one, _ in pairs(11)]))
    torch.testing.assert_close(dense(operator), 2 / 33 * rows.T @ rows, rtol=0, atol=1e-11)


def test_of_a_linear_network_it_is_the_hessian():
    torch.manual_seed(0)
    layer, images, labels = nn.Linear(7, 5).double(), torch.randn(13, 7).double(), torch.randint(5, (13,))
    parameters = dict(layer.named_parameters())
    whole = HessianOperator(parameters, lambda b: F.cross_entropy(layer(b[0]), b[1]), [((images, labels), 13)])
    part = gauss_newton(parameters, lambda x: cross_entropy_output(layer(x)), [(images, 13)])
    torch.testing.assert_close(dense(part), dense(whole), rtol=0, atol=1e-14)


def test_it_passes_the_same_certificate(vit):
    operator = gauss_newton(dict(vit.named_parameters()), lambda x: cross_entropy_output(vit(x)), pairs(4))
    assert [check.name for check in certify(operator).checks] == [
        "determinism",
        "reduction",
        "symmetry",
        "finite difference",
    ]
