"""Providers of the relation losses: maps as in the papers' code, the Gram identity, fastkd."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.case import Provider, in_pytorch
from fastkd.losses import ManifoldLoss
from fastkd.ops.relation import Scope


def groups(x: Tensor, scope: Scope) -> Tensor:
    """(B, N, D) -> (G, n, D), as a view."""
    if scope == "intra":
        return x
    return x.transpose(0, 1) if scope == "inter" else x.flatten(0, 1).unsqueeze(0)


def difference_of_maps(s: Tensor, t: Tensor) -> Tensor:
    """1/(G n²) Σ ‖S Sᵀ - T Tᵀ‖², with the maps; 16-bit maps are squared in float32, as under autocast."""
    s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    difference = s @ s.mT - t @ t.mT
    return difference.to(torch.promote_types(s.dtype, torch.float32)).square().mean()


def difference_by_grams(s: Tensor, t: Tensor) -> Tensor:
    """1/(G n²) Σ ‖SᵀS‖² - 2‖SᵀT‖² + ‖TᵀT‖², the same value from D x D matrices only."""
    acc = torch.promote_types(s.dtype, torch.float32)
    s, t = F.normalize(s.to(acc), dim=-1), F.normalize(t.to(acc), dim=-1)
    ss, st, tt = s.mT @ s, s.mT @ t, t.mT @ t
    total = ss.square().sum() - 2 * st.square().sum() + tt.square().sum()
    return total / (s.shape[0] * s.shape[1] ** 2)


def _scoped(loss: Callable[[Tensor, Tensor], Tensor], scope: Scope, student: Tensor, teacher: Tensor) -> Tensor:
    return loss(groups(student, scope), groups(teacher, scope))


def relation(scope: Scope) -> dict[str, Provider]:
    eager, grams = (partial(_scoped, loss, scope) for loss in (difference_of_maps, difference_by_grams))
    return {
        **in_pytorch(eager),
        "gram identity": Provider(grams),
        "gram compile": Provider(grams, compiled=True, thorough=True),
        "fastkd eager": Provider(partial(fastkd.relation_loss, scope=scope, backend="eager"), thorough=True),
        "fastkd": Provider(partial(fastkd.relation_loss, scope=scope)),
    }


def _layers(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Split a flat sequence into students, teachers and indices."""
    n = len(tensors) // 3
    return tensors[:n], tensors[n : 2 * n], tensors[2 * n :]


def _manifold(loss: Callable[[Tensor, Tensor], Tensor], *tensors: Tensor) -> Tensor:
    terms = []
    for s, t, index in zip(*_layers(tensors), strict=True):
        rows = (groups(x, "batch")[:, index] for x in (s, t))
        intra, inter = loss(s, t), _scoped(loss, "inter", s, t)
        terms.append(4 * intra + 0.1 * inter + 0.2 * loss(*rows))
    return torch.stack(terms).mean()


def manifold_by_maps(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Return the manifold loss, computed with maps; the rows of its random term are drawn as by ManifoldLoss."""
    rows = [torch.randperm(s.shape[0] * s.shape[1], device=s.device)[:192] for s in students]
    return _manifold(difference_of_maps, *students, *teachers, *rows)


def _manifold_fastkd(*tensors: Tensor) -> Tensor:
    students, teachers, indices = _layers(tensors)
    loss = ManifoldLoss()(students, teachers, indices=indices)
    assert isinstance(loss, Tensor)
    return loss


def manifold() -> dict[str, Provider]:
    eager = partial(_manifold, difference_of_maps)
    return {
        **in_pytorch(eager),
        "fastkd": Provider(_manifold_fastkd),
    }
