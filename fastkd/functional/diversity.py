"""Diversity of synthetic images: signature, formula, and who runs a call, this process or the ranks of a group."""

from typing import TYPE_CHECKING

from torch import Tensor

from fastkd.ops._dispatch import Backend
from fastkd.ops.diversity import DivergenceCall, check_intra_divergence, run_intra_divergence

if TYPE_CHECKING:
    from fastkd.distributed import Group


def intra_divergence_loss(
    features: Tensor,
    labels: Tensor,
    *,
    spread_margin: float,
    boundary_margin: float,
    backend: Backend = "auto",
    group: "Group" = None,
) -> Tensor:
    """Boundary-preserving intra-divergence of a synthetic batch: our formulation of the idea of DearKD's data-free
    variant (Chen et al. 2022, arXiv:2204.12997); the paper's own formula is not established and no code was released.

        L = 1/|A| Σ_{a∈A} ( -min(‖z_a - z_e‖, m₁) + max(0, ‖z_a - sg z_h‖ - sg ‖z_a - z_n‖ + m₂) )

    z: features of unit length; A: images with another one of their class; e, h: nearest and farthest other image of
    a's class; n: nearest image of another class; sg: no gradient. The first part spreads a class, up to m₁; the second
    keeps its radius inside the distance to the nearest other class, less m₂, and is 0 in a batch of one class. Without
    any pair of a class the loss and its gradient are 0. Distances are B x B and exact; nothing is B x B x D.

    Args:
        features: (B, D), e.g. the teacher's penultimate features, float64 | float32 | bfloat16 | float16.
            Differentiable.
        labels: (B,) integer classes. On the device of features, or moved there.
        spread_margin: m₁ >= 0, in units of distance on the unit sphere (0 to 2).
        boundary_margin: m₂ >= 0.
        backend: "auto" or "eager": PyTorch operations alone.
        group: compare the images of all ranks of this process group (fastkd.distributed), whose features are gathered;
            None, those of this process.

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        TypeError: features not a floating-point tensor, labels not integers.
        ValueError: shapes that do not fit or are empty, a margin < 0.
        RuntimeError: a backend that this loss has not; differentiated twice; under vmap or torch.func.
    """
    call = DivergenceCall(features, labels, spread_margin, boundary_margin, backend)
    if group is not None:
        from fastkd.distributed.diversity import intra_divergence_over_ranks

        return intra_divergence_over_ranks(call, group)
    check_intra_divergence(call)
    return run_intra_divergence(call)
