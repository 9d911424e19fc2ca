"""Resize a grid of tokens, so that networks of different patch or image sizes can be compared."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as check


def resize_tokens(
    x: Tensor, size: int | tuple[int, int], *, prefix: int = 0, grid: tuple[int, int] | None = None
) -> Tensor:
    """Resize the grid of tokens (B, N, D), row-major, to `size`; the class tokens in front of it are kept.

    A grid that grows is interpolated bicubically, as position embeddings usually are; one that shrinks is averaged over
    areas, so that every token counts; one that does both is interpolated bicubically without aliasing. The means of
    areas and the weights of the cubic sum to 1: a constant grid stays constant.

    Args:
        x: (B, N, D), N = prefix + h w.
        size: (h, w) of the result, or its side. An equal size returns x itself.
        prefix: number of class, distillation and register tokens in front.
        grid: (h, w) of x; None for a square.

    Returns:
        (B, prefix + h w, D) in the dtype of x; computed in float32 or better. Differentiable.

    Raises:
        TypeError, ValueError: a tensor of another rank or dtype, a size or prefix that is no positive int, tokens that
            are no such grid.
    """
    check.tensor("x", x, 3, "(B, N, D)")
    if isinstance(prefix, bool) or not isinstance(prefix, int) or not 0 <= prefix < x.shape[1]:
        raise ValueError(f"prefix must be a number of tokens below N = {x.shape[1]}, got {prefix!r}")
    new = _pair("size", size)
    N = x.shape[1] - prefix
    old = (check.root(N),) * 2 if grid is None else _pair("grid", grid)
    if old[0] * old[1] != N:
        is_square = grid is None
        wanted = "a square grid; pass grid=(h, w), or the number of class tokens as prefix=" if is_square else f"{grid}"
        raise ValueError(f"x has {N} tokens behind {prefix} class tokens, which is not {wanted}")
    if old == new:
        return x
    maps = x[:, prefix:].mT.unflatten(2, old)
    maps = maps if maps.dtype.itemsize >= 4 else maps.float()
    if new[0] <= old[0] and new[1] <= old[1]:
        maps = F.adaptive_avg_pool2d(maps, new)
    else:
        is_mixed = new[0] < old[0] or new[1] < old[1]
        maps = F.interpolate(maps, new, mode="bicubic", align_corners=False, antialias=is_mixed)
    resized = maps.flatten(2).mT.to(x.dtype)
    return torch.cat([x[:, :prefix], resized], dim=1) if prefix else resized


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    h, w = (value, value) if isinstance(value, int) else value
    check.positive_int(name, h)
    check.positive_int(name, w)
    return h, w
