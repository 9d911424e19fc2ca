"""Relation losses: mean squared differences of Gram maps."""

import torch
from torch import Tensor


def _rows(x: Tensor, scope: str, index: Tensor | None) -> Tensor:
    """(B, N, D) -> (G, n, D): G maps of n x n."""
    if scope == "intra":
        return x
    if scope == "inter":
        return x.transpose(0, 1)
    x = x.reshape(1, -1, x.shape[-1])
    return x if index is None else x[:, index]


def _unit(x: Tensor, eps: float) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    keep = ~(norm <= eps)  # a NaN goes through
    return torch.where(keep, x / torch.where(keep, norm, 1), 0)


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    scope: str = "intra",
    index: Tensor | None = None,
    normalize: bool = True,
    rectify: str = "none",
    eps: float = 1e-12,
) -> Tensor:
    """L = 1/(G n²) Σ_g ||f(S_g S_gᵀ) - f(T_g T_gᵀ)||²; arguments as in fastkd.relation_loss."""
    acc = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    s, t = (_rows(x.to(acc), scope, index) for x in (student, teacher))
    if normalize:
        s, t = _unit(s, eps), _unit(t, eps)
    map_s, map_t = s @ s.mT, t @ t.mT
    if rectify != "none":
        map_t = map_t.clamp_min(0)
    if rectify == "both":
        map_s = torch.where(map_s < 0, 0, map_s)  # a similarity of 0 passes its gradient, as x[x < 0] = 0 does
    return (map_s - map_t).square().mean()


def manifold_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    intra: float = 4.0,
    inter: float = 0.1,
    random: float = 0.2,
    index: Tensor,
) -> Tensor:
    """L = intra L_intra + inter L_inter + random L_random, the last over the rows `index` of the flattened batch."""
    return (
        intra * relation_loss(student, teacher, scope="intra")
        + inter * relation_loss(student, teacher, scope="inter")
        + random * relation_loss(student, teacher, scope="batch", index=index)
    )
