"""Checks and errors that losses on tokens share."""

import math

from torch import Tensor, nn

from fastkd._precision import accumulator
from fastkd.ops import _checks as check
from fastkd.ops._autograd import savable


def grid_side(name: str, N: int) -> int:
    side = math.isqrt(N)
    if side * side != N:
        raise ValueError(f"{name} must hold a square grid of tokens, without class or register tokens, got N = {N}")
    return side


def check_tokens(name: str, x: Tensor, shape: tuple[int | None, ...], wanted: str) -> None:
    check.tensor(name, x, len(shape), wanted)
    check.not_empty(name, x)
    if any(want is not None and want != got for want, got in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")


def squared_error(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    """In float32 or better; keeps nothing for backward but its two inputs."""
    acc = accumulator(x, y)
    return nn.functional.mse_loss(x.to(acc), savable(y).to(acc), reduction=reduction)
