"""Fine-grained manifold distillation: relations between patches, images and random tokens of matched layers."""

from typing import Any

from torch import Tensor, nn

from fastkd.losses import ManifoldLoss
from fastkd.train.models import match_layers

from .base import Parts
from .layers import GridLoss, LayersTask, Networks, resized


class _ManifoldFeatures(GridLoss):
    name = "manifold"

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[Tensor, Parts]:
        if self.grids:
            teachers = resized(teachers, self.grids)
        loss, terms = self.loss(students, teachers, return_terms="detached")
        return loss, dict(zip(("intra", "inter", "random"), terms, strict=True))


class ManifoldTask(LayersTask):
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
        intra: float = 4.0,
        inter: float = 0.1,
        random: float = 0.2,
        num_samples: int = 192,
        interpolate: bool = False,
        **common: Any,
    ) -> None:
        group = common.get("process_group")
        loss = ManifoldLoss(intra=intra, inter=inter, random=random, num_samples=num_samples, process_group=group)

        def match(nets: Networks) -> _ManifoldFeatures:
            own, theirs = match_layers(*nets, interpolate=interpolate)
            return _ManifoldFeatures(own, theirs, loss, nets.grids(own, theirs) if interpolate else [])

        super().__init__(student, teacher, match, **common)
