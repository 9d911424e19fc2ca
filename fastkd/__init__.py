"""Fused losses for knowledge distillation of vision transformers.

The functions are in fastkd.functional and here; fastkd.losses has them as modules with the papers' defaults,
fastkd.compat under the signatures of other projects, fastkd.reference as formulas.
"""

from fastkd._version import __version__
from fastkd.functional import (
    attention_loss,
    batch_moments,
    batch_norm_moments,
    bn_stat_loss,
    competition_loss,
    dkd_loss,
    image_prior,
    intra_divergence_loss,
    manifold_loss,
    nkd_loss,
    qkv_relation_loss,
    relation_loss,
    soft_target_loss,
    total_variation,
)
from fastkd.ops._dispatch import backend

__all__ = [
    "__version__",
    "attention_loss",
    "backend",
    "batch_moments",
    "batch_norm_moments",
    "bn_stat_loss",
    "competition_loss",
    "dkd_loss",
    "image_prior",
    "intra_divergence_loss",
    "manifold_loss",
    "nkd_loss",
    "qkv_relation_loss",
    "relation_loss",
    "soft_target_loss",
    "total_variation",
]
