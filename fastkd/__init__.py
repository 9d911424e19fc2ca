"""Fused losses for knowledge distillation of vision transformers.

The functions are in fastkd.functional and here; fastkd.losses has them as modules with the papers' defaults,
fastkd.compat under the signatures of other projects, fastkd.reference as formulas.
"""

from fastkd import functional
from fastkd._version import __version__
from fastkd.functional import *
from fastkd.ops._dispatch import backend

__all__ = ["__version__", "backend"]
__all__ += functional.__all__
