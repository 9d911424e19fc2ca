"""Attention losses in strips of query rows: no N_q x N_k map is ever held, forward or backward."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._precision import accumulator, stored_gradient
from fastkd.eager._common import chunks, not_negative

STRIPS = 8  # (rows, N_k) temporaries alive at once; chunks() bounds them together
NEVER = -math.inf


class _Network(NamedTuple):
    q: Tensor  # (B, H, N_q, d)
    k: Tensor  # (B, H, N_k, d)
    bias: Tensor | None  # (B | 1, H | 1, N_q | 1, N_k | 1)
    scale: float


class _Map(NamedTuple):
    """A strip of a map of probabilities, p = e^y / l with y <= 0; a row without an allowed key has y = -inf, p = 0."""

    y: Tensor
    p: Tensor
    l: Tensor  # noqa: E741 (the equation's letter)
    total: Tensor  # Σ p: 1, or 0 in a row without an allowed key


class _Mask(NamedTuple):
    """The keys that each row may not attend to, and the weights of rows."""

    keys: Tensor | None  # (B, N_k), True = attend
    is_causal: bool
    row_start: int  # query row i has position row_start + i row_step
    row_step: int

    def hidden(self, b: slice, r: range, n_keys: int, device: torch.device) -> Tensor | None:
        """Return the mask of keys hidden from the strip's rows, broadcastable to the strip."""
        out = None if self.keys is None else ~self.keys[b, None, None, :]
        if self.is_causal:
            position = self.row_start + self.row_step * torch.arange(r.start, r.stop, device=device)
            future = torch.arange(n_keys, device=device) > position[:, None]
            out = future if out is None else out | future
        return out


def _blocks(B: int, H: int, N_q: int, N_k: int, together: bool) -> Iterator[tuple[slice, slice, list[range]]]:
    """Yield (images, heads, strips of rows) that cover all maps; `together` keeps an image's heads in one block."""
    images = chunks(B, STRIPS * H * N_q * N_k)
    for b in images:
        n_images = min(images.step, B - b)
        heads = range(0, H, H) if together else chunks(H, STRIPS * n_images * N_q * N_k)
        for h in heads:
            rows = chunks(N_q, STRIPS * n_images * min(heads.step, H - h) * N_k)
            strips = [range(r, min(r + rows.step, N_q)) for r in rows]
            yield slice(b, b + n_images), slice(h, h + heads.step), strips


def _part(x: Tensor, *index: slice) -> Tensor:
    """x[index], where dimensions of size 1 broadcast."""
    return x[tuple(i if n > 1 else slice(None) for i, n in zip(index, x.shape, strict=False))]


def _keys(k: Tensor, mask: Tensor | None, has_softmax: bool, acc: torch.dtype) -> Tensor:
    """Return the keys of a block, under a softmax minus their mean. Softmax is invariant to it, and removing a common
    offset of the scores first avoids cancellation."""
    k = k.to(acc)
    if mask is not None:
        k = k.masked_fill(~mask[:, None, :, None], 0)  # padding may hold anything
    return k - k.mean(-2, keepdim=True) if has_softmax else k


def _scores(
    q: Tensor, k: Tensor, bias: Tensor | None, bias_scale: float, hidden: Tensor | None, has_softmax: bool
) -> Tensor:
    """Return z of a strip, -inf where hidden. Under a softmax, the bias is used minus its row maximum."""
    z = q @ k.mT
    if bias is not None:
        bias = bias.to(z.dtype) * bias_scale
        if has_softmax:
            m = bias.amax(-1, keepdim=True)
            bias -= m.masked_fill_(m == NEVER, 0)
        z += bias
    return z if hidden is None else z.masked_fill_(hidden, NEVER)


def _softmax(z: Tensor, has_holes: bool) -> _Map:
    """Return the softmax; z is overwritten."""
    m = z.amax(-1, keepdim=True)
    if has_holes:
        m.masked_fill_(m == NEVER, 0)
    y = z.sub_(m)
    p = y.exp()
    l = p.sum(-1, keepdim=True)  # noqa: E741
    total = torch.ones_like(l)
    if has_holes:
        total.masked_fill_(l == 0, 0)
        l.masked_fill_(l == 0, 1)
    return _Map(y, p.div_(l), l, total)


def _head_mean(x: _Map) -> _Map:
    """Average over heads, (n, H, rows, N_k) -> (n, 1, rows, N_k); log-sum-exp gives log p even if p underflows."""
    y = torch.logsumexp(x.y - x.l.log(), 1, keepdim=True) - math.log(x.p.shape[1])
    return _Map(y, x.p.mean(1, keepdim=True), torch.ones_like(x.l[:, :1]), x.total.mean(1, keepdim=True))


