"""Grids of tokens: maps of them, and the teacher's resized to the student's."""

from collections.abc import Sequence

from torch import Tensor, nn

from fastkd import functional
from fastkd.train.models import Layer, grid_of
from fastkd.train.options import Size

Grid = tuple[int, int]


def grids_of(model: nn.Module, layers: Sequence[Layer], img_size: Size) -> list[Grid]:
    """Return (h, w) of each layer's tokens, by models.grid_of."""
    return [grid_of(model, layer, img_size) for layer in layers]


def as_map(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, h w, D) -> (B, D, h, w), a view."""
    return tokens.mT.unflatten(2, grid)


def resized(tokens: Sequence[Tensor], grids: Sequence[tuple[Grid, Grid]]) -> list[Tensor]:
    """Resize each layer's tokens (B, N, D) from the second grid to the first, by fastkd.functional.resize_tokens."""
    return [functional.resize_tokens(x, to, grid=of) for x, (to, of) in zip(tokens, grids, strict=True)]
