"""Every public function. Here are those whose loss can span ranks; the others are in ops/."""

from fastkd.functional.diversity import intra_divergence_loss
from fastkd.functional.moments import batch_moments, bn_stat_loss
from fastkd.functional.relation import manifold_loss, relation_loss
from fastkd.ops._resize import resize_tokens as resize_tokens
from fastkd.ops.attention import attention_loss, qkv_relation_loss
from fastkd.ops.logits import competition_loss, dkd_loss, nkd_loss, soft_target_loss
from fastkd.ops.moments import batch_norm_moments
from fastkd.ops.prior import image_prior, total_variation

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
