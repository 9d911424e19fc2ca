"""DearKD's first stage: early transformer blocks imitate early CNN maps; the CNN's decisions teach the logits."""

from typing import Any, ClassVar

from torch import Tensor, nn

from fastkd import capture
from fastkd.losses import EarlyDistillationLoss
from fastkd.train.models import check_pairs, layers_of

from .base import Parts
from .layers import GridLoss, LayersTask, Networks, as_map


class _DearKDFeatures(GridLoss):
    name = "dearkd"

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[Tensor, Parts]:
        maps = [as_map(t, grid) for t, (_, grid) in zip(teachers, self.grids, strict=True)]
        return self.loss(students, maps, grid=[grid for grid, _ in self.grids]), {}


class DearKDTask(LayersTask):
    """First stage of Chen et al. 2022 (arXiv:2204.12997); the second is plain training, the task "none".

        L = 0.5 criterion(class logits, target) + 0.5 CE(distillation logits, argmax teacher) + weight * early

    The paper describes the two stages, early features of a CNN that pass through an aligner, and the CNN's
    classification as a target. No code was released: the aligner (fastkd.losses.EarlyDistillationLoss), the layers, the
    weights and the lengths of the stages are our reading; the factors 0.5 are DeiT's. The aligner resizes to any grid.

    Args:
        student_layers: our reading: as many of the first blocks as there are teacher layers.
        teacher_layers: our reading: the first two stages after the stem (of a transformer, the first two blocks).
        common: as DistillationTask; by default logits="hard", task_weight=0.5, logit_weight=0.5.
    """

    defaults: ClassVar[dict[str, Any]] = {"logits": "hard", "task_weight": 0.5, "logit_weight": 0.5}

    def __init__(self, student: nn.Module, teacher: nn.Module, **common: Any) -> None:
        super().__init__(student, teacher, _early_pairs, **common)


def _early_pairs(nets: Networks) -> _DearKDFeatures:
    student, teacher, student_layers, teacher_layers, size = nets
    if teacher_layers is None:
        teacher_layers = _early(teacher)[: 2 if student_layers is None else len(student_layers)]
    if student_layers is None:
        student_layers = capture.block_names(student)[: len(teacher_layers)]
    own = layers_of("student", student, student_layers, size)
    theirs = layers_of("teacher", teacher, teacher_layers, size)
    check_pairs(own, theirs)
    loss = EarlyDistillationLoss([layer.width for layer in own], [layer.width for layer in theirs])
    return _DearKDFeatures(own, theirs, loss, nets.grids(own, theirs))


def _early(model: Any) -> list[str]:
    """Return the model's blocks, without a stem that only halves the image."""
    info = getattr(model, "feature_info", None)
    stems = {entry["module"] for entry in info or [] if isinstance(entry, dict) and entry.get("reduction", 4) < 4}
    return [name for name in capture.block_names(model) if name not in stems]
