"""Helpers shared by all Triton kernels."""

from dataclasses import dataclass

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


def fold_planes(*xs: Tensor) -> Planes | None:
    """Merge positions adjacent in memory in every tensor; None if more than two dimensions are left."""
    sizes: list[int] = []  # innermost first
    strides: list[list[int]] = []
    for d in range(xs[0].ndim - 1, 1, -1):
        if xs[0].shape[d] == 1:
            continue
        here = [x.stride(d) for x in xs]
        if sizes and here == [sizes[-1] * s for s in strides[-1]]:
            sizes[-1] *= xs[0].shape[d]
        else:
            sizes.append(xs[0].shape[d])
            strides.append(here)
    if len(sizes) > 2:
        return None
    W, H = [*sizes, 1, 1][:2]
    w, h = [*strides, [1] * len(xs), [0] * len(xs)][:2]
    per_tensor = [(x.stride(0), x.stride(1), h[i], w[i]) for i, x in enumerate(xs)]
    return Planes(xs[0].shape[0], xs[0].shape[1], H, W, per_tensor)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors, 1 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def architecture(device: torch.device) -> str:
    """Return the key of a configuration table: "8.x" (also 12.x, with equal shared memory), "9.0", "10.x" or "cdna"."""
    if torch.version.hip is not None:
        return "cdna"
    if device.type != "cuda":
        return "9.0"  # interpreted: what the largest cards run
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "9.0", 10: "10.x"}.get(major, "8.x")


def stored_gradient(x: Tensor) -> torch.dtype:
    """float16 gradients wait in float32: the incoming gradient (GradScaler's scale) must come before the rounding."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def float32_products() -> str:
    """Return the precision of float32 products: full, unless PyTorch's own may use tf32."""
    allowed = torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


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
