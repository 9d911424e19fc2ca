"""Losses of two rows of logits and their gradients; of divergences, on CPUs a few rows at a time."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._precision import accumulator

CHUNK = 1 << 17  # elements on a CPU, so that intermediate results stay in the cores' caches


def softmax_kl(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    alpha: float,
    beta: float,
    temperature: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """KL(q‖p) = Σ q (e^u - 1 - u), with p, q the softmax of s/T, t/T and u = log p - log q; d/ds = (p - q)/T.

    No term is negative, so none cancels another: q (log q - log p) would lose half the digits near a match. A class of
    logit -inf contributes nothing where the teacher's is, +inf where the student's alone is.
    """
    acc, (B, C) = accumulator(student, teacher), student.shape
    dstudent = student.new_empty((B, C) if with_grad else (0,), dtype=acc)
    kl = student.new_empty(B, dtype=acc)
    rows = max(CHUNK // C, 1) if student.device.type == "cpu" else B
    for first in range(0, B, rows):
        i = slice(first, first + rows)
        s, t = student[i].to(acc), teacher[i].to(acc)
        p, q = s, t
        if target is not None:
            y = target[i, None]
            p, q = (x.scatter(1, y, -math.inf) for x in (s, t))
        m_s, m_t = top_s, top_t = [x.amax(-1, keepdim=True) for x in (p, q)]
        if target is not None:  # a network that has switched all other classes off has no distribution among them
            none_s, none_t = top_s == -math.inf, top_t == -math.inf
            m_s, m_t = top_s.masked_fill(none_s, 0), top_t.masked_fill(none_t, 0)
        p, q = (p - m_s).mul_(1 / temperature).exp_(), (q - m_t).mul_(1 / temperature).exp_()
        l_s, l_t = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
        if target is not None:
            l_s, l_t = l_s.masked_fill_(none_s, 1), l_t.masked_fill_(none_t, 1)
        p, q = p.mul_(1 / l_s), q.mul_(1 / l_t)
        # u = log p - log q: one rounding error for the whole row, none at a match
        a_s, a_t = _moves(m_s, m_t, temperature)
        shift = ((m_s - a_s) - (m_t - a_t)) / temperature + (l_s / l_t).log()
        u = (-shift).add((s - a_s).sub_(t - a_t), alpha=1 / temperature)
        excess = torch.where(u < 1, torch.expm1(u).mul_(q), p - q)  # p - q
        among = (excess - u.mul_(q).masked_fill_(q == 0, 0)).sum(-1)
        if target is not None:
            among = among.masked_fill_(none_s[:, 0], math.inf).masked_fill_(none_t[:, 0], 0)
            excess.masked_fill_(none_s | none_t, 0)
        kl[i] = beta * among if beta != 0 else 0  # a term of weight 0 may be infinite
        # Σ (p - q) = 0: what is left of it is that error, harmless in the sum above but not in the gradient.
        of_p = -beta * excess.sum(-1, keepdim=True)
        if target is not None:
            odds = (
                (x.gather(1, y) - top) / temperature - total.log()
                for x, top, total in ((s, top_s, l_s), (t, top_t, l_t))
            )
            binary, difference = _binary_kl(*odds)
            if alpha != 0:
                kl[i] += alpha * binary.squeeze(1)
            of_p -= alpha * difference
        if with_grad:
            torch.addcmul(excess.mul_(beta), p, of_p, out=dstudent[i])
            if target is not None:
                dstudent[i].scatter_(1, y, alpha * difference)
            dstudent[i].div_(temperature)
    return kl, dstudent


def nkd(
    student: Tensor, teacher: Tensor, target: Tensor, gamma: float, temperature: float, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """-q_y log p_y at a temperature of 1, and gamma T² times a cross-entropy of the other classes at T.

    That is their divergence and the teacher's entropy, so that the gradient keeps the divergence's digits.
    """
    acc, (B, C) = accumulator(student, teacher), student.shape
    dstudent = student.new_empty((B, C) if with_grad else (0,), dtype=acc)
    loss = student.new_empty(B, dtype=acc)
    rows = max(CHUNK // C, 1) if student.device.type == "cpu" else B
    for first in range(0, B, rows):
        i = slice(first, first + rows)
        s, t, y = student[i].to(acc), teacher[i].to(acc), target[i, None]
        log_p = s.log_softmax(-1)
        of_target, q = log_p.gather(1, y), t.softmax(-1).gather(1, y)
        loss[i] = -(q * of_target.masked_fill(q == 0, 0)).squeeze(1)  # 0 log 0 = 0
        if with_grad:
            torch.mul(log_p.exp_(), q, out=dstudent[i]).scatter_(1, y, q * of_target.expm1())
        if gamma == 0:  # of a term that may be infinite
            continue
        others = (t / temperature).scatter_(1, y, -math.inf)
        has_class = (others != -math.inf).any(-1, keepdim=True)
        entropy = torch.special.entr(others.masked_fill_(~has_class, 0).softmax(-1)).sum(-1)
        kl, ds = softmax_kl(s, t, target[i], 0.0, 1.0, temperature, with_grad)
        weight = gamma * temperature**2
        loss[i].add_(kl + entropy.masked_fill_(~has_class[:, 0], 0), alpha=weight)
        if with_grad:
            dstudent[i].add_(ds, alpha=weight)
    return loss, dstudent


def competition(
    student: Tensor, teacher: Tensor, temperature: float, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """J = ½ Σ M log(M² / PQ) with P, Q and M = (P + Q)/2 clamped, whose slopes are 0 where they are.

    Where none is, M² / PQ is 1 + (p - q)² / 4pq, and the slope by p has (p - q) / 4p: they keep the digits of p - q.
    """
    acc = accumulator(student, teacher)
    p, q = ((z.to(acc) / temperature).softmax(-1) for z in (student, teacher))
    m = (p + q).div_(2)
    held_p, held_q, held_m = (x.clamp(0.01, 0.99) for x in (p, q, m))
    in_p, in_q, in_m = p == held_p, q == held_q, m == held_m
    apart, product = p - q, held_p * held_q
    near = (apart * apart).div_(4).div_(product).log1p_()
    log_ratio = torch.where(in_p & in_q & in_m, near, (held_m * held_m).div_(product).log_())
    j = (held_m * log_ratio).sum(-1).div_(2)
    by_m = log_ratio.div_(4).masked_fill_(~in_m, 0)

    def gradient(x: Tensor, held: Tensor, inside: Tensor, apart: Tensor) -> Tensor:
        of_x = (held_m / held).div_(-2).masked_fill_(~inside, 0).add_(in_m, alpha=0.5)
        by_x = torch.where(inside & in_m, apart / (4 * held), of_x).add_(by_m)
        return (x * (by_x - (by_x * x).sum(-1, keepdim=True))).div_(temperature)

    sides = zip(wanted, ((p, held_p, in_p, apart), (q, held_q, in_q, -apart)), strict=True)
    ds, dt = (gradient(*side) if is_wanted else side[0].new_empty(0) for is_wanted, side in sides)
    return j, ds, dt


def _moves(m_s: Tensor, m_t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the shifts of two rows with these maxima that make their difference exact.

    The row with the larger offset is moved towards the other by a multiple of a power of two."""
    step = 2.0 ** math.floor(math.log2(temperature))
    apart = ((m_s - m_t) / step).round() * step
    a_s = apart.masked_fill(m_s.abs() < m_t.abs(), 0)
    return a_s, a_s - apart


def _binary_kl(of_p: Tensor, of_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL of (q, 1 - q) against (p, 1 - p), each given by its log-odds, and p - q; in float64, a number a row."""
    p, q = of_p.double(), of_q.double()
    kl = torch.zeros_like(p)
    for a, b in ((p, q), (-p, -q)):
        q_b = b.sigmoid()
        kl += (q_b * (F.logsigmoid(b) - F.logsigmoid(a))).masked_fill_(q_b == 0, 0)
    return kl.to(of_p.dtype), (p.sigmoid() - q.sigmoid()).to(of_p.dtype)
