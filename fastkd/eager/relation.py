"""Relation loss in chunks of rows of the maps: no whole map is ever held."""

import torch
from torch import Tensor

from fastkd._precision import accumulator, stored_gradient
from fastkd.eager._common import chunks


def _maps(x: Tensor, scope: str) -> Tensor:
    """(B, N, D) -> (G, n, D), a view wherever strides allow."""
    if scope == "intra":
        return x
    return x.transpose(0, 1) if scope == "inter" else x.reshape(1, -1, x.shape[-1])


def _inverse_norm(x: Tensor, normalize: bool, eps: float) -> Tensor:
    """1/||x|| per row, 0 where the norm is at most eps: such a row relates as 0 and gets gradient 0."""
    if not normalize:
        return x.new_ones(()).expand(*x.shape[:-1], 1)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.reciprocal().masked_fill_(norm <= eps, 0)


def _through_norm(ds_hat: Tensor, s_hat: Tensor, inv: Tensor, normalize: bool) -> Tensor:
    """dS = r (dŜ - ŝ <ŝ, dŜ>), the chain through ŝ = r s."""
    if not normalize:
        return ds_hat
    return inv * (ds_hat - s_hat * (s_hat * ds_hat).sum(-1, keepdim=True))


def _tile(
    s: Tensor, t: Tensor, ds: Tensor | None, normalize: bool, rectify: str, eps: float, acc: torch.dtype
) -> Tensor:
    """Row strips of the difference maps E = f(ŜŜᵀ) - f(T̂T̂ᵀ): Σ E², and dŜ = 4/(G n²) E' Ŝ strip by strip."""
    G, n, _ = s.shape
    sums = []
    groups = chunks(G, n * max(n, s.shape[-1] + t.shape[-1]))
    for g in (slice(g0, g0 + groups.step) for g0 in groups):
        s_hat, t_hat = s[g].to(acc), t[g].to(acc)
        inv = _inverse_norm(s_hat, normalize, eps)
        s_hat, t_hat = s_hat * inv, t_hat * _inverse_norm(t_hat, normalize, eps)
        rows = chunks(n, len(s_hat) * n)
        for r in (slice(r0, r0 + rows.step) for r0 in rows):
            if rectify == "none":
                error = torch.baddbmm(s_hat[:, r] @ s_hat.mT, t_hat[:, r], t_hat.mT, alpha=-1)
            else:
                map_s, map_t = s_hat[:, r] @ s_hat.mT, t_hat[:, r] @ t_hat.mT
                error = (map_s.clamp_min(0) if rectify == "both" else map_s) - map_t.clamp_min_(0)
            sums.append(torch.linalg.vector_norm(error).square())
            if ds is not None:
                if rectify == "both":
                    error.masked_fill_(map_s < 0, 0)
                ds_hat = (error @ s_hat).mul_(4 / (G * n * n))
                ds[g, r] = _through_norm(ds_hat, s_hat[:, r], inv[:, r], normalize).to(ds.dtype)
    return torch.stack(sums).sum() / (G * n * n)


def _gram(s: Tensor, t: Tensor, ds: Tensor | None, normalize: bool, eps: float, acc: torch.dtype) -> Tensor:
    """||SSᵀ - TTᵀ||² = ||SᵀS||² - 2||SᵀT||² + ||TᵀT||², dS = 4/(G n²) (S(SᵀS) - T(TᵀS)); Grams in float64."""
    G, n, Ds = s.shape
    Dt = t.shape[-1]

    def unit(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(acc)
        inv = _inverse_norm(x, normalize, eps)
        return x * inv, inv

    total = s.new_zeros((), dtype=torch.float64)
    groups = chunks(G, Ds * Ds + Ds * Dt + Dt * Dt)
    for g in (slice(g0, g0 + groups.step) for g0 in groups):
        rows = chunks(n, len(s[g]) * (Ds + Dt))
        strips = [slice(r0, r0 + rows.step) for r0 in rows]
        ss, st, tt = (s.new_zeros((len(s[g]), a, b), dtype=torch.float64) for a, b in ((Ds, Ds), (Ds, Dt), (Dt, Dt)))
        for r in strips:
            s64, t64 = unit(s[g, r])[0].double(), unit(t[g, r])[0].double()
            ss.baddbmm_(s64.mT, s64)
            st.baddbmm_(s64.mT, t64)
            tt.baddbmm_(t64.mT, t64)
        total += ss.square().sum() - 2 * st.square().sum() + tt.square().sum()
        if ds is None:
            continue
        ss, ts = ss.to(acc), st.mT.to(acc)
        for r in strips:
            s_hat, inv = unit(s[g, r])
            ds_hat = torch.baddbmm(s_hat @ ss, unit(t[g, r])[0], ts, alpha=-1).mul_(4 / (G * n * n))
            ds[g, r] = _through_norm(ds_hat, s_hat, inv, normalize).to(ds.dtype)
    return (total.clamp_min(0) / (G * n * n)).to(acc)  # rounding alone can take a zero below 0


def relation_fwd(
    student: Tensor,
    teacher: Tensor,
    scope: str,
    normalize: bool,
    rectify: str,
    eps: float,
    algorithm: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    acc = accumulator(student, teacher)
    dstudent = student.new_empty(student.shape if with_grad else (0,), dtype=stored_gradient(student))
    s, t = _maps(student, scope), _maps(teacher, scope)
    ds = _maps(dstudent, scope) if with_grad else None
    if algorithm == "gram":
        return _gram(s, t, ds, normalize, eps, acc), dstudent
    return _tile(s, t, ds, normalize, rectify, eps, acc), dstudent


def manifold_fwd(
    students: list[Tensor],
    teachers: list[Tensor],
    indices: list[Tensor],
    intra: float,
    inter: float,
    random: float,
    with_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    acc = accumulator(*students, *teachers)
    terms = students[0].new_empty((len(students), 3), dtype=acc)
    dstudents = []
    for layer, (s, t, index) in enumerate(zip(students, teachers, indices, strict=True)):
        N = s.shape[1]
        at = (index // N, index % N)
        total = s.new_zeros(s.shape if with_grad else (0,), dtype=accumulator(s))
        for i, (weight, scope, a, b) in enumerate(
            ((intra, "intra", s, t), (inter, "inter", s, t), (random, "intra", s[at][None], t[at][None]))
        ):
            terms[layer, i], d = relation_fwd(a, b, scope, True, "none", 1e-12, "tile", with_grad)
            if with_grad and i < 2:
                total.add_(d, alpha=weight)
            elif with_grad:
                total.index_put_(at, weight * d[0].to(total.dtype), accumulate=True)
        dstudents.append(total.to(stored_gradient(s)))
    return terms, dstudents
