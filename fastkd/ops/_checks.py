"""Checks of arguments, which every public function makes first. They read shapes and types, never values."""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tensor(name: str, x: Tensor, ndim: int | Collection[int], shape: str) -> None:
    """Check for a floating-point tensor of the given rank; `shape` is its form in the message, e.g. "(B, N, D)"."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim not in ((ndim,) if isinstance(ndim, int) else ndim):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def integers(name: str, x: Tensor) -> None:
    """Check for a tensor of integers, such as class indices."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {getattr(x, 'dtype', type(x).__name__)}")


def not_empty(name: str, x: Tensor) -> None:
    if x.numel() == 0:
        raise ValueError(f"{name} must not be empty, got {tuple(x.shape)}")


def same_device(**tensors: Tensor | None) -> None:
    (first, x), *rest = [(k, v) for k, v in tensors.items() if v is not None]
    for name, y in rest:
        if y.device != x.device:
            raise ValueError(f"{name} must be on the device of {first}, {x.device}, got {y.device}")


def constant(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(f"{name} is a constant here but requires a gradient: detach it (or use fastkd.reference)")


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def number(name: str, value: float, *, low: float = -math.inf, open_low: bool = False) -> None:
    """Check for a finite Python number, at least `low` (above it if open_low)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    # No math.isfinite: a number that changes between calls is symbolic under torch.compile.
    if not -math.inf < value < math.inf or value < low or (open_low and value == low):
        bound = "" if low == -math.inf else f" {'>' if open_low else '>='} {low:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value}")


def positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name} must be at least 1, got {value}")


def rows(name: str, index: Tensor, total: int) -> None:
    """Row numbers of the flattened (B*N, D) tokens, asserted on their device without waiting for it."""
    # A compiled graph serves all sizes: its message cannot hold this one.
    size = "B*N" if torch.compiler.is_compiling() else f"B*N = {total}"
    torch._assert_async(((index >= 0) & (index < total)).all(), f"{name} must lie in [0, {size})")
