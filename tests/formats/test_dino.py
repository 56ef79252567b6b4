"""DINO's training files: the teacher's backbone before the student's, the projection head left out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssat_probe.foreign import Foreign
from ssat_probe.formats import detect

Lively = Callable[..., nn.Module]
Open = Callable[..., Foreign]
HEAD = {"head.mlp.0.weight": torch.zeros(5, 128), "head.last_layer.weight_g": torch.zeros(5, 1)}


def test_teacher_and_student(
    lively: Lively, opened: Open, logits: Callable[[Foreign, Tensor], Tensor], images: Tensor
) -> None:
    teacher, student = lively(num_classes=0), lively(num_classes=0)
    behind = {f"backbone.{name}": value for name, value in teacher.state_dict().items()} | HEAD
    content = {
        "student": {
            f"module.{name}": value
            for name, value in ({f"backbone.{n}": v for n, v in student.state_dict().items()} | HEAD).items()
        },
        "teacher": behind,
        "epoch": 3,
        "dino_loss": {"center": torch.zeros(1, 5)},
    }
    assert detect(behind) == "dino"
    foreign = opened(content)
    assert (foreign.report.entry, foreign.report.layout) == ("teacher", "dino")
    assert set(foreign.report.dropped) == set(HEAD)
    assert torch.equal(logits(foreign, images), teacher(images))
    assert torch.equal(logits(opened(content, entry="student"), images), student(images))


def test_a_backbone_file_is_flat(
    lively: Lively, opened: Open, logits: Callable[[Foreign, Tensor], Tensor], images: Tensor
) -> None:
    model = lively(num_classes=0)
    assert torch.equal(logits(opened(model.state_dict()), images), model(images))
