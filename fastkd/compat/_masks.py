"""Padding masks in the forms that other codes give them."""

import torch
from torch import Tensor

PADDING = -1000.0  # additive masks hide by -10,000, by the lowest number of their dtype, or by -inf


def token_mask(name: str, mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Return a mask as (B, N) bool, True where a token counts.

    Args:
        name: the argument's name, for messages.
        mask: (B, N), (B, 1, N) or (B, 1, 1, N). Integers or bool: nonzero is a token. Floating point: additive if
            no entry is positive (0 is a token, at most -1000 is padding), else nonzero is a token.
        shape: (B, N).

    Raises:
        TypeError: not a real tensor.
        ValueError: another shape, such as a mask per query.
        RuntimeError: a floating-point mask of neither form, such as a bias.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.is_complex():
        raise TypeError(f"{name} must be a tensor of bool, integers or floats, got {type(mask).__name__}")
    rows = mask.flatten(1) if mask.ndim in (3, 4) and all(n == 1 for n in mask.shape[1:-1]) else mask
    if rows.shape != shape:
        raise ValueError(f"{name} must have shape (B, N) = {shape} or (B, 1, 1, N), got {tuple(mask.shape)}")
    if not rows.is_floating_point():
        return rows != 0
    additive = ~(rows > 0).any()
    valid = torch.where(additive, (rows == 0) | (rows <= PADDING), rows >= 0).all()
    torch._assert_async(valid, f"{name} must hold 0 and at most {PADDING:.0f}, or be nonzero for a token and 0 else")
    return torch.where(additive, rows == 0, rows != 0)
