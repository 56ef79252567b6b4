"""Self-distillation from a moving average of the encoder itself (Caron et al., 2021: DINO), of two full views."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import DropPath
from torch import Tensor, nn

from ssat_probe.losses import Losses
from ssat_probe.patches import Features
from ssat_probe.recipe import Recipe
from ssat_probe.sharing import mean

STUDENT_TEMPERATURE = 0.1
"Caron et al. (2021), Sec. 3.1."

TEACHER_TEMPERATURE = 0.04
"Sharpens the teacher: Caron et al. (2021), where its warm-up from 0.04 begins."

MOMENTUM = 0.996
"Of the teacher's weights: Caron et al. (2021), where its rise to 1 begins; here it stays, runs being short."

CENTRE_MOMENTUM = 0.9
"Of the centre: Caron et al. (2021), Sec. 3.1."

PROTOTYPES = 16
"Outputs in units of the encoder's width, so that tiny encoders get tiny heads; 65,536 in all in the paper. Not tuned."


class Projection(nn.Module):
    """Three linear maps with GELU, then cosine similarities to prototypes of unit length."""

    def __init__(self, dim: int) -> None:
        """Make it with fresh weights, from torch's global generator.

        Args:
            dim: Width of the encoder.
        """
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.prototypes = nn.Parameter(torch.empty(PROTOTYPES * dim, dim))
        for weight in (self.fc1.weight, self.fc2.weight, self.fc3.weight, self.prototypes):
            nn.init.trunc_normal_(weight, std=0.02)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.zeros_(layer.bias)

    def forward(self, summary: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch prototype"]:
        """Scores of the prototypes.

        Args:
            summary: Of the encoder's features.

        Returns:
            Between -1 and 1.
        """
        hidden = self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(summary)))))
        return F.linear(F.normalize(hidden, dim=1), F.normalize(self.prototypes, dim=1))


class Head(nn.Module):
    """What DINO needs beside the encoder: a projection, the teacher, which is never trained, and the centre."""

    def __init__(self, encoder: Any) -> None:
        """Make the projection with fresh weights, from torch's global generator; the teacher begins as a copy.

        Args:
            encoder: The student.
        """
        super().__init__()
        self.projection = Projection(encoder.dim)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        for module in self.teacher.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0  # what is to be matched is all of the teacher, as in the authors' code
        self.teacher_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(PROTOTYPES * encoder.dim))

    @torch.no_grad()
    def follow(self, encoder: nn.Module) -> None:
        """Move the teacher's weights and statistics a little towards the student's.

        Args:
            encoder: The student.
        """
        for mine, theirs in ((self.teacher, encoder), (self.teacher_projection, self.projection)):
            student = theirs.state_dict()
            for name, value in mine.state_dict().items():
                if value.is_floating_point():
                    value.lerp_(student[name], 1 - MOMENTUM)
                else:
                    value.copy_(student[name])


class Objective(nn.Module):
    """Cross-entropy of the student's view of an image with the teacher's other view."""

    num_views = 2
    masks = False

    def __init__(self, recipe: Recipe, encoder: Any, decoder: nn.Module | None) -> None:
        """Wrap the modules.

        Args:
            recipe: Not used.
            encoder: Encoder; its head gets no gradient.
            decoder: A ``Head``.

        Raises:
            ValueError: If there is no head.
        """
        super().__init__()
        if not isinstance(decoder, Head):
            raise ValueError(f"The dino task needs its Head, got {type(decoder).__name__}; make one first.")
        self.encoder, self.distillation = encoder, decoder

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        labels: Int[Tensor, " batch"],
        noise: Float[Tensor, "batch token"],
        other: Float[Tensor, "batch channel height width"],
        features: Features | None = None,
    ) -> Losses:
        """Loss of a batch; in training the centre moves too.

        Args:
            images: Normalised images.
            labels: Not used.
            noise: Not used: nothing is masked.
            other: The same images, augmented once more.
            features: Of a full pass of ``images``, where they are known already.

        Returns:
            The mean over both pairings of views.
        """
        head = self.distillation
        features = self.encoder.encode(images) if features is None else features
        student = [head.projection(one.summary) for one in (features, self.encoder.encode(other))]
        with torch.no_grad():
            teacher = [head.teacher_projection(head.teacher.encode(view).summary) for view in (images, other)]
        centre = head.centre.clone()
        loss = (distillation(student[0], teacher[1], centre) + distillation(student[1], teacher[0], centre)) / 2
        if self.training:
            average = mean(torch.cat(teacher).mean(dim=0).to(centre.dtype))
            head.centre.lerp_(average, 1 - CENTRE_MOMENTUM)
        return Losses(loss, auxiliary=loss.detach())

    def after_step(self) -> None:
        """Let the teacher follow; once per step of the optimiser."""
        self.distillation.follow(self.encoder)


def distillation(
    student: Float[Tensor, "batch prototype"],
    teacher: Float[Tensor, "batch prototype"],
    centre: Float[Tensor, " prototype"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the student's probabilities with the centred and sharpened ones of the teacher.

    Args:
        student: Scores.
        teacher: Scores; get no gradient.
        centre: Running mean of the teacher's scores; taken off, it keeps one prototype from winning always.

    Returns:
        Mean over the batch in nats, at least in float32.

    References:
        Caron et al. (2021), Eqs. 1 to 4, https://arxiv.org/abs/2104.14294.
    """
    student, teacher = (
        one.float() if one.dtype in (torch.float16, torch.bfloat16) else one for one in (student, teacher.detach())
    )
    probabilities = ((teacher - centre) / TEACHER_TEMPERATURE).softmax(dim=1)
    return -(probabilities * (student / STUDENT_TEMPERATURE).log_softmax(dim=1)).sum(dim=1).mean()
