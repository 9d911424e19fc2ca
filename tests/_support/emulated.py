"""What the CUDA operators launch and load when they are emulated, where tests/gpu/test_cuda_on_cpu.py runs this.

`python -m tests._support.emulated CALLS`, with calls (function, dtype, shapes), prints the launches of own kernels and
the loads of activations, by the bytes of each, forward and backward. A function is bn_stat_loss, batch_norm_moments, or
the `dims` of batch_moments.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastkd
import fastkd._C

library = ctypes.CDLL(fastkd._C.__file__)
launches = ctypes.c_uint64.in_dll(library, "emulated_launches")
loads = (ctypes.c_uint64 * 17).in_dll(library, "emulated_loads")


def counted(call: Callable[[], Any]) -> tuple[Any, dict[str, object]]:
    """Return what a call gives, and what it has launched and loaded."""
    launches.value = 0
    loads[:] = [0] * len(loads)
    result = call()
    return result, {"launches": launches.value, "loads": {size: count for size, count in enumerate(loads) if count}}


def outputs(function: str, xs: list[Tensor]) -> tuple[Tensor, ...]:
    if function == "bn_stat_loss":
        means, variances = ([torch.rand(x.shape[1]) + 0.5 for x in xs] for _ in range(2))
        return (fastkd.bn_stat_loss(xs, means, variances, backend="native"),)
    (x,) = xs
    if function == "batch_norm_moments":
        parameters = [(torch.rand(x.shape[1]) + 0.5).to(x.dtype) for _ in range(4)]
        return fastkd.batch_norm_moments(x, *parameters, backend="native")
    return fastkd.batch_moments(x, dims=function, backend="native")


def passes(function: str, dtype: str, shapes: list[list[int]]) -> list[dict[str, object]]:
    # The first channel of an odd number is left out: each image starts where no vector does.
    xs = [torch.randn(shape).to(getattr(torch, dtype))[:, shape[1] % 2 :].requires_grad_() for shape in shapes]
    results, forward = counted(lambda: outputs(function, xs))
    gradients = [torch.randn_like(y) for y in results]
    _, backward = counted(lambda: torch.autograd.grad(results, xs, gradients))
    return [forward, backward]


if __name__ == "__main__":
    print(json.dumps([passes(*call) for call in json.loads(sys.argv[1])]))
