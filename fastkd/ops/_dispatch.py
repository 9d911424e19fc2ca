"""Which implementation runs. A backend named by the caller runs or raises; "auto" never raises."""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd import _extension
from fastkd._precision import accumulator
from fastkd.ops import _schemas

Backend = Literal["auto", "eager", "native", "triton"]
NAMES = get_args(Backend)

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.getenv("TRITON_INTERPRET") == "1"

_default: Backend = "auto"  # what "auto" means now: FASTKD_BACKEND, or the innermost `with fastkd.backend(...)`


def _named(name: str, where: str) -> Backend:
    if name not in NAMES:
        raise ValueError(f"{where} must be one of {', '.join(NAMES)}, got {name!r}")
    return cast(Backend, name)


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Use one backend for every call inside that leaves backend="auto" (process-wide, as torch's own switches are).

    Raises:
        ValueError: name is not "auto", "eager", "native" or "triton".
    """
    global _default
    before, _default = _default, _named(name, "backend")
    try:
        yield
    finally:
        _default = before


@functools.cache
def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastkd::{op}", key)


@functools.cache  # looked up on disk, and asked by every call of a loss
def _is_importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _has_native(op: str, device: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    return key is not None and _has_kernel(op, key)


@functools.cache
def _recorder(op: str, device: str) -> Callable[..., Any] | None:
    has_both = _has_native(op, device) and _has_kernel(op, "Autograd")
    return getattr(torch.ops.fastkd, op).default if has_both else None


def recorder(name: str, op: str, x: Tensor) -> Callable[..., Any] | None:
    """Return the native operator if it runs and records its own gradient (csrc/moments_autograd.cpp), otherwise None.

    torch.compile gets the Python form. So do forward-mode differentiation and transforms, which the Python form rejects
    and the C++ form would silently ignore.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return None
    if (_default if name == "auto" else name) not in ("auto", "native") or not _extension.HAS_NATIVE:
        return None
    return _recorder(op, x.device.type)


def why_not(op: str, name: str, device: str, dtype: torch.dtype) -> str | None:
    """Return why a backend cannot run an operator on tensors of this device type and dtype; None if it can."""
    if name == "native":
        if not _extension.HAS_NATIVE:
            return _extension.WHY_NOT
        if not _has_native(op, device):
            return f"{op} has no compiled implementation for {device} tensors in this build"
    if name == "triton":
        if not HAS_TRITON:
            return "triton is not installed (pip install triton)"
        if not _is_importable("fastkd_kernels"):
            return "fastkd_kernels is not importable: fastkd runs from a source tree that was never installed"
        if not _is_importable(f"fastkd_kernels.{_schemas.STEMS[op]}"):
            return f"{op} has no Triton kernel"
        if device != ("cpu" if INTERPRETED else "cuda"):
            return f"Triton needs CUDA tensors, got {device} ones (cpu ones under TRITON_INTERPRET=1, for tests)"
        if dtype == torch.float64:
            return "Triton kernels take float32, bfloat16 and float16, got float64"
        if device == "cuda" and torch.version.hip is None and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            if major < 8:
                return f"the Triton kernels need compute capability 8.0, this GPU has {major}.{minor}"
    return None


# Dynamo cannot look into the dispatcher, and the answer never changes. This is what torch.compiler's
# assume_constant_result sets, which imports all of Dynamo to do it.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(name: str, op: str, x: Tensor, *others: Tensor | None) -> Backend:
    """Return the backend that runs op for these inputs. "auto" tries native, then triton on GPUs, then eager."""
    device, dtype = x.device.type, accumulator(x, *(other for other in others if other is not None))
    name = _named(name, "backend")
    if name == "auto":
        name = _default
    if name == "auto":
        candidates = ("native", "triton") if device == "cuda" else ("native",)
        for candidate in candidates:
            if why_not(op, candidate, device, dtype) is None:
                return cast(Backend, candidate)
        return "eager"
    reason = why_not(op, name, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run here: {reason}")
    return cast(Backend, name)


def resolve_plain(name: str, function: str) -> None:
    """Check the backend of a loss that consists of PyTorch operations; only one named for this call can be missing."""
    if _named(name, "backend") in ("native", "triton"):
        raise RuntimeError(f"backend={name!r} cannot run here: {function} has no kernel of its own")


def call(impl: Backend, op: str, *args: Any) -> Any:
    """Run op's implementation by name."""
    return getattr(torch.ops.fastkd, op if impl == "native" else f"{op}_{impl}").default(*args)


if (_from_env := os.getenv("FASTKD_BACKEND")) is not None:
    _default = _named(_from_env, "FASTKD_BACKEND")
