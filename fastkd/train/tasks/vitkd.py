"""ViTKD: mimic the first two blocks, generate the last one from masked tokens."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.losses import ViTKDLoss
from fastkd.train import InputError
from fastkd.train.models import Layer, alike, check_grids, input_size, layers_of
from fastkd.train.options import Size

from .base import DistillationTask, FeatureLoss, Layers, Parts
from .grids import Grid, grids_of, resized


class _ViTKDFeatures(FeatureLoss):
    name = "vitkd"

    def __init__(
        self, student_layers: list[str], teacher_layers: list[str], loss: ViTKDLoss, grids: list[tuple[Grid, Grid]]
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.loss, self.grids = loss, grids

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[Tensor, Parts]:
        teachers = resized(teachers, self.grids)
        low_s, low_t = torch.stack(students[:2], 1), torch.stack(teachers[:2], 1)
        loss, terms = self.loss(low_s, low_t, students[2], teachers[2], grid=self.grids[2][0], return_terms=True)
        return loss, dict(zip(("mimicking", "generation"), terms, strict=True))


class ViTKDTask(DistillationTask):
    """Yang et al. 2022 (arXiv:2209.02432): the first two blocks and the last one after the final norm.

    The projectors, mask token and generator are trained with the student and not exported. In a network with stages
    (Swin, a CNN), which the paper does not cover, the default layers are the first two and the last block of the stage
    that has the other network's grid.

    Args:
        student_layers, teacher_layers: two low layers and a high one, of one grid and width in each network.
        alpha, beta, mask_ratio: as fastkd.losses.ViTKDLoss.
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
        alpha: float = 3e-5,
        beta: float = 3e-6,
        mask_ratio: float = 0.5,
        interpolate: bool = False,
        img_size: Size | None = None,
        **common: Any,
    ) -> None:
        size = input_size(student) if img_size is None else img_size
        own = layers_of("student", student, student_layers, size)
        theirs = layers_of("teacher", teacher, teacher_layers, size)
        if student_layers is None or teacher_layers is None:
            own_alike, theirs_alike = alike(own, theirs, interpolate)
            own = _default("student", student, own, own_alike, size) if student_layers is None else own
            theirs = _default("teacher", teacher, theirs, theirs_alike, size) if teacher_layers is None else theirs
        _check_three("student", own)
        _check_three("teacher", theirs)
        if not interpolate:
            check_grids(own, theirs, size)
        loss = ViTKDLoss(own[0].width, theirs[0].width, alpha=alpha, beta=beta, mask_ratio=mask_ratio)
        names = [layer.name for layer in own], [layer.name for layer in theirs]
        grids = list(zip(grids_of(student, own, size), grids_of(teacher, theirs, size), strict=True))
        super().__init__(student, teacher, _ViTKDFeatures(*names, loss, grids), **common)


def _default(role: str, model: nn.Module, blocks: list[Layer], alike: list[Layer], size: Size) -> list[Layer]:
    """Return the first two blocks and the last, taken after the final norm unless that has another grid or width."""
    width = Counter(layer.width for layer in alike).most_common(1)[0][0]
    usable = [layer for layer in alike if layer.width == width]
    if usable == blocks and hasattr(model, "norm"):
        return [*blocks[:2], *layers_of(role, model, ["norm"], size)]
    return usable if len(usable) < 3 else [*usable[:2], usable[-1]]


def _check_three(role: str, layers: list[Layer]) -> None:
    if len(layers) != 3 or len({(layer.tokens, layer.width) for layer in layers}) > 1:
        got = ", ".join(f"{layer.name} ({layer.tokens} tokens of {layer.width})" for layer in layers)
        raise InputError(
            f"--{role}-layers: ViTKD needs two low layers and a high one, of one grid and one width, got {got}"
        )
