"""The intra-divergence loss over the batch of all ranks."""

import torch
from torch import Tensor

from fastkd.distributed._autograd import Averaged, Gather
from fastkd.distributed._messages import Group
from fastkd.distributed._ranks import Own, Ranks, layout
from fastkd.ops.diversity import DivergenceCall, check_intra_divergence, run_intra_divergence


@torch.compiler.disable
def intra_divergence_over_ranks(call: DivergenceCall, group: Group) -> Tensor:
    """Return intra_divergence_loss of the batch of all ranks, whose features are gathered."""
    ranks = Ranks(group)
    if ranks.world == 1:
        check_intra_divergence(call)
        return run_intra_divergence(call)
    features, labels, spread_margin, boundary_margin, _ = call

    def arguments() -> Own:
        check_intra_divergence(call)
        about = {"function": "intra_divergence_loss", "features": layout(features)}
        return Own(about | {"spread_margin": spread_margin, "boundary_margin": boundary_margin}, len(features))

    sizes = ranks.agree(arguments).sizes
    everyones = call._replace(
        features=Gather.apply(features, ranks, sizes),
        labels=ranks.gather(labels.to(features.device, torch.int64, non_blocking=True), sizes),
    )
    return Averaged.apply(run_intra_divergence(everyones), ranks.world)
