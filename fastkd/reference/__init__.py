"""Every loss as its formula, in plain PyTorch: the oracle of the tests (in float64) and the text of the docs.

Readable and differentiable any number of times; it builds whole maps and checks nothing.
"""

from fastkd.reference.moments import batch_moments, bn_stat_loss
from fastkd.reference.relation import manifold_loss, relation_loss

__all__ = ["batch_moments", "bn_stat_loss", "manifold_loss", "relation_loss"]
