"""Losses that relate images, over the global batch of a process group: the functions of fastkd that take a group, which
is the default one here where none is given.

Every rank gets the loss of one process on the concatenated batch (images in the order of the ranks, which may hold
different numbers of them). Gradients are that loss's times the number of ranks: DistributedDataParallel averages over
ranks, so parameter gradients come out as those of the single process, and a term that is a mean over the local batch
weighs as it would there. All collectives are in forward: a gradient that reaches only some ranks cannot hang, and the
incoming gradient must be the same on every rank, as it is wherever ranks add up the same terms.

A call starts with one small all-gather that the host waits for: the sizes, and whether the ranks agree. Arguments that
one rank refuses, or on which ranks disagree, are an error on every rank. Hence no CUDA-graph capture, and a graph break
in torch.compile.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from fastkd import functional
from fastkd.distributed._messages import Group as Group
from fastkd.distributed._messages import start_gather as start_gather
from fastkd.distributed._ranks import SMALL as SMALL
from fastkd.distributed._ranks import Ranks

P = ParamSpec("P")
R = TypeVar("R")


def _over_ranks(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function with the default group in place of None."""

    @torch.compiler.disable
    @functools.wraps(function)
    def over_ranks(*args: P.args, **options: P.kwargs) -> R:
        named: dict[str, Any] = {**options, "group": Ranks(options.get("group")).group}
        return function(*args, **named)

    over_ranks.__module__ = __name__
    return over_ranks


batch_moments = _over_ranks(functional.batch_moments)
bn_stat_loss = _over_ranks(functional.bn_stat_loss)
intra_divergence_loss = _over_ranks(functional.intra_divergence_loss)
manifold_loss = _over_ranks(functional.manifold_loss)
relation_loss = _over_ranks(functional.relation_loss)

__all__ = ["batch_moments", "bn_stat_loss", "intra_divergence_loss", "manifold_loss", "relation_loss"]
