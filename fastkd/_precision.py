"""Dtypes of sums and of stored gradients, the same rule for every backend."""

import torch
from torch import Tensor


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of sums and scalar results: float64 if any input is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def stored_gradient(x: Tensor) -> torch.dtype:
    """Return the dtype of stored gradients: float32 for float16, since GradScaler's scale must precede the rounding."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def has_fast_float64(device: torch.device) -> bool:
    """Return whether a float64 product costs about two float32 ones, as on NVIDIA GPUs of an x.0 architecture."""
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device)[1] == 0
    return True


def matrix_gain(device: torch.device, *tensors: Tensor) -> int:
    """Return how many times faster than float32 these tensors are multiplied: 16-bit ones use a GPU's matrix units."""
    return 8 if device.type == "cuda" and max(x.element_size() for x in tensors) == 2 else 1
