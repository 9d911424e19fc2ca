"""Relation loss in chunks of rows of the maps: no whole map is ever held."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._precision import accumulator, stored_gradient
from fastkd.eager._common import chunks, not_negative


def _maps(x: Tensor, scope: str) -> Tensor:
    """(B, N, D) -> (G, n, D), a view wherever strides allow."""
    if scope == "intra":
        return x
    return x.transpose(0, 1) if scope == "inter" else x.reshape(1, -1, x.shape[-1])


class Rows(NamedTuple):
    """Scaling of rows, to unit length or none; a row whose norm is at most eps relates as 0 and gets gradient 0."""

    normalize: bool
    eps: float
    acc: torch.dtype

    def unit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂, r) of x̂ = r x, in the accumulation dtype."""
        x = x.to(self.acc)
        if not self.normalize:
            return x, x.new_ones(()).expand(*x.shape[:-1], 1)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64).to(x.dtype)  # squares fit
        r = norm.reciprocal().masked_fill_(norm <= self.eps, 0)
        return x * r, r

    def through(self, ds_hat: Tensor, s_hat: Tensor, r: Tensor) -> Tensor:
        """dS = r (dŜ - ŝ <ŝ, dŜ>), the chain through ŝ = r s."""
        return r * (ds_hat - s_hat * (s_hat * ds_hat).sum(-1, keepdim=True)) if self.normalize else ds_hat


def difference(s: Tensor, t: Tensor, columns_s: Tensor, columns_t: Tensor, rectify: str) -> tuple[Tensor, Tensor]:
    """Return E = f(Ŝ Ŝᵀ) - f(T̂ T̂ᵀ) of rows against columns, and the student's map, or E where it is not rectified."""
    if rectify == "none":
        subtract = torch.addmm if s.ndim == 2 else torch.baddbmm
        error = subtract(s @ columns_s.mT, t, columns_t.mT, alpha=-1)
        return error, error
    map_s, map_t = s @ columns_s.mT, t @ columns_t.mT
    error = (map_s.clamp_min(0) if rectify == "both" else map_s) - map_t.clamp_min_(0)
    return error, map_s


def _tile(s: Tensor, t: Tensor, ds: Tensor | None, rows: Rows, rectify: str) -> Tensor:
    """Row strips of the difference maps E = f(ŜŜᵀ) - f(T̂T̂ᵀ): Σ E², and dŜ = 4/(G n²) E' Ŝ strip by strip."""
    G, n, _ = s.shape
    sums = []
    groups = chunks(G, n * max(n, s.shape[-1] + t.shape[-1]))
    for g in (slice(g0, g0 + groups.step) for g0 in groups):
        (s_hat, inverse), (t_hat, _) = rows.unit(s[g]), rows.unit(t[g])
        strips = chunks(n, len(s_hat) * n)
        for r in (slice(r0, r0 + strips.step) for r0 in strips):
            error, map_s = difference(s_hat[:, r], t_hat[:, r], s_hat, t_hat, rectify)
            sums.append(torch.linalg.vector_norm(error).square())
            if ds is not None:
                if rectify == "both":
                    error.masked_fill_(map_s < 0, 0)
                ds_hat = (error @ s_hat).mul_(4 / (G * n * n))
                ds[g, r] = rows.through(ds_hat, s_hat[:, r], inverse[:, r]).to(ds.dtype)
    return torch.stack(sums).sum() / (G * n * n)


def gram(
    s: Tensor,
    t: Tensor,
    ds: Tensor | None,
    rows: Rows,
    n: int,
    most: int | None = None,
    over_ranks: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """||SSᵀ - TTᵀ||² = ||SᵀS||² - 2||SᵀT||² + ||TᵀT||², dS = 4/(G n²) (S(SᵀS) - T(TᵀS)); Grams in float64.

    n counts the rows of a group on all ranks, of which s and t have this one's; over_ranks adds up their Grams in
    place, of which `most` elements are one message.
    """
    (G, own, Ds), Dt = s.shape, t.shape[-1]
    shapes = (Ds, Ds), (Ds, Dt), (Dt, Dt)
    total = s.new_zeros((), dtype=torch.float64)
    groups = chunks(G, sum(a * b for a, b in shapes), most)
    for g in (slice(g0, min(g0 + groups.step, G)) for g0 in groups):
        size = g.stop - g.start
        message = s.new_zeros(size * sum(a * b for a, b in shapes), dtype=torch.float64)
        parts = message.split([size * a * b for a, b in shapes])
        ss, st, tt = (x.view(-1, a, b) for x, (a, b) in zip(parts, shapes, strict=True))
        pieces = chunks(own, size * (Ds + Dt), most)
        strips = [slice(r0, r0 + pieces.step) for r0 in pieces]
        for r in strips:
            s64, t64 = rows.unit(s[g, r])[0].double(), rows.unit(t[g, r])[0].double()
            ss.baddbmm_(s64.mT, s64)
            st.baddbmm_(s64.mT, t64)
            tt.baddbmm_(t64.mT, t64)
        if over_ranks is not None:
            over_ranks(message)
        total += ss.square().sum() - 2 * st.square().sum() + tt.square().sum()
        if ds is None:
            continue
        ss, ts = ss.to(rows.acc), st.mT.to(rows.acc)
        for r in strips:
            (s_hat, inverse), (t_hat, _) = rows.unit(s[g, r]), rows.unit(t[g, r])
            ds_hat = torch.baddbmm(s_hat @ ss, t_hat, ts, alpha=-1).mul_(4 / (G * n * n))
            ds[g, r] = rows.through(ds_hat, s_hat, inverse).to(ds.dtype)
    return not_negative(total) / (G * n * n)


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
    rows = Rows(normalize, eps, acc)
    if algorithm == "gram":
        return gram(s, t, ds, rows, n=s.shape[1]).to(acc), dstudent
    return _tile(s, t, ds, rows, rectify), dstudent


def manifold_fwd(
    students: list[Tensor],
    teachers: list[Tensor],
    indices: list[Tensor],
    intra: float,
    inter: float,
    random: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    acc = accumulator(*students, *teachers)
    terms = students[0].new_empty((len(students), 3), dtype=acc)
    weights = [weight / len(students) for weight in (intra, inter, random)]
    dstudents = []
    for layer, (s, t, index) in enumerate(zip(students, teachers, indices, strict=True)):
        N = s.shape[1]
        at = (index // N, index % N)
        total = s.new_zeros(s.shape if with_grad else (0,), dtype=accumulator(s))
        pairs = (("intra", s, t), ("inter", s, t), ("intra", s[at][None], t[at][None]))
        for i, (scope, a, b) in enumerate(pairs):
            terms[layer, i], d = relation_fwd(a, b, scope, True, "none", 1e-12, "tile", with_grad)
            if with_grad and i < 2:
                total.add_(d, alpha=weights[i])
            elif with_grad:
                total.index_put_(at, weights[i] * d[0].to(total.dtype), accumulate=True)
        dstudents.append(total.to(stored_gradient(s)))
    means = terms.mean(0)
    loss = means[0] * intra
    for mean, weight in zip(means[1:].unbind(), (inter, random), strict=True):
        loss = torch.add(loss, mean, alpha=weight)
    return loss, means, dstudents


def manifold_bwd(dloss: Tensor, stored: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    # A number of 1 dimension, unlike one of 0, is not rounded to 16 bits first.
    return [torch.mul(d, dloss.reshape(1), out=torch.empty_like(d, dtype=dtype)) for d in stored]
