"""KL divergence of the softmaxes of two rows of logits, whole or split at a target, the normalised loss of a target and
the others, the competition of two networks: one program per row.

With z = logits / T, u = log(p/q):  KL = Σ q (e^u - 1 - u), dz = p - q. A row is read three times, from L2 after the
first: for the sums of the exponentials, for those of the divergence, for the gradient.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# (BLOCK, num_warps) by the longest row taken at once, the same on every architecture: the kernel only streams memory.
# Four elements a thread: with eight the loops need about 60 registers, where ptxas may spill to let more warps run.
BLOCKS = ((1024, 8), (2048, 16))


@triton.jit
def _row(ptr, j, C, stride, target):
    """Load columns j in float32; -inf at the target and beyond the last."""
    z = tl.load(ptr + j.to(tl.int64) * stride, mask=j < C, other=-float("inf")).to(tl.float32)
    return tl.where(j == target, -float("inf"), z)


@triton.jit
def _add_exponentials(m, total, z, inv_temperature):
    """Update the maximum and Σ e^((z - m)/T) by another block; (-inf, 0) before the first."""
    new = tl.maximum(m, tl.max(z, 0))
    base = tl.where(new == -float("inf"), 0.0, new)
    return new, total * tl.exp((m - base) * inv_temperature) + tl.sum(tl.exp((z - base) * inv_temperature), 0)


@triton.jit
def _expm1(x):
    """e^x - 1 for |x| < 1/2."""
    p = x * 2.4801587302e-5 + 1.9841269841e-4
    p = p * x + 1.3888888889e-3
    p = p * x + 8.3333333333e-3
    p = p * x + 4.1666666667e-2
    p = p * x + 1.6666666667e-1
    p = p * x + 0.5
    return p * (x * x) + x


@triton.jit
def _moves(m_s, m_t, step):
    """Return the shifts of two rows that make their difference exact. The row with the larger offset is moved towards
    the other by a multiple of a power of two."""
    apart = tl.floor((m_s - m_t) / step + 0.5) * step
    moves_t = tl.abs(m_s) < tl.abs(m_t)
    return tl.where(moves_t, 0.0, apart), tl.where(moves_t, -apart, 0.0)


@triton.jit
def _difference(s, t, m_s, m_t, a_s, a_t, inv_l_s, inv_l_t, shift, inv_temperature):
    """p, q, u = log(p/q) and p - q, as q (e^u - 1) where that has more digits."""
    absent = (s == -float("inf")) & (t == -float("inf"))
    u = (tl.where(absent, 0.0, s - a_s) - tl.where(absent, 0.0, t - a_t)) * inv_temperature - shift
    p = tl.exp((s - m_s) * inv_temperature) * inv_l_s
    q = tl.exp((t - m_t) * inv_temperature) * inv_l_t
    return p, q, u, tl.where(tl.abs(u) < 0.5, _expm1(u) * q, p - q)


@triton.jit
def _log_probability(odds):
    e = tl.exp(-tl.abs(odds))
    u = 1.0 + e
    # log(1 + e): the rounding of u is in e / (u - 1) as well, and e is left where u is 1.
    return tl.minimum(odds, 0.0) - tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))


@triton.jit
def _probability(odds):
    e = tl.exp(-tl.abs(odds))
    return tl.where(odds < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _half(odds_p, odds_q):
    """Return a term of the KL of two classes."""
    q = _probability(odds_q)
    return tl.where(q == 0, 0.0, q * (_log_probability(odds_q) - _log_probability(odds_p)))


@triton.jit
def _softmax_kl_kernel(
    s_ptr,  # (B, C)
    t_ptr,  # (B, C)
    target_ptr,  # (B,); unused unless HAS_TARGET
    kl_ptr,  # (B,)
    ds_ptr,  # (B, C), contiguous; unused unless HAS_GRAD
    stride_sb,
    stride_sc,
    stride_tb,
    stride_tc,
    C,
    alpha,
    beta,
    inv_temperature,
    step,  # a power of two about T
    HAS_TARGET: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    s_ptr += b * stride_sb
    t_ptr += b * stride_tb
    ds_ptr += b * C
    target = tl.full((), -1, tl.int64)
    if HAS_TARGET:
        target = tl.load(target_ptr + b)

    m_s, l_s = -float("inf"), 0.0
    m_t, l_t = -float("inf"), 0.0
    for j0 in range(0, C, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        m_s, l_s = _add_exponentials(m_s, l_s, _row(s_ptr, j, C, stride_sc, target), inv_temperature)
        m_t, l_t = _add_exponentials(m_t, l_t, _row(t_ptr, j, C, stride_tc, target), inv_temperature)
    # A network that has switched all other classes off has no distribution among them.
    none_s, none_t = l_s == 0.0, l_t == 0.0
    top_s, top_t = m_s, m_t
    if HAS_TARGET:
        m_s, l_s = tl.where(none_s, 0.0, m_s), tl.where(none_s, 1.0, l_s)
        m_t, l_t = tl.where(none_t, 0.0, m_t), tl.where(none_t, 1.0, l_t)
    inv_l_s, inv_l_t = 1.0 / l_s, 1.0 / l_t
    a_s, a_t = _moves(m_s, m_t, step)
    shift = ((m_s - a_s) - (m_t - a_t)) * inv_temperature + tl.log(tl.div_rn(l_s, l_t))  # exactly 0 at a match

    kl = tl.zeros((BLOCK,), tl.float32)
    excess = tl.zeros((BLOCK,), tl.float32)
    for j0 in range(0, C, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        s, t = _row(s_ptr, j, C, stride_sc, target), _row(t_ptr, j, C, stride_tc, target)
        _, q, u, x = _difference(s, t, m_s, m_t, a_s, a_t, inv_l_s, inv_l_t, shift, inv_temperature)
        kl += x - tl.where(q == 0.0, 0.0, u * q)
        excess += x
    value = tl.sum(kl, 0)
    # Σ (p - q) = 0: what is left of it is the rounding of the sums that p and q were divided by.
    of_p = beta * tl.sum(excess, 0)
    if HAS_TARGET:
        value = tl.where(none_t, 0.0, tl.where(none_s, float("inf"), value))
        of_p = tl.where(none_s | none_t, 0.0, of_p)
    value = tl.where(beta == 0, 0.0, beta * value)  # a term of weight 0 may be infinite
    of_target = 0.0
    if HAS_TARGET:
        # One number per row, in float64, because near a match it is a small difference.
        at_s, at_t = tl.load(s_ptr + target * stride_sc), tl.load(t_ptr + target * stride_tc)
        odds_p = ((at_s.to(tl.float32) - top_s) * inv_temperature - tl.log(l_s)).to(tl.float64)
        odds_q = ((at_t.to(tl.float32) - top_t) * inv_temperature - tl.log(l_t)).to(tl.float64)
        binary = (_half(odds_p, odds_q) + _half(-odds_p, -odds_q)).to(tl.float32)
        value += tl.where(alpha == 0, 0.0, alpha * binary)
        of_target = alpha * (_probability(odds_p) - _probability(odds_q)).to(tl.float32)
        of_p += of_target
    tl.store(kl_ptr + b, value)

    if HAS_GRAD:
        for j0 in range(0, C, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            s, t = _row(s_ptr, j, C, stride_sc, target), _row(t_ptr, j, C, stride_tc, target)
            p, _, _, x = _difference(s, t, m_s, m_t, a_s, a_t, inv_l_s, inv_l_t, shift, inv_temperature)
            if HAS_TARGET:
                x = tl.where(none_s | none_t, 0.0, x)
            dz = tl.where(j == target, of_target, beta * x - p * of_p)
            tl.store(ds_ptr + j, dz * inv_temperature, mask=j < C)


@triton.jit
def _log_odds(z, m, total):
    """Return the log-odds of a class against others by their maximum and sum; NaN for an infinite one."""
    return tl.where(z == float("inf"), float("nan"), (z - m) - tl.log(total))


@triton.jit
def _nkd_kernel(
    s_ptr,  # (B, C)
    t_ptr,  # (B, C)
    target_ptr,  # (B,)
    loss_ptr,  # (B,)
    ds_ptr,  # (B, C), contiguous; unused unless HAS_GRAD
    stride_sb,
    stride_sc,
    stride_tb,
    stride_tc,
    C,
    gamma,
    temperature,
    inv_temperature,
    step,  # a power of two about T
    IS_PLAIN: tl.constexpr,  # a temperature of 1, at which the two terms have the same exponentials
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-q_y log p_y + γ T² Σ_{i≠y} -q'_i log p'_i, with the dashed softmaxes those of the other classes at T."""
    b = tl.program_id(0).to(tl.int64)
    s_ptr += b * stride_sb
    t_ptr += b * stride_tb
    ds_ptr += b * C
    target = tl.load(target_ptr + b)

    m_s, l_s, l_t = -float("inf"), 0.0, 0.0
    m_t, plain_s, plain_t = -float("inf"), 0.0, 0.0
    for j0 in range(0, C, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        s, t = _row(s_ptr, j, C, stride_sc, target), _row(t_ptr, j, C, stride_tc, target)
        if not IS_PLAIN:
            _, plain_s = _add_exponentials(m_s, plain_s, s, 1.0)
            _, plain_t = _add_exponentials(m_t, plain_t, t, 1.0)
        m_s, l_s = _add_exponentials(m_s, l_s, s, inv_temperature)
        m_t, l_t = _add_exponentials(m_t, l_t, t, inv_temperature)
    if IS_PLAIN:
        plain_s, plain_t = l_s, l_t
    at_s, at_t = tl.load(s_ptr + target * stride_sc), tl.load(t_ptr + target * stride_tc)
    odds_p = _log_odds(at_s.to(tl.float32), m_s, plain_s)
    odds_q = _log_odds(at_t.to(tl.float32), m_t, plain_t)
    of_target = _probability(odds_q)
    value = tl.where(of_target == 0, 0.0, -of_target * _log_probability(odds_p))
    # A network that has switched all other classes off has no distribution among them.
    none_s, none_t = l_s == 0.0, l_t == 0.0
    m_s, l_s = tl.where(none_s, 0.0, m_s), tl.where(none_s, 1.0, l_s)
    m_t, l_t = tl.where(none_t, 0.0, m_t), tl.where(none_t, 1.0, l_t)
    inv_l_s, inv_l_t = 1.0 / l_s, 1.0 / l_t
    a_s, a_t = _moves(m_s, m_t, step)
    shift = ((m_s - a_s) - (m_t - a_t)) * inv_temperature + tl.log(tl.div_rn(l_s, l_t))  # exactly 0 at a match

    cross = tl.zeros((BLOCK,), tl.float32)
    excess = tl.zeros((BLOCK,), tl.float32)
    for j0 in range(0, C, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        s, t = _row(s_ptr, j, C, stride_sc, target), _row(t_ptr, j, C, stride_tc, target)
        _, q, _, x = _difference(s, t, m_s, m_t, a_s, a_t, inv_l_s, inv_l_t, shift, inv_temperature)
        cross += tl.where(q == 0.0, 0.0, q * (s - m_s))
        excess += x
    among = tl.log(l_s) - tl.sum(cross, 0) * inv_temperature
    among = tl.where(none_t, 0.0, tl.where(none_s, float("inf"), among))
    value += tl.where(gamma == 0, 0.0, gamma * temperature * temperature * among)  # of weight 0 it may be infinite
    tl.store(loss_ptr + b, value)

    if HAS_GRAD:
        weight = tl.where(none_s | none_t, 0.0, gamma * temperature)
        # Σ (p' - q') = 0: what is left of it is the rounding of the sums that both were divided by.
        of_p = weight * tl.sum(excess, 0)
        lost = of_target * _probability(-odds_p)  # by the others to the target
        for j0 in range(0, C, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            s, t = _row(s_ptr, j, C, stride_sc, target), _row(t_ptr, j, C, stride_tc, target)
            p, _, _, x = _difference(s, t, m_s, m_t, a_s, a_t, inv_l_s, inv_l_t, shift, inv_temperature)
            of_others = p if IS_PLAIN else tl.exp(s - m_s) / tl.where(none_s, 1.0, plain_s)
            dz = tl.where(weight == 0, 0.0, weight * x - p * of_p) + of_others * lost
            tl.store(ds_ptr + j, tl.where(j == target, -lost, dz), mask=j < C)


@triton.jit
def _softmax(z, m, inv_l, inv_temperature):
    return tl.exp((z - m) * inv_temperature) * inv_l


@triton.jit
def _clamp(x):
    """Return a probability that counts, and whether x is one. NaN stays."""
    held = tl.where(x < 0.01, 0.01, tl.where(x > 0.99, 0.99, x))
    return held, held == x


@triton.jit
def _agreement(p, q):
    """M log(M² / PQ) of clamped probabilities, and the slopes of half of it by p and q: 0 where they are clamped."""
    m, apart = (p + q) * 0.5, p - q
    held_p, in_p = _clamp(p)
    held_q, in_q = _clamp(q)
    held_m, in_m = _clamp(m)
    product = held_p * held_q
    near = tl.div_rn(apart * apart, 4.0 * product)
    u = 1.0 + near
    # log(1 + near): the rounding of u is in near / (u - 1) as well, and near is left where u is 1.
    near = tl.where(u == 1.0, near, tl.log(u) * tl.div_rn(near, u - 1.0))
    log_ratio = tl.where(in_p & in_q & in_m, near, tl.log(tl.div_rn(held_m * held_m, product)))
    by_m, of_m = tl.where(in_m, 0.25 * log_ratio, 0.0), tl.where(in_m, 0.5, 0.0)
    by_p = tl.where(in_p & in_m, apart / (4.0 * held_p), of_m - tl.where(in_p, held_m / (2.0 * held_p), 0.0))
    by_q = tl.where(in_q & in_m, -apart / (4.0 * held_q), of_m - tl.where(in_q, held_m / (2.0 * held_q), 0.0))
    return held_m * log_ratio, by_m + by_p, by_m + by_q


@triton.jit
def _competition_kernel(
    s_ptr,  # (B, C)
    t_ptr,  # (B, C)
    j_ptr,  # (B,)
    ds_ptr,  # (B, C), contiguous, or None
    dt_ptr,  # (B, C), contiguous, or None
    stride_sb,
    stride_sc,
    stride_tb,
    stride_tc,
    C,
    inv_temperature,
    BLOCK: tl.constexpr,
):
    """J = ½ Σ M log(M² / PQ) of a row, with P, Q and M = (P + Q)/2 clamped."""
    b = tl.program_id(0).to(tl.int64)
    s_ptr += b * stride_sb
    t_ptr += b * stride_tb
    m_s, l_s = -float("inf"), 0.0
    m_t, l_t = -float("inf"), 0.0
    for j0 in range(0, C, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        m_s, l_s = _add_exponentials(m_s, l_s, _row(s_ptr, j, C, stride_sc, -1), inv_temperature)
        m_t, l_t = _add_exponentials(m_t, l_t, _row(t_ptr, j, C, stride_tc, -1), inv_temperature)
    inv_l_s, inv_l_t = 1.0 / l_s, 1.0 / l_t

    total = tl.zeros((BLOCK,), tl.float32)
    of_p = tl.zeros((BLOCK,), tl.float32)
    of_q = tl.zeros((BLOCK,), tl.float32)
    for j0 in range(0, C, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        p = _softmax(_row(s_ptr, j, C, stride_sc, -1), m_s, inv_l_s, inv_temperature)
        q = _softmax(_row(t_ptr, j, C, stride_tc, -1), m_t, inv_l_t, inv_temperature)
        value, by_p, by_q = _agreement(p, q)
        total += value
        of_p += p * by_p
        of_q += q * by_q
    tl.store(j_ptr + b, 0.5 * tl.sum(total, 0))
    if ds_ptr is not None or dt_ptr is not None:
        mean_p, mean_q = tl.sum(of_p, 0), tl.sum(of_q, 0)
        for j0 in range(0, C, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            p = _softmax(_row(s_ptr, j, C, stride_sc, -1), m_s, inv_l_s, inv_temperature)
            q = _softmax(_row(t_ptr, j, C, stride_tc, -1), m_t, inv_l_t, inv_temperature)
            _, by_p, by_q = _agreement(p, q)
            if ds_ptr is not None:
                tl.store(ds_ptr + b * C + j, p * (by_p - mean_p) * inv_temperature, mask=j < C)
            if dt_ptr is not None:
                tl.store(dt_ptr + b * C + j, q * (by_q - mean_q) * inv_temperature, mask=j < C)


def _block(C: int) -> tuple[int, int]:
    return next((block for block in BLOCKS if C <= block[0]), BLOCKS[-1])


def softmax_kl(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    alpha: float,
    beta: float,
    temperature: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    B, C = student.shape
    kl = student.new_empty(B, dtype=torch.float32)
    dstudent = student.new_empty((B, C) if with_grad else (0,), dtype=torch.float32)
    BLOCK, num_warps = _block(C)
    step = 2.0 ** math.floor(math.log2(temperature))
    _softmax_kl_kernel[(B,)](
        student, teacher, student if target is None else target.contiguous(), kl, dstudent,
        *student.stride(), *teacher.stride(),
        C=C, alpha=alpha, beta=beta, inv_temperature=1 / temperature, step=step,
        HAS_TARGET=target is not None, HAS_GRAD=with_grad, BLOCK=BLOCK, num_warps=num_warps,
    )  # fmt: skip
    return kl, dstudent


def nkd(
    student: Tensor, teacher: Tensor, target: Tensor, gamma: float, temperature: float, with_grad: bool
) -> tuple[Tensor, Tensor]:
    B, C = student.shape
    loss = student.new_empty(B, dtype=torch.float32)
    dstudent = student.new_empty((B, C) if with_grad else (0,), dtype=torch.float32)
    BLOCK, num_warps = _block(C)
    step = 2.0 ** math.floor(math.log2(temperature))
    _nkd_kernel[(B,)](
        student, teacher, target.contiguous(), loss, dstudent, *student.stride(), *teacher.stride(),
        C=C, gamma=gamma, temperature=temperature, inv_temperature=1 / temperature, step=step,
        IS_PLAIN=temperature == 1, HAS_GRAD=with_grad, BLOCK=BLOCK, num_warps=num_warps,
    )  # fmt: skip
    return loss, dstudent


def competition(
    student: Tensor, teacher: Tensor, temperature: float, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    B, C = student.shape
    rows = student.new_empty(B, dtype=torch.float32)
    ds, dt = (student.new_empty((B, C) if want else (0,), dtype=torch.float32) for want in wanted)
    BLOCK, num_warps = _block(C)
    _competition_kernel[(B,)](
        student, teacher, rows, ds if wanted[0] else None, dt if wanted[1] else None,
        *student.stride(), *teacher.stride(), C=C, inv_temperature=1 / temperature, BLOCK=BLOCK, num_warps=num_warps,
    )  # fmt: skip
    return rows, ds, dt
