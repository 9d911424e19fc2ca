"""The intra-divergence loss over the batch of all ranks."""

import torch
from torch import Tensor

from fastkd import functional as F
from fastkd.distributed._autograd import Averaged, Gather
from fastkd.distributed._messages import Group
from fastkd.distributed._ranks import Own, Ranks, layout
from fastkd.ops._autograd import refuse_transforms
from fastkd.ops._dispatch import Backend, resolve_plain
from fastkd.ops.diversity import check_intra_divergence


@torch.compiler.disable
def intra_divergence_loss(
    features: Tensor,
    labels: Tensor,
    *,
    spread_margin: float,
    boundary_margin: float,
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """fastkd.intra_divergence_loss, where its formula stands, of the batch of all ranks, whose features are gathered.
    Our formulation of the idea of DearKD's data-free variant (arXiv:2204.12997).

    Args:
        features: (B, D), this rank's; B may differ between ranks, all else may not. Differentiable.
        labels: (B,) integer classes.
        spread_margin, boundary_margin: m₁ >= 0, m₂ >= 0.
        backend: "auto" or "eager": PyTorch operations alone.
        group: a torch.distributed process group that this rank is in; None: the default one.

    Returns:
        Scalar, the same on every rank, float32 (float64 for float64 input).

    Raises:
        ValueError: ranks that disagree on width, dtype or margins, on every rank; as in fastkd.intra_divergence_loss,
            and then on the other ranks too.
        TypeError, RuntimeError: as in fastkd.intra_divergence_loss; no process group.
    """
    ranks = Ranks(group)
    margins = {"spread_margin": spread_margin, "boundary_margin": boundary_margin}
    if ranks.world == 1:
        return F.intra_divergence_loss(features, labels, backend=backend, **margins)

    def arguments() -> Own:
        check_intra_divergence(features, labels, spread_margin, boundary_margin)
        resolve_plain(backend, "intra_divergence_loss")
        refuse_transforms("intra_divergence_loss")
        return Own({"function": "intra_divergence_loss", "features": layout(features), **margins}, len(features))

    sizes = ranks.agree(arguments).sizes
    everyones = ranks.gather(labels.to(features.device, torch.int64, non_blocking=True), sizes)
    loss = F.intra_divergence_loss(Gather.apply(features, ranks, sizes), everyones, backend=backend, **margins)
    return Averaged.apply(loss, ranks.world)
