"""Which dtype sums and stored gradients are held in; the one rule of every backend."""

import torch
from torch import Tensor


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums and scalar results: float64 if any input is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def stored_gradient(x: Tensor) -> torch.dtype:
    """float16 gradients wait in float32: the incoming gradient (GradScaler's scale) must come before the rounding."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def has_fast_float64(device: torch.device) -> bool:
    """Whether a float64 product costs about two float32 ones; of NVIDIA's GPUs, on those of an x.0 architecture."""
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device)[1] == 0
    return True


def matrix_gain(device: torch.device, *tensors: Tensor) -> int:
    """How many times faster these are multiplied than float32: tensors of 16 bits, on the matrix units of a GPU."""
    return 8 if device.type == "cuda" and max(x.element_size() for x in tensors) == 2 else 1