def _log_ratio(a: _Map, b: _Map, absent: Tensor | None) -> Tensor:
    """Return log(p_a / p_b) without the rounding of either logarithm, and 0 for keys without weight."""
    x = a.y - b.y
    x += torch.log1p((b.l - a.l) / a.l)
    return x if absent is None else x.masked_fill_(absent, 0)


def _divergence(name: str, s: _Map, t: _Map, has_holes: bool) -> tuple[Tensor, Tensor]:
    """Row losses (..., 1), and their gradient by log p_s up to multiples of p_s, which the softmax takes out.

    The sums over p of both networks are equal. Added to the KL, their difference makes each term >= 0 and of second
    order in log p_t - log p_s, so that what l was rounded by cancels and a nearly matched student keeps its digits.
    """
    if name == "kl":
        dlog = s.p - t.p
        terms = _log_ratio(t, s, t.p == 0 if has_holes else None).mul_(t.p).add_(dlog)
        return terms.sum(-1, keepdim=True) - (s.total - t.total), dlog
    if name == "reverse_kl":
        dlog = _log_ratio(s, t, s.p == 0 if has_holes else None).mul_(s.p)
        return (dlog - s.p).add_(t.p).sum(-1, keepdim=True) + (s.total - t.total), dlog
    if name == "ce":
        y = s.y.masked_fill(t.p == 0, 0) if has_holes else s.y
        return t.total * s.l.log() - (t.p * y).sum(-1, keepdim=True), s.p - t.p
    if name == "mse":
        d = s.p - t.p
        return d.square().mean(-1, keepdim=True), (d * s.p).mul_(2 / d.shape[-1])
    # js: log(p_s / m) = -log(1 + (e^-x - 1)/2), x = log(p_s / p_t); beyond 80 its weight p_s is 0.
    x = _log_ratio(s, t, (s.p == 0) & (t.p == 0) if has_holes else None).clamp_(-80, 80)
    dlog = torch.expm1(-x).mul_(0.5).log1p_().mul_(s.p).mul_(-0.5)
    other = torch.expm1(x).mul_(0.5).log1p_().mul_(t.p).mul_(-0.5)
    return (dlog + other).sum(-1, keepdim=True), dlog


def _through_softmax(dlog: Tensor, x: _Map) -> None:
    """dz = dlog - p Σ dlog, in place of dlog. Taken from dlog - c p, which is the same, with c such that the likeliest
    key has 0: where a row is all but one key, dlog there is 1/(1 - p) times what is left of it."""
    top = x.p.argmax(-1, keepdim=True)
    c = dlog.gather(-1, top) / x.p.gather(-1, top).clamp_min_(torch.finfo(x.p.dtype).tiny)
    dlog.addcmul_(x.p, c, value=-1).scatter_(-1, top, 0)
    dlog.addcmul_(x.p, dlog.sum(-1, keepdim=True), value=-1)


