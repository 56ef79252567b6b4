import math
from collections.abc import Callable

import pytest
import torch

from ssat_probe.network import build_encoder
from ssat_probe.objectives import behind_encoder, dino

Make = Callable[..., tuple]
BATCH, PROTOTYPES = 5, 7


def parts(make_recipe: Make, **fields: object) -> tuple:
    recipe, facts = make_recipe(method="ssl_ft", task="dino", **fields)
    encoder = build_encoder(recipe, facts)
    head = behind_encoder(recipe, facts, encoder)
    assert head is not None
    return dino.Objective(recipe, encoder.double(), head.double()), encoder, head


def batch_of(generator: Callable[[str], torch.Generator]) -> tuple[torch.Tensor, ...]:
    images, other = torch.randn(2, BATCH, 1, 8, 8, generator=generator("images"), dtype=torch.float64)
    return images, torch.zeros(BATCH, dtype=torch.int64), torch.rand(BATCH, 16), other


def by_hand(student: torch.Tensor, teacher: torch.Tensor, centre: torch.Tensor) -> float:
    """Caron et al. (2021), Eqs. 1 and 2, number by number."""
    total = 0.0
    for scores, targets in zip(student.tolist(), teacher.tolist(), strict=True):
        sharp = [math.exp((t - c) / 0.04) for t, c in zip(targets, centre.tolist(), strict=True)]
        soft = [math.exp(s / 0.1) for s in scores]
        total -= sum(p / sum(sharp) * math.log(q / sum(soft)) for p, q in zip(sharp, soft, strict=True))
    return total / len(student)


def test_the_loss_is_the_closed_form(generator: Callable[[str], torch.Generator]) -> None:
    student, teacher = torch.rand(2, BATCH, PROTOTYPES, generator=generator("scores"), dtype=torch.float64)
    centre = torch.rand(PROTOTYPES, generator=generator("centre"), dtype=torch.float64)
    got = dino.distillation(student, teacher.requires_grad_(), centre)
    assert float(got) == pytest.approx(by_hand(student, teacher, centre), rel=1e-12)
    assert not got.requires_grad  # the teacher learns nothing


def test_a_centre_takes_a_prototype_that_always_wins_away_and_the_temperature_sharpens() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.1]], dtype=torch.float64)
    # Centred on itself the teacher knows nothing, and a student that knows nothing costs log 3.
    assert float(dino.distillation(torch.zeros_like(scores), scores, scores[0])) == pytest.approx(math.log(3))
    # Uncentred, its winner has all the weight but exp(-0.8 / 0.04).
    student = torch.tensor([[0.3, 0.0, 0.0]], dtype=torch.float64)
    winner = -math.log(math.exp(3) / (math.exp(3) + 2))
    got = float(dino.distillation(student, scores, torch.zeros(3, dtype=torch.float64)))
    assert got == pytest.approx(winner, rel=1e-6)


def test_each_view_of_the_student_meets_the_teachers_other_one_and_the_centre_moves(
    make_recipe: Make, generator: Callable[[str], torch.Generator]
) -> None:
    objective, encoder, head = parts(make_recipe)
    batch = batch_of(generator)
    head.centre.uniform_(-0.1, 0.1, generator=generator("centre"))
    before = head.centre.clone()
    losses = objective(*batch)
    with torch.no_grad():
        student = [head.projection(encoder.encode(view).class_token) for view in (batch[0], batch[3])]
        teacher = [head.teacher_projection(head.teacher.encode(view).class_token) for view in (batch[0], batch[3])]
    expected = (by_hand(student[0], teacher[1], before) + by_hand(student[1], teacher[0], before)) / 2
    assert float(losses.total.detach()) == pytest.approx(expected, rel=1e-10)
    assert losses.auxiliary == losses.total
    mean = torch.cat(teacher).mean(dim=0)
    torch.testing.assert_close(head.centre, 0.9 * before + 0.1 * mean, rtol=1e-12, atol=1e-14)
    objective.eval()(*batch)
    torch.testing.assert_close(head.centre, 0.9 * before + 0.1 * mean, rtol=1e-12, atol=1e-14)


def test_the_teacher_begins_as_the_student_learns_nothing_and_follows(
    make_recipe: Make, generator: Callable[[str], torch.Generator]
) -> None:
    objective, encoder, head = parts(make_recipe, model="cvt_nano")
    start = {name: value.clone() for name, value in head.teacher.state_dict().items()}
    assert all(torch.equal(value, start[name]) for name, value in encoder.state_dict().items())
    objective(*batch_of(generator)).total.backward()
    assert all(parameter.grad is None for parameter in head.teacher.parameters())
    assert all(parameter.grad is None for parameter in head.teacher_projection.parameters())
    without = {name for name, one in objective.named_parameters() if one.requires_grad and one.grad is None}
    assert without == {"encoder.head.weight", "encoder.head.bias", "encoder.mask_token"}
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1.0)
    teacher = {name: value.clone() for name, value in head.teacher.state_dict().items()}  # its statistics have moved
    objective.after_step()
    for name, value in head.teacher.state_dict().items():
        student = encoder.state_dict()[name]
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.996 * teacher[name] + 0.004 * student, rtol=1e-6, atol=1e-12)
        else:
            assert torch.equal(value, student)


def test_the_teacher_skips_no_branch(make_recipe: Make) -> None:
    _, encoder, head = parts(make_recipe, drop_path=0.5)
    images = torch.randn(BATCH, 1, 8, 8, dtype=torch.float64)
    for module, alike in ((encoder, False), (head.teacher, True)):
        first, second = (module.train().encode(images).summary for _ in range(2))
        assert torch.equal(first, second) is alike


def test_a_head_of_another_kind_is_refused(make_recipe: Make) -> None:
    recipe, facts = make_recipe()
    with pytest.raises(ValueError, match="The dino task needs its Head, got Linear"):
        dino.Objective(recipe, build_encoder(recipe, facts), torch.nn.Linear(2, 2))


def test_against_lightly(make_recipe: Make, generator: Callable[[str], torch.Generator]) -> None:
    lightly = pytest.importorskip("lightly.loss")
    objective, encoder, head = parts(make_recipe)
    peer = lightly.DINOLoss(
        output_dim=len(head.centre), teacher_temp=dino.TEACHER_TEMPERATURE, student_temp=dino.STUDENT_TEMPERATURE,
        center_momentum=dino.CENTRE_MOMENTUM,
    ).double()  # fmt: skip
    images, labels, noise, other = batch_of(generator)
    with torch.no_grad():
        teacher = [head.teacher_projection(head.teacher.encode(view).summary) for view in (images, other)]
        student = [head.projection(encoder.encode(view).summary) for view in (images, other)]
        for _ in range(3):  # the centre moves
            expected = float(peer(teacher, student))
            assert float(objective(images, labels, noise, other).total) == pytest.approx(expected, rel=1e-6)
            # rel 1e-6: lightly rounds the teacher's temperature to float32.
            torch.testing.assert_close(head.centre, peer.center.flatten(), rtol=1e-12, atol=1e-15)
