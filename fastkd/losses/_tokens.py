"""Checks and errors that losses on tokens share."""

from torch import Tensor, nn

from fastkd._precision import accumulator
from fastkd.ops import _checks as check
from fastkd.ops._autograd import savable


def token_grid(name: str, N: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Return (h, w) of N tokens; without a grid they must be a square."""
    if grid is None:
        side = check.root(N)
        if side * side != N:
            raise ValueError(
                f"{name} must hold a square grid of tokens, without class or register tokens, got N = {N}; of another "
                "shape, give grid=(h, w)"
            )
        return side, side
    check.sequence("grid", grid, "two ints (h, w)")
    if len(grid) != 2:
        raise ValueError(f"grid must be (h, w), got {tuple(grid)}")
    for letter, x in zip("hw", grid, strict=True):
        check.positive_int(f"{letter} of grid", x)
    h, w = grid
    if h * w != N:
        raise ValueError(f"grid ({h}, {w}) has {h * w} tokens, {name} has {N}")
    return h, w


def check_tokens(name: str, x: Tensor, shape: tuple[int | None, ...], wanted: str) -> None:
    check.tensor(name, x, len(shape), wanted)
    check.not_empty(name, x)
    if any(want is not None and want != got for want, got in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")


def squared_error(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    """In float32 or better; keeps nothing for backward but its two inputs."""
    acc = accumulator(x, y)
    return nn.functional.mse_loss(x.to(acc), savable(y).to(acc), reduction=reduction)
