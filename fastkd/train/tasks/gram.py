"""Gram anchoring: patch relations of a network in training stay near those of a frozen earlier copy of itself."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastkd import functional as F
from fastkd.train import InputError
from fastkd.train.models import Layer, check_pairs, copy_at, layers_of
from fastkd.train.options import Size, sides

from .base import FeatureLoss, Layers, Parts
from .layers import Grid, LayersTask, Networks, resized


class _GramFeatures(FeatureLoss):
    name = "gram"
    anchored: Tensor  # epoch of the student that the teacher is a copy of

    def __init__(
        self, own: list[Layer], theirs: list[Layer], grids: list[tuple[Grid, Grid]], anchor: nn.Module
    ) -> None:
        super().__init__([layer.name for layer in own], [layer.name for layer in theirs])
        self.grids, self.anchor = grids, anchor
        self.register_buffer("anchored", torch.zeros((), dtype=torch.int64))

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[Tensor, Parts]:
        teachers = resized(teachers, self.grids)
        return torch.stack([F.relation_loss(s, t) for s, t in zip(students, teachers, strict=True)]).sum(), {}


class GramTask(LayersTask):
    """Gram anchoring of DINOv3 (Siméoni et al. 2025, arXiv:2508.10104, section 4), for fine-tuning.

        L = criterion + weight * Σ_l mean( (cos(s_i, s_j) - cos(t_i, t_j))² ),  over the patches i, j of an image

    The teacher is a frozen earlier copy of the student (`--teacher self`, or any network). Class tokens are left out.

    Args:
        student_layers, teacher_layers: None for the final norm, or the last block of a network without one.
        teacher_size: side of the teacher's images in pixels, or (height, width); the student's images are enlarged and
            the teacher's maps resized to the student's grid, as in the paper. None for the student's size.
        refresh: epochs between copies of the student to the teacher; 0 keeps the first.
        common: as DistillationTask; by default weight=100, at which fine-tuning by labels keeps the relations.
    """

    defaults: ClassVar[dict[str, Any]] = {"weight": 100.0}

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        teacher_size: Size | None = None,
        refresh: int = 0,
        **common: Any,
    ) -> None:
        if teacher is None:
            raise InputError("--teacher: gram needs one to stay near, such as self")
        if refresh and teacher.state_dict().keys() != student.state_dict().keys():
            raise InputError("refresh: needs a teacher of the student's architecture, such as --teacher self")
        self.teacher_size, self.refresh = teacher_size, refresh
        teacher = teacher if teacher_size is None else copy_at(teacher, teacher_size)
        anchor = teacher if refresh else nn.Identity()  # a teacher that changes is a part of the checkpoints

        def match(nets: Networks) -> _GramFeatures:
            own = layers_of("student", student, nets.student_layers or _last(student), nets.size)
            theirs = layers_of("teacher", teacher, nets.teacher_layers or _last(teacher), teacher_size or nets.size)
            check_pairs(own, theirs)
            return _GramFeatures(own, theirs, nets.grids(own, theirs, teacher_size), anchor)

        super().__init__(student, teacher, match, **common)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        features: Any = self.trainable.features
        if self.refresh and epoch % self.refresh == 0 and epoch > int(features.anchored):  # not again after a resume
            now = self.network if self.teacher_size is None else copy_at(self.network, self.teacher_size)
            self._frozen.load_state_dict(now.state_dict())
            features.anchored.fill_(epoch)

    def _run_teacher(self, images: Tensor) -> Tensor:
        if self.teacher_size is not None:
            images = nn.functional.interpolate(images, sides(self.teacher_size), mode="bicubic", antialias=True)
        return super()._run_teacher(images)


def _last(model: nn.Module) -> Layers:
    return ["norm"] if hasattr(model, "norm") else [-1]
