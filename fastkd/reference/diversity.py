"""Diversity within a class: the intra-divergence term of data-free distillation, in our formulation."""

import torch
from torch import Tensor


def intra_divergence_loss(features: Tensor, labels: Tensor, *, spread_margin: float, boundary_margin: float) -> Tensor:
    """1/|A| Σ_a ( -min(‖z_a - z_e‖, m₁) + max(0, ‖z_a - sg z_h‖ - sg ‖z_a - z_n‖ + m₂) ); as in fastkd."""
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    norm = x.norm(dim=-1, keepdim=True)
    z = torch.where(norm > 1e-12, x / torch.where(norm > 1e-12, norm, 1), 0)
    terms = []
    for a in range(len(z)):
        same, other = labels == labels[a], labels != labels[a]
        same[a] = False
        if not same.any():
            continue
        distance = (z[a] - z).norm(dim=-1)
        term = -distance[same].min().clamp_max(spread_margin)
        if other.any():
            h = z[same][distance[same].argmax()].detach()
            term = term + ((z[a] - h).norm() - distance[other].min().detach() + boundary_margin).clamp_min(0)
        terms.append(term)
    return torch.stack(terms).mean() if terms else 0 * z.sum()
