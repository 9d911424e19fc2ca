"""Losses that relate images, over the global batch of a process group; the only module that knows ranks.

Every rank gets the loss of one process on the concatenated batch (images in the order of the ranks, which may hold
different numbers of them). Gradients are that loss's times the number of ranks: DistributedDataParallel averages over
ranks, so parameter gradients come out as those of the single process, and a term that is a mean over the local batch
weighs as it would there. All collectives are in forward: a gradient that reaches only some ranks cannot hang, and the
incoming gradient must be the same on every rank, as it is wherever ranks add up the same terms.

A call starts with one small all-gather that the host waits for: the sizes, and whether the ranks agree. Arguments that
one rank refuses, or on which ranks disagree, are an error on every rank. Hence no CUDA-graph capture, and a graph break
in torch.compile.
"""

from fastkd.distributed._messages import Group as Group
from fastkd.distributed._messages import start_gather as start_gather
from fastkd.distributed._ranks import SMALL as SMALL
from fastkd.distributed._ranks import spans_ranks as spans_ranks
from fastkd.distributed.diversity import intra_divergence_loss
from fastkd.distributed.manifold import manifold_layers as manifold_layers
from fastkd.distributed.manifold import manifold_loss
from fastkd.distributed.moments import batch_moments, bn_stat_loss
from fastkd.distributed.moments import bn_stat_loss_and_global_moments as bn_stat_loss_and_global_moments
from fastkd.distributed.relation import relation_loss

__all__ = ["batch_moments", "bn_stat_loss", "intra_divergence_loss", "manifold_loss", "relation_loss"]
