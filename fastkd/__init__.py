"""Fused losses for knowledge distillation of vision transformers.

The functions are in fastkd.functional and here; fastkd.losses has them as modules with the papers' defaults,
fastkd.compat under the signatures of other projects, fastkd.reference as formulas.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastkd import functional
from fastkd._version import __version__
from fastkd.functional import *
from fastkd.ops._dispatch import backend

__all__ = ["__version__", "backend"]
__all__ += functional.__all__

if not TYPE_CHECKING:  # a type checker reads the imports, and would accept every name here

    def __getattr__(name: str) -> Any:
        """Import a part of the package, such as fastkd.losses, when it is first named: `import fastkd` stays quick."""
        if name in ("capture", "compat", "distributed", "info", "losses", "reference", "testing", "train"):
            return importlib.import_module(f"fastkd.{name}")
        raise AttributeError(f"module 'fastkd' has no attribute {name!r}", name=name, obj=functional)
