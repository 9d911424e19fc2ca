"""Load fastkd._C if it was built for the running torch; for another one it would crash in the loader."""

import importlib
import warnings
from types import ModuleType

import torch

REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir ."


def _record() -> ModuleType | None:
    try:
        return importlib.import_module("fastkd._built_for")
    except ImportError:
        return None


def _load(built_for: ModuleType | None) -> str:
    """Load the library. Returns why it could not be loaded, or ""."""
    if built_for is None:
        return "fastkd runs from a source tree that was never built (pip install -e .)"
    if not built_for.HAS_EXT:
        return str(built_for.WHY_NOT_EXT)
    problem = f"was built for torch {built_for.TORCH_VERSION}, and torch {torch.__version__} is running"
    if built_for.TORCH_VERSION == str(torch.__version__):
        try:
            importlib.import_module("fastkd._C")
            return ""
        except (ImportError, OSError) as error:
            problem = f"cannot be loaded ({error})"
    why_not = f"fastkd's compiled extension {problem} (reinstall from the source folder: {REINSTALL})"
    warnings.warn(f"{why_not}. Everything works without it, more slowly.", stacklevel=2)
    return why_not


_built_for = _record()

WHY_NOT = _load(_built_for)
"""Why the native backend is missing and the cure in brackets; "" if it is there."""

HAS_NATIVE = not WHY_NOT
"""Whether fastkd._C is loaded and its operators are registered."""

WHY_NOT_CUDA: str = WHY_NOT or ("" if _built_for is None or _built_for.HAS_CUDA else _built_for.WHY_NOT_CUDA)
"""The same for its CUDA half; a GPU may still be absent."""

HAS_CUDA = not WHY_NOT_CUDA
