"""Every loss as its formula, in plain PyTorch: the oracle of the tests (in float64) and the text of the docs.

Readable and differentiable any number of times; it builds whole maps and checks nothing.
"""

from fastkd.reference.attention import attention_loss, qkv_relation_loss
from fastkd.reference.diversity import intra_divergence_loss
from fastkd.reference.logits import competition_loss, dkd_loss, nkd_loss, soft_target_loss
from fastkd.reference.moments import batch_moments, batch_norm_moments, bn_stat_loss
from fastkd.reference.prior import image_prior, total_variation
from fastkd.reference.relation import manifold_loss, relation_loss

__all__ = [
    "attention_loss",
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
