"""Helpers shared by all Triton kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if not __name__.startswith("fastkd_kernels."):
    raise ImportError(f"import fastkd_kernels, not {__name__.rpartition('.')[0]!r}")

Strides = tuple[int, int, int, int]


@dataclass(frozen=True)
class Planes:
    """(B, C, ...) tensors of one shape seen as (B, C, H, W), with each one's strides."""

    B: int
    C: int
    H: int
    W: int
    strides: list[Strides]


def fold_planes(shape: Sequence[int], of_tensors: Sequence[Sequence[int]]) -> Planes | None:
    """Merge positions adjacent in memory in every tensor, from the shape of all and the strides of each; None if more
    than two dimensions are left."""
    sizes: list[int] = []  # innermost first
    strides: list[list[int]] = []
    for d in range(len(shape) - 1, 1, -1):
        if shape[d] == 1:
            continue
        here = [each[d] for each in of_tensors]
        if sizes and here == [sizes[-1] * s for s in strides[-1]]:
            sizes[-1] *= shape[d]
        else:
            sizes.append(shape[d])
            strides.append(here)
    if len(sizes) > 2:
        return None
    W, H = [*sizes, 1, 1][:2]
    w, h = [*strides, [1] * len(of_tensors), [0] * len(of_tensors)][:2]
    per_tensor = [(each[0], each[1], h[i], w[i]) for i, each in enumerate(of_tensors)]
    return Planes(shape[0], shape[1], H, W, per_tensor)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up: triton.cdiv takes microseconds."""
    return -(-a // b)


@lru_cache(None, typed=True)  # tiles of two kernels may be equal as tuples
def blocks(tile: Any) -> dict[str, int]:
    """Return the constants of a row of a table of tiles, by name: not to be changed."""
    return {name: value for name, value in tile._asdict().items() if name != "tails"}


def alike(tensors: Sequence[Tensor], most: int) -> list[list[int]]:
    """Return the positions of tensors of one shape, layout and dtype, at most so many together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, x in enumerate(tensors):
        groups.setdefault((x.shape, x.stride(), x.dtype), []).append(i)
    return [members[i : i + most] for members in groups.values() for i in range(0, len(members), most)]


PLANS = 512  # kept by shapes, strides and device: numbers, from which a launch is made without deriving them again


@cache
def _of_card(device: torch.device) -> tuple[int, str]:
    """Return a GPU's multiprocessors and architecture, which PyTorch takes microseconds to look up."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, {9: "9.0", 10: "10.x"}.get(properties.major, "8.x")


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors, 1 under the interpreter."""
    return _of_card(device)[0] if device.type == "cuda" else 1


def architecture(device: torch.device) -> str:
    """Return the key of a configuration table: "8.x" (also 12.x, with equal shared memory), "9.0", "10.x" or "cdna"."""
    if torch.version.hip is not None:
        return "cdna"
    return _of_card(device)[1] if device.type == "cuda" else "9.0"  # interpreted: what the largest cards run


def empty_gradient(x: Tensor, is_wanted: bool) -> Tensor:
    """Return contiguous room for the gradient of x, or for nothing.

    float16 gradients wait in float32: the incoming gradient (GradScaler's scale) must come before the rounding.
    """
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    if not is_wanted:
        return x.new_empty(0, dtype=dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)  # new_empty takes twice as long


def float32_products() -> str:
    """Return the precision of float32 products: full, unless PyTorch's own may use tf32."""
    allowed = torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


@triton.jit
def of_layer(values, layer):
    """Return that of a layer from a tuple of pointers or numbers."""
    value = values[0]
    for k in tl.static_range(1, len(values)):
        value = tl.where(layer == k, values[k], value)
    return value


@triton.jit
def merge_moments(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Merge moments (count, mean, sum of squared deviations) of two sets; either may be empty."""
    n = n_a + n_b
    share = n_b / tl.maximum(n, 1.0)
    delta = tl.where(n_a > 0, mean_b - mean_a, 0.0)
    step = tl.where(
        tl.abs(delta) < float("inf"), delta * share, mean_b
    )  # the sum keeps infinities, which a difference would turn into NaN
    return n, tl.where(n_a > 0, mean_a + step, mean_b), m2_a + m2_b + delta * delta * n_a * share
