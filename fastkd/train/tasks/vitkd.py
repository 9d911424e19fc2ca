"""ViTKD: mimic the first two blocks, generate the last one from masked tokens."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.losses import ViTKDLoss
from fastkd.train import InputError
from fastkd.train.models import Layer, alike, check_grids, layers_of
from fastkd.train.options import Size

from .base import Parts
from .layers import GridLoss, LayersTask, Networks, resized


class _ViTKDFeatures(GridLoss):
    name = "vitkd"

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[Tensor, Parts]:
        teachers = resized(teachers, self.grids)
        low_s, low_t = torch.stack(students[:2], 1), torch.stack(teachers[:2], 1)
        loss, terms = self.loss(low_s, low_t, students[2], teachers[2], grid=self.grids[2][0], return_terms=True)
        return loss, dict(zip(("mimicking", "generation"), terms, strict=True))


class ViTKDTask(LayersTask):
    """Yang et al. 2022 (arXiv:2209.02432): the first two blocks and the last one after the final norm.

    The projectors, mask token and generator are trained with the student and not exported. In a network with stages
    (Swin, a CNN), which the paper does not cover, the default layers are the first two and the last block of the stage
    that has the other network's grid.

    Args:
        student_layers, teacher_layers: two low layers and a high one, of one grid and width in each network.
        alpha, beta, mask_ratio: as fastkd.losses.ViTKDLoss.
        interpolate: as ManifoldTask.
        common: as DistillationTask.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        alpha: float = 3e-5,
        beta: float = 3e-6,
        mask_ratio: float = 0.5,
        interpolate: bool = False,
        **common: Any,
    ) -> None:
        def match(nets: Networks) -> _ViTKDFeatures:
            own, theirs = _three_each(nets, interpolate)
            loss = ViTKDLoss(own[0].width, theirs[0].width, alpha=alpha, beta=beta, mask_ratio=mask_ratio)
            return _ViTKDFeatures(own, theirs, loss, nets.grids(own, theirs))

        super().__init__(student, teacher, match, **common)


def _three_each(nets: Networks, interpolate: bool) -> tuple[list[Layer], list[Layer]]:
    student, teacher, student_layers, teacher_layers, size = nets
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
    return own, theirs


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
