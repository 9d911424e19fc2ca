"""Every loss as its formula, in plain PyTorch: the oracle of the tests (in float64) and the text of the docs.

Readable and differentiable any number of times; it builds whole maps and checks nothing.
"""

from fastkd.reference.attention import attention_loss as attention_loss
from fastkd.reference.attention import qkv_relation_loss as qkv_relation_loss
from fastkd.reference.diversity import intra_divergence_loss as intra_divergence_loss
from fastkd.reference.logits import competition_loss as competition_loss
from fastkd.reference.logits import dkd_loss as dkd_loss
from fastkd.reference.logits import nkd_loss as nkd_loss
from fastkd.reference.logits import soft_target_loss as soft_target_loss
from fastkd.reference.moments import batch_moments as batch_moments
from fastkd.reference.moments import batch_norm_moments as batch_norm_moments
from fastkd.reference.moments import bn_stat_loss as bn_stat_loss
from fastkd.reference.prior import image_prior as image_prior
from fastkd.reference.prior import total_variation as total_variation
from fastkd.reference.relation import manifold_loss as manifold_loss
from fastkd.reference.relation import relation_loss as relation_loss