def _softmax_loss(divergence: str, heads: str, z_s: Tensor, z_t: Tensor, off: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row losses (..., rows, 1) and dz_s of a strip; takes the scores over. off: rows that do not count, or None where
    every row does and sees every key."""
    has_holes = off is not None
    each, t = _softmax(z_s, has_holes), _softmax(z_t, has_holes)
    s, t = (_head_mean(each), _head_mean(t)) if heads == "mean" else (each, t)
    loss, dz = _divergence(divergence, s, t, has_holes)
    if heads == "mean":
        share = torch.softmax(each.y - each.l.log(), 1)  # gradient of each head by the logarithm of the mean
        dz = share.mul_(dz)
        if has_holes:
            dz.masked_fill_(s.y == NEVER, 0)
    if heads == "mean" or divergence not in ("kl", "ce"):  # these two sum to 0 over a row as they are
        _through_softmax(dz, each)
    if off is not None:
        loss.masked_fill_(t.total == 0, 0)
        dz.masked_fill_(off | (s.total == 0) | (t.total == 0), 0)
    return loss, dz


def _score_loss(z_s: Tensor, z_t: Tensor, off: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the losses and dz_s of the mean squared difference of scores; z_s is overwritten."""
    if off is None:
        d = z_s.sub_(z_t)
    else:
        absent = (z_s == NEVER) & (z_t == NEVER) | off
        d = z_s.sub_(z_t).masked_fill_(absent, 0)
    loss = d.square().mean(-1, keepdim=True)
    return loss, d.mul_(2 / d.shape[-1])


class _Gradients(NamedTuple):
    """Outputs for the student's gradients; None for those not wanted."""

    q: Tensor | None
    k: Tensor | None
    bias: Tensor | None  # in the accumulation dtype
    is_shared: bool  # keys are the queries: k takes the sum of both gradients


def _gradients(dq: Tensor, dk: Tensor, dbias: Tensor, is_shared: bool) -> _Gradients:
    """Empty ones are not wanted."""
    q, k, bias = (x if x.numel() > 0 else None for x in (dq, dk, dbias))
    return _Gradients(None, q, bias, True) if is_shared else _Gradients(q, k, bias, False)


def _sweep(
    student: _Network,
    teacher: _Network,
    mask: _Mask,
    w: Tensor,
    divergence: str,
    heads: str,
    bias_scale: float,
    loss: Tensor,
    grads: _Gradients,
) -> None:
    """Fill loss (B, H | 1, N_q) with w times the row losses, w (B | 1, H | 1, N_q), and grads with their sum's."""
    acc, has_softmax = loss.dtype, divergence != "score_mse"
    B, H, N_q, _ = student.q.shape
    N_k = student.k.shape[2]
    has_holes = mask.keys is not None or mask.is_causal or student.bias is not None or teacher.bias is not None
    wants_grad = any(g is not None for g in grads[:3])
    for b, h, strips in _blocks(B, max(H, teacher.q.shape[1]), N_q, N_k, heads == "mean"):
        key_mask = None if mask.keys is None else mask.keys[b]
        k_s, k_t = (_keys(x.k[b, h], key_mask, has_softmax, acc) for x in (student, teacher))
        dk = None if grads.k is None else torch.zeros_like(k_s)
        for rows in strips:
            r = slice(rows.start, rows.stop)
            w_strip = _part(w, b, h, r).unsqueeze(-1)
            hidden = mask.hidden(b, rows, N_k, w.device)
            q_s, q_t = ((x.q[b, h, r].to(acc) * x.scale).masked_fill_(w_strip == 0, 0) for x in (student, teacher))
            bias_s, bias_t = (
                None if x.bias is None else _part(x.bias, b, h, r, slice(None)) for x in (student, teacher)
            )
            z_s = _scores(q_s, k_s, bias_s, bias_scale, hidden, has_softmax)
            z_t = _scores(q_t, k_t, bias_t, bias_scale, hidden, has_softmax)
            off = w_strip == 0 if has_holes else None
            if has_softmax:
                strip_loss, dz = _softmax_loss(divergence, heads, z_s, z_t, off)
            else:
                strip_loss, dz = _score_loss(z_s, z_t, off)
            loss[b, h, r] = torch.where(w_strip == 0, 0, w_strip * strip_loss).squeeze(-1)
            if not wants_grad:
                continue
            dz *= w_strip
            if grads.q is not None:
                grads.q[b, h, r] = (dz @ k_s).mul_(student.scale).to(grads.q.dtype)
            if dk is not None:
                dk += dz.mT @ q_s
                if grads.is_shared:
                    dk[:, :, r] += (dz @ k_s).mul_(student.scale)
            if grads.bias is not None:
                dbias = _part(grads.bias, b, h, r, slice(None))
                dbias.add_(dz.sum_to_size(dbias.shape), alpha=bias_scale)
        if grads.k is not None and dk is not None:
            grads.k[b, h] = dk.to(grads.k.dtype)


def _pairs(x_s: Tensor, x_t: Tensor, off: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row strips of operands (n, H, N, d) of both networks in float64; rows that are off, (n, 1, N, 1), are 0."""
    together = STRIPS if x_s.device.type == "cpu" else 2  # on a GPU a strip costs launches
    rows = chunks(x_s.shape[2], together * (x_s[:, :, 0].numel() + x_t[:, :, 0].numel()))
    for r in (slice(r0, r0 + rows.step) for r0 in rows):
        s, t = x_s[:, :, r].double(), x_t[:, :, r].double()
        yield (r, s, t) if off is None else (r, s.masked_fill(off[:, :, r], 0), t.masked_fill(off[:, :, r], 0))


def _grams(x_s: Tensor, x_t: Tensor, off: Tensor | None, w: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(X_sᵀ W X_s, X_tᵀ W X_s, X_tᵀ W X_t) of every image and head."""
    n, H, _, d_s, d_t = *x_s.shape, x_t.shape[-1]
    ss, ts, tt = (x_s.new_zeros((n, H, a, b), dtype=torch.float64) for a, b in ((d_s, d_s), (d_t, d_s), (d_t, d_t)))
    for r, s, t in _pairs(x_s, x_t, off):
        ws, wt = (s, t) if w is None else (s * w[:, :, r], t * w[:, :, r])
        ss += ws.mT @ s
        ts += wt.mT @ s
        tt += wt.mT @ t
    return ss, ts, tt


def _gram(student: _Network, teacher: _Network, key_mask: Tensor | None, w: Tensor, grads: _Gradients) -> Tensor:
    """Σ w ||Q_s K_sᵀ - Q_t K_tᵀ||² = <A_ss, C_ss> - 2 <A_ts, C_ts> + <A_tt, C_tt>, A_xy = Q_xᵀ W Q_y, C_xy = K_xᵀ K_y.

    dQ_s = 2 W (Q_s C_ss - Q_t C_ts), dK_s = 2 (K_s A_ss - K_t A_ts); scales and 1/N_k go with A and C, and all of it
    is in float64, where near a match the three terms cancel.
    """
    B, H, N_q, _ = student.q.shape
    total = w.new_zeros((), dtype=torch.float64)
    images = chunks(B, H * (student.q.shape[-1] + teacher.q.shape[-1]) ** 2)
    w = w.double().expand(B, 1, N_q).unsqueeze(-1)
    f_ss, f_ts, f_tt = (
        a.scale * b.scale / student.k.shape[2] for a, b in ((student, student), (teacher, student), (teacher, teacher))
    )
    for b in (slice(b0, b0 + images.step) for b0 in images):
        hidden = None if key_mask is None else ~key_mask[b, None, :, None]
        queries = student.q[b], teacher.q[b], w[b] == 0
        keys = student.k[b], teacher.k[b], hidden
        a_ss, a_ts, a_tt = _grams(*queries, w[b])
        c_ss, c_ts, c_tt = _grams(*keys, None)
        total += f_ss * (a_ss * c_ss).sum() - 2 * f_ts * (a_ts * c_ts).sum() + f_tt * (a_tt * c_tt).sum()
        if grads.q is not None:
            for r, q_s, q_t in _pairs(*queries):
                dq = q_s @ (2 * f_ss * c_ss) - q_t @ (2 * f_ts * c_ts)
                grads.q[b, :, r] = (w[b, :, r] * dq).to(grads.q.dtype)
        if grads.k is not None:
            for r, k_s, k_t in _pairs(*keys):
                grads.k[b, :, r] = (k_s @ (2 * f_ss * a_ss) - k_t @ (2 * f_ts * a_ts)).to(grads.k.dtype)
    return not_negative(total)


def attention_fwd(
    q_student: Tensor,
    k_student: Tensor | None,
    q_teacher: Tensor,
    k_teacher: Tensor,
    bias_student: Tensor | None,
    bias_teacher: Tensor | None,
    key_mask: Tensor | None,
    row_weight: Tensor | None,
    reduction: str,
    algorithm: str,
    divergence: str,
    heads: str,
    scales: list[float],
    is_causal: bool,
    rows: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k = q_student if k_student is None else k_student
    scale_student, scale_teacher, bias_scale = scales
    student = _Network(q_student, k, bias_student, scale_student)
    teacher = _Network(q_teacher, k_teacher, bias_teacher, scale_teacher)
    acc = accumulator(*(x for x in (*student, *teacher) if isinstance(x, Tensor)))
    B, H, N_q = q_student.shape[:3]
    H_out = 1 if heads == "mean" else H
    with_dq, with_dk, with_dbias = wanted
    dq = q_student.new_empty(q_student.shape if with_dq else (0,), dtype=stored_gradient(q_student))
    dk = k.new_empty(k.shape if with_dk else (0,), dtype=stored_gradient(k))
    # Sums over strips wait in the accumulation dtype.
    dbias = q_student.new_zeros(bias_student.shape if bias_student is not None and with_dbias else (0,), dtype=acc)
    grads = _gradients(dq, dk, dbias, k_student is None)

    if row_weight is None:
        row_weight = q_student.new_full((1, 1, 1), 1 / N_q if reduction == "mean" else 1.0, dtype=acc)
        row_weight = row_weight.expand(B, 1, N_q)
    w = row_weight * (1 / (B * H_out) if reduction == "mean" else 1.0)
    if algorithm == "gram":
        loss = _gram(student, teacher, key_mask, w, grads).to(acc)
    else:
        loss = q_student.new_empty((B, H_out, N_q), dtype=acc)
        mask = _Mask(key_mask, is_causal, *rows)
        _sweep(student, teacher, mask, w, divergence, heads, bias_scale, loss, grads)
        loss = loss if reduction == "none" else loss.sum()
    return loss, dq, dk, dbias if bias_student is None else dbias.to(stored_gradient(bias_student))
