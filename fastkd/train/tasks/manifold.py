"""Fine-grained manifold distillation: relations between patches, images and random tokens of matched layers."""

from typing import Any

from torch import Tensor, nn

from fastkd.losses import ManifoldLoss
from fastkd.train.models import input_size, layers_of, match_layers
from fastkd.train.options import Size

from .base import DistillationTask, FeatureLoss, Layers, Parts
from .grids import Grid, grids_of, resized


class _ManifoldFeatures(FeatureLoss):
    name = "manifold"

    def __init__(
        self, student_layers: list[str], teacher_layers: list[str], loss: ManifoldLoss, grids: list[tuple[Grid, Grid]]
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.loss, self.grids = loss, grids

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[Tensor, Parts]:
        if self.grids:
            teachers = resized(teachers, self.grids)
        loss, terms = self.loss(students, teachers, return_terms="detached")
        return loss, dict(zip(("intra", "inter", "random"), terms, strict=True))


class ManifoldTask(DistillationTask):
    """Hao et al. 2022 (arXiv:2107.01378): similarities between patches of an image, between images at a patch, and
    between random tokens, of the first four and the last four blocks.

    Class tokens are dropped in both networks (the official code keeps them if both have one).

    Args:
        intra, inter, random, num_samples: as fastkd.losses.ManifoldLoss.
        interpolate: resize the teacher's token grid to the student's where they differ, which is else an error.
        common: as DistillationTask.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        student_layers: Layers | None = None,
        teacher_layers: Layers | None = None,
        intra: float = 4.0,
        inter: float = 0.1,
        random: float = 0.2,
        num_samples: int = 192,
        interpolate: bool = False,
        img_size: Size | None = None,
        **common: Any,
    ) -> None:
        size = input_size(student) if img_size is None else img_size
        layers = match_layers(student, teacher, student_layers, teacher_layers, size, interpolate=interpolate)
        group = common.get("process_group")
        loss = ManifoldLoss(intra=intra, inter=inter, random=random, num_samples=num_samples, process_group=group)
        grids: list[tuple[Grid, Grid]] = []
        if interpolate:
            own, theirs = layers_of("student", student, layers[0], size), layers_of("teacher", teacher, layers[1], size)
            grids = list(zip(grids_of(student, own, size), grids_of(teacher, theirs, size), strict=True))
        super().__init__(student, teacher, _ManifoldFeatures(*layers, loss, grids), **common)
