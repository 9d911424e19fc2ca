"""Every public function, one import."""

from fastkd.ops.moments import batch_moments, bn_stat_loss
from fastkd.ops.relation import manifold_loss, relation_loss

__all__ = ["batch_moments", "bn_stat_loss", "manifold_loss", "relation_loss"]
