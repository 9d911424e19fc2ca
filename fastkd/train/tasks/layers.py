"""Tasks with a loss between layers: the networks that it is made for, grids of tokens, their resizing."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastkd import functional
from fastkd.train.models import Layer, grid_of, input_size
from fastkd.train.options import Size

from .base import DistillationTask, FeatureLoss, Layers

Grid = tuple[int, int]


class Networks(NamedTuple):
    """Two networks, the layers of each to compare (None: the task's own choice), and the size of the images."""

    student: nn.Module
    teacher: nn.Module
    student_layers: Layers | None
    teacher_layers: Layers | None
    size: Size

    def grids(
        self, own: Sequence[Layer], theirs: Sequence[Layer], teacher_size: Size | None = None
    ) -> list[tuple[Grid, Grid]]:
        """Return (h, w) of each pair of layers, student's and teacher's, by models.grid_of."""
        return [
            (grid_of(self.student, s, self.size), grid_of(self.teacher, t, teacher_size or self.size))
            for s, t in zip(own, theirs, strict=True)
        ]


class LayersTask(DistillationTask):
    """A task whose loss between layers is made for its networks, by a function of both."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        match: Callable[[Networks], FeatureLoss],
        *,
        student_layers: Layers | None = None,
        teacher_layers: Layers | None = None,
        img_size: Size | None = None,
        **common: Any,
    ) -> None:
        size = input_size(student) if img_size is None else img_size
        features = match(Networks(student, teacher, student_layers, teacher_layers, size))
        super().__init__(student, teacher, features, **(self.defaults | common))


class GridLoss(FeatureLoss):
    """A loss between layers, by `loss`, and the grids (student's, teacher's) of their tokens."""

    def __init__(
        self, own: Sequence[Layer], theirs: Sequence[Layer], loss: nn.Module, grids: list[tuple[Grid, Grid]]
    ) -> None:
        super().__init__([layer.name for layer in own], [layer.name for layer in theirs])
        self.loss, self.grids = loss, grids


def as_map(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, h w, D) -> (B, D, h, w), a view."""
    return tokens.mT.unflatten(2, grid)


def resized(tokens: Sequence[Tensor], grids: Sequence[tuple[Grid, Grid]]) -> list[Tensor]:
    """Resize each layer's tokens (B, N, D) from the second grid to the first, by fastkd.functional.resize_tokens."""
    return [functional.resize_tokens(x, to, grid=of) for x, (to, of) in zip(tokens, grids, strict=True)]
