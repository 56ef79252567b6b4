"""Operators over a subject's images: sizes, arithmetic, both matrices."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

from ssat_probe.curvature import SizedBatches, constant, in_float64, l2_term, operators
from ssat_probe.measures.certificate import certify
from ssat_probe.measures.dense import dense
from ssat_probe.measures.exact import assembled
from ssat_probe.sample import Sample
from ssat_probe.subject import Subject


@pytest.fixture
def subject(checkpoints: dict[str, Path]) -> Subject:
    return Subject.of(checkpoints["ssat"], Sample(num_images=11, batch_size=4, device="cpu"), "train")


def test_batches_can_be_read_again_and_know_their_sizes(subject):
    batches = SizedBatches(subject.batches)
    for _ in range(2):
        assert [(len(batch.images), num) for batch, num in batches] == [(4, 4), (4, 4), (3, 3)]


def test_a_copy_in_float64_leaves_the_subject_as_it_is(subject):
    double = in_float64(subject)
    assert {p.dtype for p in double.parameters("joint").values()} == {torch.float64}
    assert {p.dtype for p in subject.parameters("joint").values()} == {torch.float32}
    assert next(double.batches()).images.dtype == torch.float64
    assert in_float64(double) is double


def test_both_matrices_are_over_the_chosen_parameters(subject):
    subject = in_float64(subject)
    plain, matrix = operators(subject, subject.parameters(), params=("head.*",), matrix="gauss_newton")
    assert plain.size == matrix.size == sum(p.numel() for p in subject.model.head.parameters())
    along = torch.randn(plain.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # of a linear head, the cross-entropy has no curvature but the Gauss-Newton one
    torch.testing.assert_close(plain.product(along), matrix.product(along), rtol=1e-10, atol=1e-12)
    batch = torch.cat([batch.images for batch in subject.batches()])
    labels = torch.cat([batch.labels for batch in subject.batches()])
    loss = F.cross_entropy(subject.model(batch), labels)
    assert plain.evaluate().loss == pytest.approx(float(loss.detach()), rel=1e-12)


def test_gauss_newton_of_the_reconstruction_against_assembled_jacobians(subject):
    subject = in_float64(subject)
    names = ("blocks.0.norm1.*", "decoder.pred.bias")
    _, matrix = operators(subject, subject.parameters("reconstruction"), "reconstruction", names, "gauss_newton")
    parameters, wanted = list(matrix.parameters.values()), 0
    for batch in subject.batches():
        mask = subject.masks(batch)
        predicted = subject.decoder(subject.model.encode(batch.images, mask))
        for image, hidden in zip(predicted, mask, strict=True):
            for value in image[hidden].flatten():  # of the square of each hidden pixel, by the definition of the loss
                row = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])
                wanted = wanted + 2 * torch.outer(row, row) / image[hidden].numel() / subject.num_images
    torch.testing.assert_close(dense(matrix), wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


def test_gauss_newton_of_the_reconstruction_is_the_hessian_where_the_network_is_linear(subject):
    subject = in_float64(subject)
    options = {"loss": "reconstruction", "params": ("decoder.pred.*",), "matrix": "gauss_newton"}
    plain, matrix = operators(subject, subject.parameters("reconstruction"), **options)
    assert float(dense(plain).abs().max()) > 0.01
    torch.testing.assert_close(dense(matrix), dense(plain), rtol=0, atol=1e-13)


def test_gauss_newton_of_the_joint_loss_is_the_weighted_sum_and_passes_the_certificate(subject):
    subject = in_float64(subject)
    everything, params = subject.parameters("joint"), ("blocks.1.norm2.*", "head.bias", "decoder.pred.bias")
    losses = ("cross_entropy", "reconstruction", "joint")
    pairs = {loss: operators(subject, everything, loss, params, "gauss_newton") for loss in losses}
    found = {loss: matrix for loss, (_, matrix) in pairs.items()}
    weight = subject.checkpoint.recipe.lambda_ends[1]
    wanted = weight * dense(found["cross_entropy"]) + (1 - weight) * dense(found["reconstruction"])
    torch.testing.assert_close(dense(found["joint"]), wanted, rtol=0, atol=1e-13 * float(wanted.abs().max()))
    assert 0 < weight < 1
    assert len(certify(found["joint"], evaluated=pairs["joint"][0]).checks) == 4


def test_the_plain_matrix_is_one_operator(subject):
    plain, matrix = operators(subject, subject.parameters("joint"), loss="joint")
    assert plain is matrix
    assert any(name.startswith("decoder.") for name in plain.parameters)


def test_the_l2_term_adds_the_decay_where_the_training_decays(subject):
    subject = in_float64(subject)
    everything = subject.parameters()
    plain, _ = operators(subject, everything)
    heavy, _ = operators(subject, everything, l2=True)
    decay = subject.checkpoint.recipe.weight_decay
    groups = {
        id(p): group["weight_decay"]
        for group in param_groups_weight_decay(subject.model, decay)
        for p in group["params"]
    }
    shift = torch.cat([torch.full((p.numel(),), groups[id(p)], dtype=torch.float64) for p in everything.values()])
    assert set(shift.tolist()) == {0.0, decay}
    along = torch.randn(plain.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(heavy.product(along), plain.product(along) + shift * along, rtol=1e-10, atol=1e-12)
    weights = torch.cat([p.detach().reshape(-1) for p in everything.values()])
    added = float((shift * weights**2).sum()) / 2
    assert heavy.evaluate().loss == pytest.approx(plain.evaluate().loss + added, rel=1e-12)


def test_an_l2_term_without_decay_is_refused(subject):
    with pytest.raises(ValueError, match=r"needs a weight decay above 0 .* got 0\.05 and 0 of 1"):
        l2_term({"head.bias": subject.model.head.bias}, 0.05)


def test_augmented_images_are_frozen(subject):
    subject = in_float64(subject)
    changed = [operators(subject, subject.parameters(), is_augmented=True)[0].evaluate() for _ in range(2)]
    assert changed[0].loss == changed[1].loss
    assert changed[0].loss != operators(subject, subject.parameters())[0].evaluate().loss


class TestPartOfAModel:
    PATTERN = "blocks.5.norm2.*"

    def test_its_exact_hessian_is_that_part_of_the_whole(self, subject):
        subject = in_float64(subject)
        everything = subject.parameters()
        part, _ = operators(subject, everything, params=(self.PATTERN,))
        whole, _ = operators(subject, everything)
        names = torch.cat([torch.full((one.numel(),), name in part.parameters) for name, one in everything.items()])
        places = names.nonzero()[:, 0]
        units = torch.zeros(len(places), whole.size, dtype=torch.float64)
        units[torch.arange(len(places)), places] = 1
        with whole:
            wanted = torch.cat([whole.products(some) for some in units.split(16)])[:, places]
        found = assembled(part)
        assert found.matrix.shape == (64, 64)
        assert float((found.matrix - wanted).norm() / wanted.norm()) < 1e-12

    def test_no_graph_is_recorded_below_it_and_the_model_is_left_as_found(self, subject):
        seen: dict[int, bool] = {}
        for place, block in enumerate(subject.model.blocks):
            block.register_forward_hook(lambda _, __, out, place=place: seen.update({place: out.requires_grad}))
        for matrix in ("hessian", "gauss_newton"):
            seen.clear()
            _, operator = operators(subject, subject.parameters(), params=(self.PATTERN,), matrix=matrix)
            operator.product(torch.ones(operator.size, dtype=torch.float64))
            assert seen == {**dict.fromkeys(range(5), False), 5: True}
        assert all(one.requires_grad for one in subject.model.parameters() if one is not subject.model.pos_embed)
        assert not subject.model.pos_embed.requires_grad

    def test_flags_come_back_after_an_exception_and_frozen_parameters_stay_frozen(self):
        free, frozen = (torch.ones(2, requires_grad=is_free) for is_free in (True, False))
        with constant([free, frozen]):
            assert not free.requires_grad

        def fail() -> None:
            raise RuntimeError("no such luck")

        with pytest.raises(RuntimeError, match="no such luck"), constant([free, frozen]):
            fail()
        assert (free.requires_grad, frozen.requires_grad) == (True, False)
