"""Diversity of synthetic images within a class, in PyTorch operations without a kernel."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._precision import accumulator
from fastkd.ops import _checks as check
from fastkd.ops._autograd import once, refuse_transforms
from fastkd.ops._dispatch import Backend, resolve_plain

EPS = 1e-12  # a feature whose norm is at most this counts as 0 and gets gradient 0
LEAST = 1e-30  # differences below count as 0: over the square root of their squares they would be NaN


class DivergenceCall(NamedTuple):
    """One call of intra_divergence_loss: its arguments, checked by check_intra_divergence."""

    features: Tensor  # (B, D)
    labels: Tensor  # (B,)
    spread_margin: float
    boundary_margin: float
    backend: Backend


def check_intra_divergence(call: DivergenceCall) -> None:
    """Check the arguments of intra_divergence_loss."""
    features, labels, spread_margin, boundary_margin, backend = call
    check.tensor("features", features, 2, "(B, D)")
    check.not_empty("features", features)
    check.integers("labels", labels)
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must have shape ({len(features)},), got {tuple(labels.shape)}")
    check.number("spread_margin", spread_margin, low=0)
    check.number("boundary_margin", boundary_margin, low=0)
    resolve_plain(backend, "intra_divergence_loss")
    refuse_transforms("intra_divergence_loss")


def run_intra_divergence(call: DivergenceCall) -> Tensor:
    """Return intra_divergence_loss of checked arguments."""
    features, labels, spread_margin, boundary_margin, _ = call
    x = features.to(accumulator(features))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    z = x * torch.where(norm > EPS, norm, torch.inf).reciprocal()
    labels = check.moved("labels", labels, features.device)
    with torch.no_grad():
        # 2 - 2 <z, z'> would lose all distances below 3e-4, so the vectors are subtracted first.
        distance = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
        related = labels[:, None] == labels
        rows = torch.arange(z.shape[0], device=z.device)  # fill_diagonal_ would bind a compiled graph to one B
        same, other = related & (rows[:, None] != rows), ~related
        easy = distance.masked_fill(~same, torch.inf).argmin(1)
        hard = distance.masked_fill(~same, -torch.inf).argmax(1)
        to_boundary = distance.masked_fill(~other, torch.inf).amin(1)  # inf without another class
        anchors = same.any(1)

    # vector_norm's gradient at 0 is 0: duplicates of an image get none from each other.
    def length(d: Tensor) -> Tensor:
        return torch.linalg.vector_norm(d.masked_fill(d.abs() < LEAST, 0), dim=-1)

    to_easy, to_hard = length(z - z[easy]), length(z - z[hard].detach())
    radius = (to_hard - to_boundary + boundary_margin).clamp_min(0)
    terms = radius - to_easy.clamp_max(spread_margin)
    return once(terms.masked_fill(~anchors, 0).sum() / anchors.sum().clamp_min(1), "intra_divergence_loss")
