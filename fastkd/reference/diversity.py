"""Diversity within a class: the intra-divergence term of data-free distillation, in our formulation."""

import torch
from torch import Tensor


def intra_divergence_loss(features: Tensor, labels: Tensor, *, spread_margin: float, boundary_margin: float) -> Tensor:
    """1/|A| Σ_a ( -min(‖z_a - z_e‖, m₁) + max(0, ‖z_a - sg z_h‖ - sg ‖z_a - z_n‖ + m₂) ); as in fastkd."""
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    norm = x.norm(dim=-1, keepdim=True)
    z = torch.where(norm > 1e-12, x / torch.where(norm > 1e-12, norm, 1), 0)
    itself, other = torch.eye(len(z), dtype=torch.bool, device=z.device), labels[:, None] != labels
    same = ~other & ~itself

    def distances(to: Tensor) -> Tensor:
        return (z[:, None] - to).masked_fill(itself[..., None], 1).norm(dim=-1)  # no norm of 0 to differentiate

    to_easy = distances(z).masked_fill(~same, torch.inf).min(1).values
    to_hard = distances(z.detach()).masked_fill(~same, -torch.inf).max(1).values
    to_boundary = distances(z).detach().masked_fill(~other, torch.inf).min(1).values  # inf without another class
    terms = (to_hard - to_boundary + boundary_margin).clamp_min(0) - to_easy.clamp_max(spread_margin)
    anchors = same.any(1)
    return torch.where(anchors, terms, 0).sum() / anchors.sum().clamp_min(1)
