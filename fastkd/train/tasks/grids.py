"""Square grids of tokens and their sizes."""

import math

from torch import Tensor

from fastkd import functional
from fastkd.train import InputError


def check_square(name: str, count: int) -> int:
    """Return the side of a square grid with a number of tokens.

    Raises:
        InputError: the number of tokens is not a square.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise InputError(f"{name} needs a square grid of tokens, got {count} tokens")
    return side


def as_map(tokens: Tensor) -> Tensor:
    """(B, N, D) -> (B, D, h, h), a view."""
    side = check_square("a map", tokens.shape[1])
    return tokens.mT.unflatten(2, (side, side))


def resize_tokens(tokens: Tensor, count: int) -> Tensor:
    """(B, N, D) -> (B, count, D), by fastkd.functional.resize_tokens."""
    if tokens.shape[1] == count:
        return tokens
    check_square("a map", tokens.shape[1])
    return functional.resize_tokens(tokens, check_square("interpolation", count))
