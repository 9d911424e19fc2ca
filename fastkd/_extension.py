"""Load fastkd._C, which runs under any torch since 2.10, and fastkd._recorder if it was built for the running one."""

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch

from fastkd.ops._schemas import signatures

REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir ."


def _record() -> ModuleType | None:
    try:
        return importlib.import_module("fastkd._built_for")
    except ImportError:
        return None


def _stale(types: dict[str, str], expected: dict[str, str]) -> str:
    """Return what differs between the operators as built and their schemas here, which PyTorch does not compare."""
    for op, built in types.items():
        here = expected.get(op, "unknown")
        if built.split() != here.split():
            return f"was built from other sources: {op} takes {built.strip()} there and {here.strip()} here"
    return ""


def _problem(built_for: ModuleType) -> str:
    """Import fastkd._C. Returns what is wrong with it, or ""."""
    if getattr(built_for, "INTERFACE", "") != "stable":
        return "was built by an older version of fastkd"
    try:
        native = importlib.import_module("fastkd._C")
    except (ImportError, OSError) as error:
        return f"cannot be loaded under torch {torch.__version__} ({error})"
    return _stale(native.signatures(), signatures())


def _load(built_for: ModuleType | None) -> str:
    """Load the operators. Returns why they could not be loaded, or ""."""
    if built_for is None:
        return "fastkd runs from a source tree that was never built (pip install -e .)"
    if not built_for.HAS_EXT:
        return str(built_for.WHY_NOT_EXT)
    problem = _problem(built_for)
    if not problem:
        return ""
    why_not = f"fastkd's compiled extension {problem} (reinstall from the source folder: {REINSTALL})"
    warnings.warn(f"{why_not}. Everything works without it, more slowly.", stacklevel=2)
    return why_not


def _load_recorder(built_for: ModuleType | None) -> str:
    """Load the library that records gradients in C++. Returns why it could not be loaded, or ""."""
    if WHY_NOT or built_for is None:
        return WHY_NOT
    if built_for.TORCH_VERSION != str(torch.__version__):  # it would crash in the loader
        return f"built for torch {built_for.TORCH_VERSION}, and torch {torch.__version__} is running"
    for path in Path(__file__).parent.glob("_recorder.*"):
        try:
            torch.ops.load_library(path)
        except OSError as error:
            return str(error)
        return ""
    return "not compiled"


_built_for = _record()

WHY_NOT = _load(_built_for)
"""Why the native backend is missing and the cure in brackets; "" if it is there."""

HAS_NATIVE = not WHY_NOT
"""Whether fastkd._C is loaded and its operators are registered."""

WHY_NOT_CUDA: str = WHY_NOT or ("" if _built_for is None or _built_for.HAS_CUDA else _built_for.WHY_NOT_CUDA)
"""The same for its CUDA half; a GPU may still be absent."""

HAS_CUDA = not WHY_NOT_CUDA

WHY_NOT_RECORDER = _load_recorder(_built_for)
"""Why the moments' gradients are recorded in Python, which takes some microseconds more a layer; "" if in C++."""
