"""Checks of arguments, which every public function makes first. They read shapes and types, never values."""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LEAST, MOST = 1.1754943508222875e-38, 3.4028234663852886e38  # of float32, in which numbers meet tensors
COLDEST, HOTTEST = 1e-6, 1e6  # temperatures whose square and inverse leave float32 room for logits


def tensor(name: str, x: Tensor, ndim: int | Collection[int], shape: str) -> None:
    """Check for a floating-point tensor of the given rank; `shape` is its form in the message, e.g. "(B, N, D)"."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(x).__name__}")
    dense(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim not in ((ndim,) if isinstance(ndim, int) else ndim):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def dense(name: str, x: Tensor) -> None:
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}: call to_dense() first")


def integers(name: str, x: Tensor) -> None:
    """Check for a tensor of integers, such as class indices."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    dense(name, x)


def sequence(name: str, values: object, elements: str) -> None:
    """Check for a list or tuple; `elements` says of what in the message, e.g. "tensors, one per layer"."""
    if not isinstance(values, list | tuple) and (isinstance(values, str | bytes) or not isinstance(values, Sequence)):
        cure = ": give [x] for one" if isinstance(values, Tensor) else ""
        raise TypeError(f"{name} must be a list or tuple of {elements}, got {type(values).__name__}{cure}")


def pair(name: str, values: object, elements: str) -> None:
    """Check for a list or tuple of two; `elements` names them in the message, e.g. "(means, vars)"."""
    sequence(name, values, f"two, {elements}")
    if len(values) != 2:  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a pair {elements}, got {len(values)} elements")  # type: ignore[arg-type]


def layers(name: str, values: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors of all layers; a single tensor is one layer."""
    if not isinstance(values, Tensor):
        sequence(name, values, "tensors, one per layer, or a tensor")
    return unchecked_layers(values)


def unchecked_layers(values: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the layers, of which a wrong one is refused later: by all ranks, if they share the loss."""
    return list(values) if isinstance(values, list | tuple) else [values]  # type: ignore[list-item]


def moved(name: str, x: Tensor, device: torch.device) -> Tensor:
    """Return x on the device, without waiting. A CUDA graph under capture would record the address of a tensor of
    another device, and read what is there at each replay: raise then."""
    if x.device.type == "meta" != device.type:
        raise ValueError(f"{name} must be on {device}, got a tensor without values, on the meta device")
    is_copied = x.device != device and not torch.compiler.is_compiling()
    # Without a driver, a build of PyTorch for GPUs raises when it is asked for the stream.
    if is_copied and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{name} must be on {device} while a CUDA graph is captured, got {x.device}")
    return x.to(device, non_blocking=True)


def root(N: int) -> int:
    """Return the side of a square of N tokens. N, if it is no square, has none, and this rounds: compare the square.

    math.isqrt takes no number of tokens that is symbolic, as under torch.compile(dynamic=True).
    """
    return int(N**0.5 + 0.5)


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
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def number(name: str, value: float, *, low: float = -math.inf, open_low: bool = False) -> None:
    """Check for a finite Python number, at least `low` (above it if open_low)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    # No math.isfinite: a number that changes between calls is symbolic under torch.compile.
    if not -math.inf < value < math.inf or value < low or (open_low and value == low):
        bound = "" if low == -math.inf else f" {'>' if open_low else '>='} {low:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value}")
    if not -MOST <= value <= MOST or (open_low and value < low + LEAST):
        raise ValueError(f"{name} must be a number that float32 holds, {LEAST:.2g} to {MOST:.2g} in size, got {value}")


def temperature(value: float) -> None:
    """Check for a temperature, by which scores are divided and by whose square losses are multiplied."""
    number("temperature", value, low=0, open_low=True)
    if not COLDEST <= value <= HOTTEST:
        raise ValueError(f"temperature must lie between {COLDEST:g} and {HOTTEST:g}, got {value}")


def flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def source(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}: "
            "torch.Generator(device).manual_seed(seed) makes one"
        )


def positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name} must be at least 1, got {value}")


def rows(name: str, index: Tensor, total: int) -> None:
    """Row numbers of the flattened (B*N, D) tokens, asserted on their device without waiting for it."""
    # A compiled graph serves all sizes: its message cannot hold this one.
    size = "B*N" if torch.compiler.is_compiling() else f"B*N = {total}"
    torch._assert_async((index.remainder(total) == index).all(), f"{name} must lie in [0, {size})")
