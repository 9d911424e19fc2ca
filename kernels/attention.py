"""Attention losses from tiles of scores: no N_q x N_k map beyond a bounded strip, which only averages of heads need.

Scores are z = scale q kᵀ + bias, in units of log 2 under a softmax. Of a row are kept its maxima m, the student's sum
l_s = Σ e^{z_s-m_s} and ρ = l_s / l_t - 1, 16 bytes, from which every pass forms p anew. For KL(a ‖ b):

    Σ_j p_a log(p_a / p_b) = u / l_a + log(l_b / l_a),  u = Σ_j e^{z_a-m_a} ((z_a - m_a) - (z_b - m_b)),
    log(l_b / l_a) = log(1 + x / l_a),                  x = Σ_j e^{z_b-m_b} - e^{z_a-m_a},

both corrected whenever a maximum moves. x is summed by itself so that near a match the two terms keep their digits, and
p_s - p_t = (e_s - e_t - ρ e_t) / l_s is exactly 0 for equal networks. A gradient of the form p (v - Σ p v) needs two
numbers more, c and v_top. Gradients of 16-bit networks go to the matrix units as two terms, high and low: one shows.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, float32_products, multiprocessors, stored_gradient

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
NEVER: tl.constexpr = tl.constexpr(float("-inf"))

STRIP_BYTES = 64 << 20  # of what averages of heads keep
PARTIAL_BYTES = 32 << 20  # of a bias gradient's partial sums
GRAM_CHUNK = 1 << 20  # elements of queries or keys taken to float64 at a time
CENTRE_BLOCK = 128  # keys
UNSPECIALIZED = (  # that a count is 1 or a multiple of 16 is not worth a compilation
    "H", "N_q", "N_k", "rows_total", "row_start", "row_step", "first_b", "first_row", "strip_rows", "H_s", "H_t",
    "pitch", "B_bias", "H_bias", "steps", "per_split", "q_tiles", "k_tiles", "bias_numel",
)  # fmt: skip


class Tile(NamedTuple):
    """Scores of BLOCK_M queries and BLOCK_N keys."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    rows: Tile  # strips of queries, over keys
    keys: Tile  # strips of keys, over queries
    bias: Tile  # one tile, over images and heads
    mean: Tile  # strips of queries, over keys and heads
    fused: tuple[Tile, ...] = ()  # all keys, up to BLOCK_N, and strips of queries: loss and gradients in one pass


_LARGE = {
    64: Config(
        Tile(64, 64, 8, 2), Tile(32, 128, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2),
        (Tile(32, 64, 4, 2), Tile(16, 128, 8, 2)),
    ),
    128: Config(Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2)),
}  # fmt: skip


_SMALL = {
    64: Config(
        Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2),
        (Tile(16, 64, 4, 2), Tile(16, 128, 8, 2)),
    ),
    128: Config(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
}  # fmt: skip
_CDNA = {
    64: Config(
        Tile(64, 32, 8, 1), Tile(16, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1),
        (Tile(16, 64, 4, 1), Tile(16, 128, 8, 1)),
    ),
    128: Config(Tile(32, 32, 8, 1), Tile(16, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}  # fmt: skip
_FLOAT32 = {
    64: Config(Tile(32, 16, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
    128: Config(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1)),
}
# By architecture, bytes of the widest input (all are taken as wide) and the widest head taken. Heads are padded to a
# power of two; those wider than the last are taken in pieces.
CONFIGS: dict[tuple[str, int], dict[int, Config]] = {
    ("8.x", 2): _SMALL,
    ("9.0", 2): _LARGE,
    ("10.x", 2): _LARGE | {64: replace(_LARGE[64], keys=Tile(32, 64, 8, 2), bias=Tile(64, 32, 8, 2))},
    ("cdna", 2): _CDNA,
    ("8.x", 4): _FLOAT32,
    ("9.0", 4): _FLOAT32,
    ("10.x", 4): _FLOAT32,
    ("cdna", 4): dict.fromkeys((64, 128), Config(*[Tile(16, 16, 4, 1)] * 4)),
}


@triton.jit
def _head_rows(ptr, i, stride_n):
    return ptr + i.to(tl.int64) * stride_n


@triton.jit
def _load(rows, mask, d, D, stride_d):
    """Columns d of some rows: (rows, d)."""
    return tl.load(rows[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _load_keys(rows, mask, d, D, stride_d, mean_ptr, IS_CENTRED: tl.constexpr):
    """Less their mean under a softmax, which cannot tell: a common offset of scores is gone before it costs digits."""
    k = _load(rows, mask, d, D, stride_d)
    if IS_CENTRED:
        k = k.to(tl.float32) - tl.load(mean_ptr + d, mask=d < D, other=0.0)[None, :]
    return k


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if a.dtype != b.dtype:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _product(q, q_rows, in_q, stride_qd, k, k_rows, in_k, stride_kd, mean_ptr, D, ARE_KEYS_FIRST: tl.constexpr,
             IS_CENTRED: tl.constexpr, IS_WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """q kᵀ, or k qᵀ, of loaded heads; of wide ones piece by piece."""
    M: tl.constexpr = k.shape[0] if ARE_KEYS_FIRST else q.shape[0]
    N: tl.constexpr = q.shape[0] if ARE_KEYS_FIRST else k.shape[0]
    z = tl.zeros((M, N), tl.float32)
    if IS_WIDE:
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            q_d = _load(q_rows, in_q, d, D, stride_qd)
            k_d = _load_keys(k_rows, in_k, d, D, stride_kd, mean_ptr, IS_CENTRED)
            if ARE_KEYS_FIRST:  # noqa: SIM108 (one of the two is compiled)
                z = _dot(k_d, tl.trans(q_d), z, PRECISION)
            else:
                z = _dot(q_d, tl.trans(k_d), z, PRECISION)
    elif ARE_KEYS_FIRST:
        z = _dot(k, tl.trans(q), z, PRECISION)
    else:
        z = _dot(q, tl.trans(k), z, PRECISION)
    return z


@triton.jit
def _visible(i, j, sees, row_start, row_step, IS_CAUSAL: tl.constexpr):
    """Which keys j queries i see; i, j and sees broadcast to a tile."""
    if IS_CAUSAL:
        sees = sees & (j <= row_start + i.to(tl.int64) * row_step)
    return sees


@triton.jit
def _finish_scores(z, scale, i, in_i, j, sees, visible, bias_ptr, stride_bq, stride_bk, top_ptr, stride_top,
                   bias_scale, HAS_BIAS: tl.constexpr, HAS_SOFTMAX: tl.constexpr):  # fmt: skip
    """z of a tile, -inf where hidden. Under a softmax a bias, too, is taken less its row maximum."""
    z = z * scale
    if HAS_BIAS:
        offs = i.to(tl.int64) * stride_bq + j.to(tl.int64) * stride_bk
        bias = tl.load(bias_ptr + offs, mask=in_i & sees, other=0.0).to(tl.float32)
        if HAS_SOFTMAX:
            top = tl.load(top_ptr + i.to(tl.int64) * stride_top, mask=in_i, other=0.0).to(tl.float32)
            bias = bias - _base(top)
        z += bias * bias_scale
    return tl.where(visible, z, NEVER)


@triton.jit
def _log1p(x):
    """log(1 + x), right to rounding near 0 as well."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _or_one(x):
    return tl.where(x == 0, 1.0, x)


@triton.jit
def _base(m):
    """What a row's scores are taken less of: its maximum, 0 without keys."""
    return tl.where(m == NEVER, 0.0, m)


@triton.jit
def _advance(m, l, z):  # noqa: E741 (the equation's letter)
    """A row's maximum and sum with a tile more; y = z - m, e^y; what turns e^y of before into that of now, and by how
    much the maximum has moved. A row without keys has y = -inf, l = 0."""
    m_new = tl.maximum(m, tl.max(z, 1))
    base = _base(m_new)
    moved = tl.where(l > 0, base - m, 0.0)
    alpha = tl.exp2(m - base)
    y = z - base[:, None]
    e = tl.exp2(y)
    return m_new, l * alpha + tl.sum(e, 1), y, e, alpha, moved


@triton.jit
def _advance_cross(u, l_a, y_a, e_a, alpha_a, moved_a, y_b, moved_b):
    """Σ e_a (y_a - y_b) with a tile more, l_a of before it. A key that a gives no weight adds nothing."""
    u = tl.where(alpha_a == 0, 0.0, alpha_a * (u + l_a * (moved_b - moved_a)))
    return u + tl.sum(tl.where(e_a == 0, 0.0, e_a * (y_a - y_b)), 1)


@triton.jit
def _kl(u, x, l_a, l_b):
    """KL(a ‖ b) of a row, x = l_b - l_a; 0 where a has no key."""
    share = x / _or_one(l_a)
    ratio = tl.where(tl.abs(share) < 0.5, _log1p(share), tl.log(_or_one(l_b) / _or_one(l_a)))
    return tl.where(l_a == 0, 0.0, u / _or_one(l_a) * LN_2 + tl.where(l_b == 0, 0.0, ratio))


@triton.jit
def _log_of_half(p, d, inv_sum):
    """log(2 p / (p + r)) = log(1 + h), h = (p - r) / (p + r), d = p - r; 0 where p is."""
    h = d * inv_sum
    x = tl.where(tl.abs(h) < 0.25, _log1p(h), tl.log(tl.where(p == 0, 1.0, 2.0 * p * inv_sum)))
    return tl.where(p == 0, 0.0, x)


@triton.jit
def _js(p_s, p_t, d):
    """v = log(p_s / m) / 2 and the terms of the divergence, m = (p_s + p_t) / 2."""
    total = p_s + p_t
    inv_sum = 1.0 / tl.where(total < 1e-37, 1.0, total)  # of smaller ones the inverse overflows; they add nothing
    v = 0.5 * _log_of_half(p_s, d, inv_sum)
    return v, p_s * v + p_t * 0.5 * _log_of_half(p_t, -d, inv_sum)


@triton.jit
def _score_difference(z_s, z_t):
    """A key that both networks lack adds 0."""
    return tl.where((z_s == NEVER) & (z_t == NEVER), 0.0, z_s - z_t)


@triton.jit
def _difference(e_s, e_t, l_s, rho):
    """p_s - p_t, ρ = l_s / l_t - 1: exactly 0 for equal networks, right at a key that is nearly all of both rows."""
    return ((e_s - e_t) - e_t * rho) / l_s


@triton.jit
def _value(e_s, e_t, l_s, rho, DIVERGENCE: tl.constexpr):
    """v of mse and js, whose gradient by z_s is p_s (v - Σ p_s v), and the terms of their losses."""
    d = _difference(e_s, e_t, l_s, rho)
    if DIVERGENCE == "mse":
        v, terms = d, d * d
    else:
        v, terms = _js(e_s / l_s, e_t * (1.0 + rho) / l_s, d)
    return v, terms


@triton.jit
def _dz(z_s, z_t, m_s, l_s, m_t, rho, c, v_top, g, inv_keys, DIVERGENCE: tl.constexpr):
    """g times a row loss' gradient by z_s; 0 where g is. m to g broadcast to the tile, l is not 0.

    p (v - Σ p v) is taken less v at the likeliest key, c = Σ p (v - v_top): where a row is all but that key, what is
    left there is 1 - p of the terms.
    """
    if DIVERGENCE == "score_mse":
        dz = _score_difference(z_s, z_t) * (2.0 * inv_keys)
    else:
        y_s, y_t = z_s - m_s, z_t - m_t
        e_s, e_t = tl.exp2(y_s), tl.exp2(y_t)
        if DIVERGENCE == "kl" or DIVERGENCE == "ce":
            dz = _difference(e_s, e_t, l_s, rho)
        elif DIVERGENCE == "reverse_kl":
            dz = tl.where(e_s == 0, 0.0, e_s / l_s * (((y_s - y_t) - v_top) - c) * LN_2)
        else:
            v, _ = _value(e_s, e_t, l_s, rho, DIVERGENCE)
            dz = e_s / l_s * ((v - v_top) - c)
            if DIVERGENCE == "mse":
                dz = dz * (2.0 * inv_keys)
    return tl.where(g == 0, 0.0, dz * g)


@triton.jit
def _add_gradient(acc, dz, x, PRECISION: tl.constexpr):
    """acc + dz x, dz in the dtype of x: as two terms where that has 16 bits, its rows scaled where it is float16."""
    if x.dtype == tl.float32:
        acc = tl.dot(dz, x, acc, input_precision=PRECISION)
    elif x.dtype == tl.float16:
        top = tl.maximum(tl.max(tl.abs(dz), 1), 1e-30)[:, None]
        dz = dz * (16384.0 / top)
        high = dz.to(tl.float16)
        low = (dz - high.to(tl.float32)).to(tl.float16)
        acc += tl.dot(low, x, tl.dot(high, x)) * (top / 16384.0)
    else:
        high = dz.to(x.dtype)
        acc = tl.dot(high, x, acc)
        acc = tl.dot((dz - high.to(tl.float32)).to(x.dtype), x, acc)
    return acc


@triton.jit
def _row_weights(w_ptr, i, in_i, stride_wn, factor, HAS_WEIGHT: tl.constexpr):
    """What a row's loss is multiplied by; rows past the last have 0."""
    if HAS_WEIGHT:
        return tl.load(w_ptr + i.to(tl.int64) * stride_wn, mask=in_i, other=0.0).to(tl.float32) * factor
    return tl.where(in_i, factor, 0.0)


@triton.jit
def _sees(mask_ptr, j, N_k, stride_mn, HAS_MASK: tl.constexpr):
    """Which keys the mask leaves."""
    if HAS_MASK:
        return tl.load(mask_ptr + j.to(tl.int64) * stride_mn, mask=j < N_k, other=0) != 0
    return j < N_k


@triton.jit
def _keys_seen(i_last, N_k, row_start, row_step, IS_CAUSAL: tl.constexpr):
    """How many keys rows up to i_last see at most."""
    if IS_CAUSAL:
        return tl.minimum(N_k, row_start + i_last * row_step + 1)
    return N_k


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_centre_kernel(
    k_ptr,  # (B, H, N_k, d)
    mask_ptr,  # (B, N_k)
    mean_ptr,  # (B, H, d)
    stride_kb, stride_kh, stride_kn, stride_kd, stride_mb, stride_mn,
    H, N_k, D,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per head and piece of its width: the mean of the keys that the mask leaves."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k_head, mask_row = k_ptr + b * stride_kb + h * stride_kh, mask_ptr + b * stride_mb
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = 0.0
    for j0 in range(0, N_k, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        sees = _sees(mask_row, j, N_k, stride_mn, HAS_MASK)
        total += tl.sum(_load(_head_rows(k_head, j, stride_kn), sees, d, D, stride_kd).to(tl.float32), 0)
        count += tl.sum(tl.where(sees, 1.0, 0.0), 0)
    tl.store(mean_ptr + bh * D + d, total / tl.maximum(count, 1.0), mask=d < D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_rows_kernel(  # noqa: C901 (branches on constants, of which one is compiled)
    q_s_ptr, k_s_ptr,  # (B, H, N_q, d), (B, H, N_k, d)
    q_t_ptr, k_t_ptr,  # (B, H, N_q, d'), (B, H, N_k, d')
    mean_s_ptr, mean_t_ptr,  # (B, H, d), (B, H, d'): of keys; unused unless IS_CENTRED
    bias_s_ptr, bias_t_ptr,  # (B | 1, H | 1, N_q | 1, N_k | 1); unused unless HAS_BIAS
    top_s_ptr, top_t_ptr,  # (B | 1, H | 1, N_q | 1): of their rows
    mask_ptr,  # (B, N_k); unused unless HAS_MASK
    w_ptr,  # (B, H, N_q); unused unless HAS_WEIGHT
    loss_ptr,  # (B, H, N_q)
    stats_ptr,  # (6, B, H, N_q): m_s, l_s (0: no gradient), m_t, l_s / l_t - 1, c, v_top
    dq_ptr,  # (B, H, N_q, d)
    stride_qsb, stride_qsh, stride_qsn, stride_qsd,
    stride_ksb, stride_ksh, stride_ksn, stride_ksd,
    stride_qtb, stride_qth, stride_qtn, stride_qtd,
    stride_ktb, stride_kth, stride_ktn, stride_ktd,
    stride_bsb, stride_bsh, stride_bsq, stride_bsk,
    stride_btb, stride_bth, stride_btq, stride_btk,
    stride_usb, stride_ush, stride_usq,
    stride_utb, stride_uth, stride_utq,
    stride_mb, stride_mn, stride_wb, stride_wh, stride_wn,
    H, N_q, N_k, D_s, D_t, q_tiles, rows_total, row_start, row_step,
    scale_s, scale_t, bias_scale, dq_scale, factor, inv_keys,
    DIVERGENCE: tl.constexpr,
    HAS_BIAS_S: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DQ: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_CENTRED_S: tl.constexpr,
    IS_CENTRED_T: tl.constexpr,
    IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DS: tl.constexpr,
    BLOCK_DT: tl.constexpr,
):  # fmt: skip
    """One program per strip of a head's queries and piece of their gradient's width: losses, statistics, dq."""
    HAS_SOFTMAX: tl.constexpr = DIVERGENCE != "score_mse"
    IS_TWO_SWEEPS: tl.constexpr = DIVERGENCE == "js" or DIVERGENCE == "mse"
    HAS_TOP: tl.constexpr = IS_TWO_SWEEPS or DIVERGENCE == "reverse_kl"
    bh = (tl.program_id(0) // q_tiles).to(tl.int64)
    b, h = bh // H, bh % H
    i0 = tl.program_id(0) % q_tiles * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    w = _row_weights(w_ptr + b * stride_wb + h * stride_wh, i, i < N_q, stride_wn, factor, HAS_WEIGHT)
    in_i = (i < N_q) & (w != 0)  # a row without weight may hold anything
    d_s, d_t = tl.arange(0, BLOCK_DS), tl.arange(0, BLOCK_DT)
    d_out = d_s + tl.program_id(1) * BLOCK_DS
    rows_qs = _head_rows(q_s_ptr + b * stride_qsb + h * stride_qsh, i, stride_qsn)
    rows_qt = _head_rows(q_t_ptr + b * stride_qtb + h * stride_qth, i, stride_qtn)
    q_s = _load(rows_qs, in_i, d_s, D_s, stride_qsd)
    q_t = _load(rows_qt, in_i, d_t, D_t, stride_qtd)
    head_ks, head_kt = k_s_ptr + b * stride_ksb + h * stride_ksh, k_t_ptr + b * stride_ktb + h * stride_kth
    mean_s, mean_t = mean_s_ptr + bh * D_s, mean_t_ptr + bh * D_t
    bias_s, bias_t = bias_s_ptr + b * stride_bsb + h * stride_bsh, bias_t_ptr + b * stride_btb + h * stride_bth
    top_s, top_t = top_s_ptr + b * stride_usb + h * stride_ush, top_t_ptr + b * stride_utb + h * stride_uth
    mask_row = mask_ptr + b * stride_mb
    stop = _keys_seen(tl.minimum(i0 + BLOCK_M, N_q) - 1, N_k, row_start, row_step, IS_CAUSAL)

    m_s = tl.full((BLOCK_M,), NEVER, tl.float32)
    m_t = m_s
    l_s = tl.zeros((BLOCK_M,), tl.float32)
    l_t, u, x, c, rho, v_top = l_s, l_s, l_s, l_s, l_s, l_s
    z_top = m_s  # of the teacher, at the student's likeliest key
    for sweep in tl.static_range(3):
        # Statistics, and the losses of one sweep; those of two; dq.
        if sweep == 2 and HAS_DQ:
            dq = tl.zeros((BLOCK_M, BLOCK_DS), tl.float32)
            g = tl.where((l_s == 0) | (l_t == 0), 0.0, w) if HAS_SOFTMAX else w
        if sweep == 0 or (sweep == 1 and IS_TWO_SWEEPS) or (sweep == 2 and HAS_DQ):
            base_s, base_t, sum_s = _base(m_s)[:, None], _base(m_t)[:, None], _or_one(l_s)[:, None]
            for j0 in range(0, stop, BLOCK_N):
                j = j0 + tl.arange(0, BLOCK_N)
                sees = _sees(mask_row, j, N_k, stride_mn, HAS_MASK)
                i2, j2, in_i2, sees2 = i[:, None], j[None, :], in_i[:, None], sees[None, :]
                visible = _visible(i2, j2, sees2, row_start, row_step, IS_CAUSAL)
                rows_ks, rows_kt = _head_rows(head_ks, j, stride_ksn), _head_rows(head_kt, j, stride_ktn)
                k_s = _load_keys(rows_ks, sees, d_s, D_s, stride_ksd, mean_s, IS_CENTRED_S)
                k_t = _load_keys(rows_kt, sees, d_t, D_t, stride_ktd, mean_t, IS_CENTRED_T)
                z_s = _product(q_s, rows_qs, in_i, stride_qsd, k_s, rows_ks, sees, stride_ksd, mean_s, D_s,
                               False, IS_CENTRED_S, IS_WIDE, BLOCK_DS, PRECISION)  # fmt: skip
                z_t = _product(q_t, rows_qt, in_i, stride_qtd, k_t, rows_kt, sees, stride_ktd, mean_t, D_t,
                               False, IS_CENTRED_T, IS_WIDE, BLOCK_DT, PRECISION)  # fmt: skip
                z_s = _finish_scores(z_s, scale_s, i2, in_i2, j2, sees2, visible, bias_s, stride_bsq, stride_bsk,
                                     top_s, stride_usq, bias_scale, HAS_BIAS_S, HAS_SOFTMAX)  # fmt: skip
                z_t = _finish_scores(z_t, scale_t, i2, in_i2, j2, sees2, visible, bias_t, stride_btq, stride_btk,
                                     top_t, stride_utq, bias_scale, HAS_BIAS_T, HAS_SOFTMAX)  # fmt: skip
                if sweep == 2:
                    dz = _dz(z_s, z_t, base_s, sum_s, base_t, rho[:, None], c[:, None], v_top[:, None], g[:, None],
                             inv_keys, DIVERGENCE)  # fmt: skip
                    if IS_WIDE:
                        k_s = _load_keys(rows_ks, sees, d_out, D_s, stride_ksd, mean_s, IS_CENTRED_S)
                    dq = _add_gradient(dq, dz, k_s, PRECISION)
                elif sweep == 1:
                    e_s, e_t = tl.exp2(z_s - base_s), tl.exp2(z_t - base_t)
                    v, terms = _value(e_s, e_t, sum_s, rho[:, None], DIVERGENCE)
                    u += tl.sum(terms, 1)
                    c += tl.sum(e_s / sum_s * (v - v_top[:, None]), 1)
                elif HAS_SOFTMAX:
                    old_s, old_t, old_top = l_s, l_t, z_top
                    m_s, l_s, y_s, e_s, alpha_s, moved_s = _advance(m_s, l_s, z_s)
                    m_t, l_t, y_t, e_t, alpha_t, moved_t = _advance(m_t, l_t, z_t)
                    x = alpha_t * x + (alpha_s - alpha_t) * old_s + tl.sum(e_s - e_t, 1)
                    if HAS_TOP:
                        here = tl.max(tl.where(y_s == 0, z_t, NEVER), 1)
                        z_top = tl.where(tl.max(y_s, 1) == 0, here, z_top)
                    if DIVERGENCE == "kl":
                        u = _advance_cross(u, old_t, y_t, e_t, alpha_t, moved_t, y_s, moved_s)
                    elif DIVERGENCE == "reverse_kl":
                        u = _advance_cross(u, old_s, y_s, e_s, alpha_s, moved_s, y_t, moved_t)
                        moved = tl.where(old_s > 0, z_top - old_top, 0.0)
                        c = _advance_cross(c, old_s, y_s, e_s, alpha_s, moved_s, z_t - z_top[:, None], moved)
                    elif DIVERGENCE == "ce":
                        u = tl.where(alpha_t == 0, 0.0, alpha_t * (u - old_t * moved_s))
                        u += tl.sum(tl.where(e_t == 0, 0.0, e_t * y_s), 1)
                else:
                    d = _score_difference(z_s, z_t)
                    u += tl.sum(d * d, 1)
            if sweep == 0 and HAS_SOFTMAX:
                x = tl.where(l_s == 0, 1.0 - l_t, x)  # p_s = 0, as l_s = 1 has it
                rho = x / _or_one(l_t)
                if DIVERGENCE == "reverse_kl":
                    c, v_top = c / _or_one(l_s), _base(m_t) - z_top
                elif IS_TWO_SWEEPS:
                    u = tl.zeros((BLOCK_M,), tl.float32)
                    v_top, _ = _value(1.0, tl.exp2(z_top - _base(m_t)), _or_one(l_s), rho, DIVERGENCE)

    if DIVERGENCE == "kl":
        loss = _kl(u, x, l_t, l_s)
    elif DIVERGENCE == "reverse_kl":
        loss = _kl(u, -x, l_s, l_t)
    elif DIVERGENCE == "ce":
        loss = tl.log(_or_one(l_s)) - u / _or_one(l_t) * LN_2
    elif DIVERGENCE == "js":
        loss = u
    else:
        loss = u * inv_keys
    if HAS_SOFTMAX:
        loss = tl.where(l_t == 0, 0.0, loss)
    if tl.program_id(1) == 0:
        row = bh * N_q + i
        tl.store(loss_ptr + row, tl.where(w == 0, 0.0, loss * w), mask=i < N_q)
        if HAS_SOFTMAX:
            tl.store(stats_ptr + row, _base(m_s), mask=i < N_q)
            tl.store(stats_ptr + rows_total + row, tl.where(l_t == 0, 0.0, l_s), mask=i < N_q)
            tl.store(stats_ptr + 2 * rows_total + row, _base(m_t), mask=i < N_q)
            tl.store(stats_ptr + 3 * rows_total + row, rho, mask=i < N_q)
            if HAS_TOP:
                tl.store(stats_ptr + 4 * rows_total + row, c, mask=i < N_q)
                tl.store(stats_ptr + 5 * rows_total + row, v_top, mask=i < N_q)
    if HAS_DQ:
        offs = (bh * N_q + i)[:, None] * D_s + d_out[None, :]
        out = (dq * dq_scale).to(dq_ptr.dtype.element_ty)
        tl.store(dq_ptr + offs, out, mask=(i < N_q)[:, None] & (d_out < D_s)[None, :])


@triton.jit
def _whole_rows(z_s, z_t, w, inv_keys, DIVERGENCE: tl.constexpr):
    """Losses of rows that lie whole in a tile, keys down, rows across, and w times their gradients by z_s."""
    if DIVERGENCE == "score_mse":
        d = _score_difference(z_s, z_t)
        loss, dz, g = tl.sum(d * d, 0) * inv_keys, d * (2.0 * inv_keys), w
    else:
        m_s, m_t = tl.max(z_s, 0), tl.max(z_t, 0)
        y_s, y_t = z_s - _base(m_s)[None, :], z_t - _base(m_t)[None, :]
        e_s, e_t = tl.exp2(y_s), tl.exp2(y_t)
        has_s, has_t = m_s != NEVER, m_t != NEVER
        l_s, l_t = tl.where(has_s, tl.sum(e_s, 0), 1.0), tl.where(has_t, tl.sum(e_t, 0), 1.0)
        rho = tl.where(has_s, tl.sum(e_s - e_t, 0), 1.0 - l_t) / l_t
        log_ratio = tl.where(tl.abs(rho) < 0.5, _log1p(rho), tl.log(l_s / l_t))
        if DIVERGENCE == "kl" or DIVERGENCE == "ce":
            dz = _difference(e_s, e_t, l_s[None, :], rho[None, :])
            if DIVERGENCE == "kl":
                cross = tl.sum(tl.where(e_t == 0, 0.0, e_t * (y_t - y_s)), 0)
                loss = cross / l_t * LN_2 + log_ratio
            else:
                loss = tl.log(l_s) - tl.sum(tl.where(e_t == 0, 0.0, e_t * y_s), 0) / l_t * LN_2
        else:
            y_top = tl.max(tl.where(y_s == 0, y_t, NEVER), 0)
            if DIVERGENCE == "reverse_kl":
                v = tl.where(e_s == 0, 0.0, (y_s - y_t) + y_top[None, :]) * LN_2
                c = tl.sum(e_s * v, 0) / l_s
                loss = tl.where(has_s, c - y_top * LN_2 - log_ratio, 0.0)
            else:
                v, terms = _value(e_s, e_t, l_s[None, :], rho[None, :], DIVERGENCE)
                v_top, _ = _value(1.0, tl.exp2(y_top), l_s, rho, DIVERGENCE)
                v = v - v_top[None, :]
                c = tl.sum(e_s * v, 0) / l_s
                loss = tl.sum(terms, 0)
                if DIVERGENCE == "mse":
                    loss, v, c = loss * inv_keys, v * (2.0 * inv_keys), c * (2.0 * inv_keys)
            dz = tl.where(e_s == 0, 0.0, e_s / l_s[None, :] * (v - c[None, :]))
        loss, g = tl.where(has_t, loss, 0.0), tl.where(has_s & has_t, w, 0.0)
    return tl.where(w == 0, 0.0, loss * w), tl.where((g == 0)[None, :], 0.0, dz * g[None, :])


@triton.jit
def _query_gradient(dz, k, PRECISION: tl.constexpr):
    """kᵀ dz, of keys down and rows across: dq with its rows across. dz goes as _add_gradient has it."""
    if k.dtype == tl.float32:
        out = tl.dot(tl.trans(k), dz, input_precision=PRECISION)
    elif k.dtype == tl.float16:
        top = tl.maximum(tl.max(tl.abs(dz), 0), 1e-30)[None, :]
        dz = dz * (16384.0 / top)
        high = dz.to(tl.float16)
        low = (dz - high.to(tl.float32)).to(tl.float16)
        out = tl.dot(tl.trans(k), low, tl.dot(tl.trans(k), high)) * (top / 16384.0)
    else:
        high = dz.to(k.dtype)
        out = tl.dot(tl.trans(k), (dz - high.to(tl.float32)).to(k.dtype), tl.dot(tl.trans(k), high))
    return out


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_fused_kernel(
    q_s_ptr, k_s_ptr,  # (B, H, N_q, d), (B, H, N_k, d)
    q_t_ptr, k_t_ptr,  # (B, H, N_q, d'), (B, H, N_k, d')
    bias_s_ptr, bias_t_ptr,  # (B | 1, H | 1, N_q | 1, N_k | 1); unused unless HAS_BIAS
    top_s_ptr, top_t_ptr,  # (B | 1, H | 1, N_q | 1): of their rows
    mask_ptr,  # (B, N_k); unused unless HAS_MASK
    w_ptr,  # (B, H, N_q); unused unless HAS_WEIGHT
    loss_ptr,  # (B, H, N_q)
    dq_ptr,  # (B, H, N_q, d)
    dk_ptr,  # (B, H, N_k, d)
    stride_qsb, stride_qsh, stride_qsn, stride_qsd,
    stride_ksb, stride_ksh, stride_ksn, stride_ksd,
    stride_qtb, stride_qth, stride_qtn, stride_qtd,
    stride_ktb, stride_kth, stride_ktn, stride_ktd,
    stride_bsb, stride_bsh, stride_bsq, stride_bsk,
    stride_btb, stride_bth, stride_btq, stride_btk,
    stride_usb, stride_ush, stride_usq,
    stride_utb, stride_uth, stride_utq,
    stride_mb, stride_mn, stride_wb, stride_wh, stride_wn,
    H, N_q, N_k, D_s, D_t, row_start, row_step,
    scale_s, scale_t, bias_scale, dq_scale, dk_scale, factor, inv_keys,
    DIVERGENCE: tl.constexpr,
    HAS_BIAS_S: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DQ: tl.constexpr,
    HAS_DK: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DS: tl.constexpr,
    BLOCK_DT: tl.constexpr,
):  # fmt: skip
    """One program per head: losses and both gradients, all keys against strips of queries. A score is formed once."""
    HAS_SOFTMAX: tl.constexpr = DIVERGENCE != "score_mse"
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    j = tl.arange(0, BLOCK_N)
    sees = _sees(mask_ptr + b * stride_mb, j, N_k, stride_mn, HAS_MASK)
    d_s, d_t = tl.arange(0, BLOCK_DS), tl.arange(0, BLOCK_DT)
    k_s = _load(_head_rows(k_s_ptr + b * stride_ksb + h * stride_ksh, j, stride_ksn), sees, d_s, D_s, stride_ksd)
    k_t = _load(_head_rows(k_t_ptr + b * stride_ktb + h * stride_kth, j, stride_ktn), sees, d_t, D_t, stride_ktd)
    head_qs, head_qt = q_s_ptr + b * stride_qsb + h * stride_qsh, q_t_ptr + b * stride_qtb + h * stride_qth
    bias_s, bias_t = bias_s_ptr + b * stride_bsb + h * stride_bsh, bias_t_ptr + b * stride_btb + h * stride_bth
    top_s, top_t = top_s_ptr + b * stride_usb + h * stride_ush, top_t_ptr + b * stride_utb + h * stride_uth
    dk = tl.zeros((BLOCK_N, BLOCK_DS), tl.float32)
    for i0 in range(0, N_q, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        w = _row_weights(w_ptr + b * stride_wb + h * stride_wh, i, i < N_q, stride_wn, factor, HAS_WEIGHT)
        in_i = (i < N_q) & (w != 0)
        i2, j2, in_i2, sees2 = i[None, :], j[:, None], in_i[None, :], sees[:, None]
        visible = _visible(i2, j2, sees2, row_start, row_step, IS_CAUSAL)
        q_s = _load(_head_rows(head_qs, i, stride_qsn), in_i, d_s, D_s, stride_qsd)
        q_t = _load(_head_rows(head_qt, i, stride_qtn), in_i, d_t, D_t, stride_qtd)
        zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        z_s = _dot(k_s, tl.trans(q_s), zero, PRECISION)
        z_s = _finish_scores(z_s, scale_s, i2, in_i2, j2, sees2, visible, bias_s, stride_bsq, stride_bsk,
                             top_s, stride_usq, bias_scale, HAS_BIAS_S, HAS_SOFTMAX)  # fmt: skip
        z_t = _dot(k_t, tl.trans(q_t), zero, PRECISION)
        z_t = _finish_scores(z_t, scale_t, i2, in_i2, j2, sees2, visible, bias_t, stride_btq, stride_btk,
                             top_t, stride_utq, bias_scale, HAS_BIAS_T, HAS_SOFTMAX)  # fmt: skip
        loss, dz = _whole_rows(z_s, z_t, w, inv_keys, DIVERGENCE)
        tl.store(loss_ptr + bh * N_q + i, loss, mask=i < N_q)
        if HAS_DK:
            dk = _add_gradient(dk, dz, q_s, PRECISION)
        if HAS_DQ:
            dq = _query_gradient(dz, k_s, PRECISION) * dq_scale
            offs = (bh * N_q + i)[None, :] * D_s + d_s[:, None]
            tl.store(dq_ptr + offs, dq.to(dq_ptr.dtype.element_ty), mask=(i < N_q)[None, :] & (d_s < D_s)[:, None])
    if HAS_DK:
        offs = (bh * N_k + j)[:, None] * D_s + d_s[None, :]
        mask = (j < N_k)[:, None] & (d_s < D_s)[None, :]
        tl.store(dk_ptr + offs, (dk * dk_scale).to(dk_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _head_part(z, m, l, mean, dlog, inv_H):  # noqa: E741
    """p of a head and its part of the gradient by the logarithm of the heads' mean p: its share of it, p / (H mean).
    `mean` is log2 of it, negative, where the mean itself would lose digits or underflow."""
    p = tl.exp2(z - m) / l
    by_log = tl.where(mean == NEVER, 0.0, tl.exp2(z - m - tl.log2(l) - tl.where(mean > 0, 0.0, mean)))
    return p, tl.where(mean > 0, p / tl.where(mean > 0, mean, 1.0), by_log) * (dlog * inv_H)


@triton.jit
def _less_top(p, part, is_top, l, part_top):  # noqa: E741
    """part - p part_top / p_top, p_top = 1 / l: 0 at the likeliest key."""
    return tl.where(is_top & (part == part_top), 0.0, part - p * (part_top * l))


@triton.jit
def _head_dz(z, m, l, mean, dlog, c, part_top, inv_H):  # noqa: E741
    """dz of a head: part - p Σ part, both less their likeliest key's, c = Σ (part - p part_top / p_top)."""
    p, part = _head_part(z, m, l, mean, dlog, inv_H)
    return _less_top(p, part, z == m, l, part_top) - p * c


@triton.jit
def _row_stats(stats_ptr, row, in_i, rows_total):
    """m and l, not 0, of some rows; which have keys."""
    m = tl.load(stats_ptr + row, mask=in_i, other=0.0)
    l = tl.load(stats_ptr + rows_total + row, mask=in_i, other=0.0)  # noqa: E741
    return m, _or_one(l), l != 0


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_keys_kernel(
    q_s_ptr, k_s_ptr,  # (B, H, N_q, d), (B, H, N_k, d)
    q_t_ptr, k_t_ptr,  # (B, H, N_q, d'), (B, H, N_k, d')
    mean_s_ptr, mean_t_ptr,  # (B, H, d), (B, H, d'): of keys; unused unless IS_CENTRED
    bias_s_ptr, bias_t_ptr,  # (B | 1, H | 1, N_q | 1, N_k | 1); unused unless HAS_BIAS
    top_s_ptr, top_t_ptr,  # (B | 1, H | 1, N_q | 1): of their rows
    mask_ptr,  # (B, N_k); unused unless HAS_MASK
    w_ptr,  # (B, H, N_q); unused unless HAS_WEIGHT
    stats_ptr,  # (6, B, H, N_q): m_s, l_s (0: no gradient), m_t, l_s / l_t - 1, c, v_top
    y_ptr, dlog_ptr,  # (images, strip_rows, pitch): the mean p or its log2, gradient by its log; unused unless IS_MEAN
    sum_ptr,  # (B, H, N_k, d), float32: added where IS_ADDED
    dk_ptr,  # (B, H, N_k, d)
    stride_qsb, stride_qsh, stride_qsn, stride_qsd,
    stride_ksb, stride_ksh, stride_ksn, stride_ksd,
    stride_qtb, stride_qth, stride_qtn, stride_qtd,
    stride_ktb, stride_kth, stride_ktn, stride_ktd,
    stride_bsb, stride_bsh, stride_bsq, stride_bsk,
    stride_btb, stride_bth, stride_btq, stride_btk,
    stride_usb, stride_ush, stride_usq,
    stride_utb, stride_uth, stride_utq,
    stride_mb, stride_mn, stride_wb, stride_wh, stride_wn,
    H, N_q, N_k, D_s, D_t, k_tiles, rows_total, row_start, row_step, first_b, first_row, strip_rows, pitch,
    scale_s, scale_t, bias_scale, dk_scale, factor, inv_keys, inv_H,
    DIVERGENCE: tl.constexpr,
    IS_MEAN: tl.constexpr,
    HAS_BIAS_S: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    IS_ADDED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_CENTRED_S: tl.constexpr,
    IS_CENTRED_T: tl.constexpr,
    IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DS: tl.constexpr,
    BLOCK_DT: tl.constexpr,
):  # fmt: skip
    """One program per strip of a head's keys and piece of their gradient's width: dk from a strip of queries."""
    HAS_SOFTMAX: tl.constexpr = DIVERGENCE != "score_mse"
    local = (tl.program_id(0) // k_tiles // H).to(tl.int64)
    b, h = first_b + local, (tl.program_id(0) // k_tiles % H).to(tl.int64)
    bh = b * H + h
    j0 = tl.program_id(0) % k_tiles * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    sees = _sees(mask_ptr + b * stride_mb, j, N_k, stride_mn, HAS_MASK)
    d_s, d_t = tl.arange(0, BLOCK_DS), tl.arange(0, BLOCK_DT)
    d_out = d_s + tl.program_id(1) * BLOCK_DS
    mean_s, mean_t = mean_s_ptr + bh * D_s, mean_t_ptr + bh * D_t
    rows_ks = _head_rows(k_s_ptr + b * stride_ksb + h * stride_ksh, j, stride_ksn)
    rows_kt = _head_rows(k_t_ptr + b * stride_ktb + h * stride_kth, j, stride_ktn)
    k_s = _load_keys(rows_ks, sees, d_s, D_s, stride_ksd, mean_s, IS_CENTRED_S)
    k_t = _load_keys(rows_kt, sees, d_t, D_t, stride_ktd, mean_t, IS_CENTRED_T)
    head_qs, head_qt = q_s_ptr + b * stride_qsb + h * stride_qsh, q_t_ptr + b * stride_qtb + h * stride_qth
    bias_s, bias_t = bias_s_ptr + b * stride_bsb + h * stride_bsh, bias_t_ptr + b * stride_btb + h * stride_bth
    top_s, top_t = top_s_ptr + b * stride_usb + h * stride_ush, top_t_ptr + b * stride_utb + h * stride_uth
    begin, end = first_row, first_row + strip_rows
    if IS_CAUSAL:  # the first row at or beyond position j0
        begin = tl.maximum(begin, tl.cdiv(tl.maximum(j0 - row_start, 0), row_step))

    dk = tl.zeros((BLOCK_N, BLOCK_DS), tl.float32)
    for i0 in range(begin, end, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        w = _row_weights(w_ptr + b * stride_wb + h * stride_wh, i, i < end, stride_wn, factor, HAS_WEIGHT)
        in_i = (i < end) & (w != 0)
        i2, j2, in_i2, sees2 = i[None, :], j[:, None], in_i[None, :], sees[:, None]
        visible = _visible(i2, j2, sees2, row_start, row_step, IS_CAUSAL)
        rows_qs = _head_rows(head_qs, i, stride_qsn)
        q_s = _load(rows_qs, in_i, d_s, D_s, stride_qsd)
        z_s = _product(q_s, rows_qs, in_i, stride_qsd, k_s, rows_ks, sees, stride_ksd, mean_s, D_s,
                       True, IS_CENTRED_S, IS_WIDE, BLOCK_DS, PRECISION)  # fmt: skip
        z_s = _finish_scores(z_s, scale_s, i2, in_i2, j2, sees2, visible, bias_s, stride_bsq, stride_bsk,
                             top_s, stride_usq, bias_scale, HAS_BIAS_S, HAS_SOFTMAX)  # fmt: skip
        row = bh * N_q + i
        if IS_MEAN:
            m_s, l_s, _ = _row_stats(stats_ptr, row, in_i, rows_total)
            c = tl.load(stats_ptr + 2 * rows_total + row, mask=in_i, other=0.0)
            part_top = tl.load(stats_ptr + 3 * rows_total + row, mask=in_i, other=0.0)
            at = (local * strip_rows + (i - first_row))[None, :] * pitch + j[:, None]
            y = tl.load(y_ptr + at, mask=in_i2 & (j2 < N_k), other=NEVER)
            dlog = tl.load(dlog_ptr + at, mask=in_i2 & (j2 < N_k), other=0.0)
            dz = _head_dz(z_s, m_s[None, :], l_s[None, :], y, dlog, c[None, :], part_top[None, :], inv_H)
        else:
            rows_qt = _head_rows(head_qt, i, stride_qtn)
            q_t = _load(rows_qt, in_i, d_t, D_t, stride_qtd)
            z_t = _product(q_t, rows_qt, in_i, stride_qtd, k_t, rows_kt, sees, stride_ktd, mean_t, D_t,
                           True, IS_CENTRED_T, IS_WIDE, BLOCK_DT, PRECISION)  # fmt: skip
            z_t = _finish_scores(z_t, scale_t, i2, in_i2, j2, sees2, visible, bias_t, stride_btq, stride_btk,
                                 top_t, stride_utq, bias_scale, HAS_BIAS_T, HAS_SOFTMAX)  # fmt: skip
            if HAS_SOFTMAX:
                m_s, l_s, has_gradient = _row_stats(stats_ptr, row, in_i, rows_total)
                m_t = tl.load(stats_ptr + 2 * rows_total + row, mask=in_i, other=0.0)
                rho = tl.load(stats_ptr + 3 * rows_total + row, mask=in_i, other=0.0)
                c, v_top = m_t, m_t  # unused, or
                if DIVERGENCE != "kl" and DIVERGENCE != "ce":
                    c = tl.load(stats_ptr + 4 * rows_total + row, mask=in_i, other=0.0)
                    v_top = tl.load(stats_ptr + 5 * rows_total + row, mask=in_i, other=0.0)
                w = tl.where(has_gradient, w, 0.0)
                dz = _dz(z_s, z_t, m_s[None, :], l_s[None, :], m_t[None, :], rho[None, :], c[None, :], v_top[None, :],
                         w[None, :], inv_keys, DIVERGENCE)  # fmt: skip
            else:
                dz = _dz(z_s, z_t, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, w[None, :], inv_keys, DIVERGENCE)
        if IS_WIDE:
            q_s = _load(rows_qs, in_i, d_out, D_s, stride_qsd)
        dk = _add_gradient(dk, dz, q_s, PRECISION)

    offs = (bh * N_k + j)[:, None] * D_s + d_out[None, :]
    mask = (j < N_k)[:, None] & (d_out < D_s)[None, :]
    dk = dk * dk_scale
    if IS_ADDED:
        dk += tl.load(sum_ptr + offs, mask=mask, other=0.0)
    tl.store(dk_ptr + offs, dk.to(dk_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bias_kernel(  # noqa: C901 (branches on constants, of which one is compiled)
    q_s_ptr, k_s_ptr,  # (B, H, N_q, d), (B, H, N_k, d)
    q_t_ptr, k_t_ptr,  # (B, H, N_q, d'), (B, H, N_k, d')
    mean_s_ptr, mean_t_ptr,  # (B, H, d), (B, H, d'): of keys; unused unless IS_CENTRED
    bias_s_ptr, bias_t_ptr,  # (B | 1, H | 1, N_q | 1, N_k | 1); the teacher's unused unless HAS_BIAS
    top_s_ptr, top_t_ptr,  # (B | 1, H | 1, N_q | 1): of their rows
    mask_ptr,  # (B, N_k); unused unless HAS_MASK
    w_ptr,  # (B, H, N_q); unused unless HAS_WEIGHT
    stats_ptr,  # (6, B, H, N_q): m_s, l_s (0: no gradient), m_t, l_s / l_t - 1, c, v_top
    y_ptr, dlog_ptr,  # (images, strip_rows, pitch): the mean p or its log2, gradient by its log; unused unless IS_MEAN
    partial_ptr,  # (splits, B | 1, H | 1, N_q | 1, N_k | 1): added to
    stride_qsb, stride_qsh, stride_qsn, stride_qsd,
    stride_ksb, stride_ksh, stride_ksn, stride_ksd,
    stride_qtb, stride_qth, stride_qtn, stride_qtd,
    stride_ktb, stride_kth, stride_ktn, stride_ktd,
    stride_bsb, stride_bsh, stride_bsq, stride_bsk,
    stride_btb, stride_bth, stride_btq, stride_btk,
    stride_usb, stride_ush, stride_usq,
    stride_utb, stride_uth, stride_utq,
    stride_mb, stride_mn, stride_wb, stride_wh, stride_wn,
    H, N_q, N_k, D_s, D_t, rows_total, row_start, row_step, first_b, first_row, strip_rows, pitch,
    B_bias, H_bias, q_tiles, k_tiles, steps, per_split, bias_numel,
    scale_s, scale_t, bias_scale, dbias_scale, factor, inv_keys, inv_H,
    DIVERGENCE: tl.constexpr,
    IS_MEAN: tl.constexpr,
    HAS_BIAS_S: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_CENTRED_S: tl.constexpr,
    IS_CENTRED_T: tl.constexpr,
    IS_WIDE: tl.constexpr,
    SUM_B: tl.constexpr,
    SUM_H: tl.constexpr,
    SUM_Q: tl.constexpr,
    SUM_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DS: tl.constexpr,
    BLOCK_DT: tl.constexpr,
):  # fmt: skip
    """One program per tile of the bias and split of what it is summed over: images, heads, tiles of rows and keys."""
    HAS_SOFTMAX: tl.constexpr = DIVERGENCE != "score_mse"
    split = tl.program_id(1).to(tl.int64)
    d_s, d_t = tl.arange(0, BLOCK_DS), tl.arange(0, BLOCK_DT)
    tile = tl.program_id(0)
    own_k, own_q, own_h, own_b = 0, 0, 0, 0
    if not SUM_K:
        own_k = tile % k_tiles
        tile = tile // k_tiles
    if not SUM_Q:
        own_q = tile % q_tiles
        tile = tile // q_tiles
    if not SUM_H:
        own_h = tile % H
        tile = tile // H
    if not SUM_B:
        own_b = tile
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * per_split, tl.minimum((split + 1) * per_split, steps)):
        tile_k, tile_q, at_h, local = own_k, own_q, own_h, own_b
        if SUM_K:
            tile_k = step % k_tiles
            step = step // k_tiles
        if SUM_Q:
            tile_q = step % q_tiles
            step = step // q_tiles
        if SUM_H:
            at_h = step % H
            step = step // H
        if SUM_B:
            local = step
        local, h = tl.cast(local, tl.int64), tl.cast(at_h, tl.int64)
        b = first_b + local
        bh = b * H + h
        i = first_row + tile_q * BLOCK_M + tl.arange(0, BLOCK_M)
        j = tile_k * BLOCK_N + tl.arange(0, BLOCK_N)
        end = first_row + strip_rows
        w = _row_weights(w_ptr + b * stride_wb + h * stride_wh, i, i < end, stride_wn, factor, HAS_WEIGHT)
        in_i = (i < end) & (w != 0)
        sees = _sees(mask_ptr + b * stride_mb, j, N_k, stride_mn, HAS_MASK)
        i2, j2, in_i2, sees2 = i[:, None], j[None, :], in_i[:, None], sees[None, :]
        visible = _visible(i2, j2, sees2, row_start, row_step, IS_CAUSAL)
        mean_s, mean_t = mean_s_ptr + bh * D_s, mean_t_ptr + bh * D_t
        rows_qs = _head_rows(q_s_ptr + b * stride_qsb + h * stride_qsh, i, stride_qsn)
        rows_ks = _head_rows(k_s_ptr + b * stride_ksb + h * stride_ksh, j, stride_ksn)
        q_s = _load(rows_qs, in_i, d_s, D_s, stride_qsd)
        k_s = _load_keys(rows_ks, sees, d_s, D_s, stride_ksd, mean_s, IS_CENTRED_S)
        z_s = _product(q_s, rows_qs, in_i, stride_qsd, k_s, rows_ks, sees, stride_ksd, mean_s, D_s,
                       False, IS_CENTRED_S, IS_WIDE, BLOCK_DS, PRECISION)  # fmt: skip
        z_s = _finish_scores(
            z_s, scale_s, i2, in_i2, j2, sees2, visible, bias_s_ptr + b * stride_bsb + h * stride_bsh, stride_bsq,
            stride_bsk, top_s_ptr + b * stride_usb + h * stride_ush, stride_usq, bias_scale, HAS_BIAS_S, HAS_SOFTMAX,
        )  # fmt: skip
        row = bh * N_q + i
        if IS_MEAN:
            m_s, l_s, _ = _row_stats(stats_ptr, row, in_i, rows_total)
            c = tl.load(stats_ptr + 2 * rows_total + row, mask=in_i, other=0.0)
            part_top = tl.load(stats_ptr + 3 * rows_total + row, mask=in_i, other=0.0)
            at = (local * strip_rows + (i - first_row))[:, None] * pitch + j[None, :]
            y = tl.load(y_ptr + at, mask=in_i2 & (j2 < N_k), other=NEVER)
            dlog = tl.load(dlog_ptr + at, mask=in_i2 & (j2 < N_k), other=0.0)
            total += _head_dz(z_s, m_s[:, None], l_s[:, None], y, dlog, c[:, None], part_top[:, None], inv_H)
        else:
            rows_qt = _head_rows(q_t_ptr + b * stride_qtb + h * stride_qth, i, stride_qtn)
            rows_kt = _head_rows(k_t_ptr + b * stride_ktb + h * stride_kth, j, stride_ktn)
            q_t = _load(rows_qt, in_i, d_t, D_t, stride_qtd)
            k_t = _load_keys(rows_kt, sees, d_t, D_t, stride_ktd, mean_t, IS_CENTRED_T)
            z_t = _product(q_t, rows_qt, in_i, stride_qtd, k_t, rows_kt, sees, stride_ktd, mean_t, D_t,
                           False, IS_CENTRED_T, IS_WIDE, BLOCK_DT, PRECISION)  # fmt: skip
            z_t = _finish_scores(
                z_t, scale_t, i2, in_i2, j2, sees2, visible, bias_t_ptr + b * stride_btb + h * stride_bth, stride_btq,
                stride_btk, top_t_ptr + b * stride_utb + h * stride_uth, stride_utq, bias_scale, HAS_BIAS_T,
                HAS_SOFTMAX,
            )  # fmt: skip
            if HAS_SOFTMAX:
                m_s, l_s, has_gradient = _row_stats(stats_ptr, row, in_i, rows_total)
                m_t = tl.load(stats_ptr + 2 * rows_total + row, mask=in_i, other=0.0)
                rho = tl.load(stats_ptr + 3 * rows_total + row, mask=in_i, other=0.0)
                c, v_top = m_t, m_t  # unused, or
                if DIVERGENCE != "kl" and DIVERGENCE != "ce":
                    c = tl.load(stats_ptr + 4 * rows_total + row, mask=in_i, other=0.0)
                    v_top = tl.load(stats_ptr + 5 * rows_total + row, mask=in_i, other=0.0)
                w = tl.where(has_gradient, w, 0.0)
                total += _dz(z_s, z_t, m_s[:, None], l_s[:, None], m_t[:, None], rho[:, None], c[:, None],
                             v_top[:, None], w[:, None], inv_keys, DIVERGENCE)  # fmt: skip
            else:
                total += _dz(z_s, z_t, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, w[:, None], inv_keys, DIVERGENCE)

    i = first_row + own_q * BLOCK_M + tl.arange(0, BLOCK_M)
    j = own_k * BLOCK_N + tl.arange(0, BLOCK_N)
    in_i, in_j = i < first_row + strip_rows, j < N_k
    # Row-major over (B, H, N_q, N_k), of which each is whole or 1.
    head = partial_ptr + split * bias_numel
    if not SUM_B:
        head += (first_b + tl.cast(own_b, tl.int64)) * (bias_numel // B_bias)
    if not SUM_H:
        head += tl.cast(own_h, tl.int64) * (bias_numel // B_bias // H_bias)
    total = total * dbias_scale
    if SUM_Q and SUM_K:
        tl.store(head, tl.load(head) + tl.sum(total))
    elif SUM_Q:
        tl.store(head + j, tl.load(head + j, mask=in_j, other=0.0) + tl.sum(total, 0), mask=in_j)
    elif SUM_K:
        tl.store(head + i, tl.load(head + i, mask=in_i, other=0.0) + tl.sum(total, 1), mask=in_i)
    else:
        at = head + i.to(tl.int64)[:, None] * N_k + j[None, :]
        mask = in_i[:, None] & in_j[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_stats_kernel(
    q_ptr, k_ptr,  # (B, H, N_q, d), (B, H, N_k, d)
    mean_ptr,  # (B, H, d): of keys; unused unless IS_CENTRED
    bias_ptr,  # (B | 1, H | 1, N_q | 1, N_k | 1); unused unless HAS_BIAS
    top_ptr,  # (B | 1, H | 1, N_q | 1): of its rows
    mask_ptr,  # (B, N_k); unused unless HAS_MASK
    w_ptr,  # (B, 1, N_q); unused unless HAS_WEIGHT
    stats_ptr,  # (2, B, H, N_q): m, l
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_bb, stride_bh, stride_bq, stride_bk,
    stride_ub, stride_uh, stride_uq,
    stride_mb, stride_mn, stride_wb, stride_wn,
    H, N_q, N_k, D, q_tiles, rows_total, row_start, row_step,
    scale, bias_scale, factor,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per strip of a head's queries: maximum and sum of its rows, of one network."""
    bh = (tl.program_id(0) // q_tiles).to(tl.int64)
    b, h = bh // H, bh % H
    i0 = tl.program_id(0) % q_tiles * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    w = _row_weights(w_ptr + b * stride_wb, i, i < N_q, stride_wn, factor, HAS_WEIGHT)
    in_i = (i < N_q) & (w != 0)
    d = tl.arange(0, BLOCK_D)
    rows_q = _head_rows(q_ptr + b * stride_qb + h * stride_qh, i, stride_qn)
    q = _load(rows_q, in_i, d, D, stride_qd)
    head_k, mean, mask_row = k_ptr + b * stride_kb + h * stride_kh, mean_ptr + bh * D, mask_ptr + b * stride_mb
    bias_head, top_head = bias_ptr + b * stride_bb + h * stride_bh, top_ptr + b * stride_ub + h * stride_uh
    m = tl.full((BLOCK_M,), NEVER, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
    for j0 in range(0, _keys_seen(tl.minimum(i0 + BLOCK_M, N_q) - 1, N_k, row_start, row_step, IS_CAUSAL), BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        sees = _sees(mask_row, j, N_k, stride_mn, HAS_MASK)
        i2, j2, in_i2, sees2 = i[:, None], j[None, :], in_i[:, None], sees[None, :]
        rows_k = _head_rows(head_k, j, stride_kn)
        k = _load_keys(rows_k, sees, d, D, stride_kd, mean, IS_CENTRED)
        z = _product(q, rows_q, in_i, stride_qd, k, rows_k, sees, stride_kd, mean, D,
                     False, IS_CENTRED, IS_WIDE, BLOCK_D, PRECISION)  # fmt: skip
        visible = _visible(i2, j2, sees2, row_start, row_step, IS_CAUSAL)
        z = _finish_scores(z, scale, i2, in_i2, j2, sees2, visible, bias_head, stride_bq, stride_bk, top_head,
                           stride_uq, bias_scale, HAS_BIAS, True)  # fmt: skip
        m, l, _, _, _, _ = _advance(m, l, z)  # noqa: E741
    row = stats_ptr + bh * N_q + i
    tl.store(row, _base(m), mask=i < N_q)
    tl.store(row + rows_total, l, mask=i < N_q)


@triton.jit
def _add_head(top, total, log_p):
    """Maximum over heads of log p and Σ e^{log p - maximum} with a head more."""
    new = tl.maximum(top, log_p)
    base = _base(new)
    return new, total * tl.exp2(top - base) + tl.exp2(log_p - base)


@triton.jit
def _mean_of_heads(
    q_ptr, k_ptr, mean_ptr, bias_ptr, top_ptr, stats_ptr,
    stride_qh, stride_qn, stride_qd, stride_kh, stride_kn, stride_kd,
    stride_bh, stride_bq, stride_bk, stride_uh, stride_uq,
    i, in_i, j, sees, visible, b, H, N_q, rows_total, D, scale, bias_scale,
    HAS_BIAS: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean over heads of a tile's p, and its log2, from pointers of an image."""
    d = tl.arange(0, BLOCK_D)
    i2, j2, in_i2, sees2 = i[:, None], j[None, :], in_i[:, None], sees[None, :]
    top = tl.full((i.shape[0], j.shape[0]), NEVER, tl.float32)
    total = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    p = total
    for head in range(H):
        h = tl.cast(head, tl.int64)
        rows_q = _head_rows(q_ptr + h * stride_qh, i, stride_qn)
        rows_k = _head_rows(k_ptr + h * stride_kh, j, stride_kn)
        mean = mean_ptr + (b * H + h) * D
        q = _load(rows_q, in_i, d, D, stride_qd)
        k = _load_keys(rows_k, sees, d, D, stride_kd, mean, IS_CENTRED)
        z = _product(q, rows_q, in_i, stride_qd, k, rows_k, sees, stride_kd, mean, D,
                     False, IS_CENTRED, IS_WIDE, BLOCK_D, PRECISION)  # fmt: skip
        z = _finish_scores(z, scale, i2, in_i2, j2, sees2, visible, bias_ptr + h * stride_bh, stride_bq, stride_bk,
                           top_ptr + h * stride_uh, stride_uq, bias_scale, HAS_BIAS, True)  # fmt: skip
        m, l, _ = _row_stats(stats_ptr, (b * H + h) * N_q + i, in_i, rows_total)  # noqa: E741
        top, total = _add_head(top, total, z - (m + tl.log2(l))[:, None])
        p += tl.exp2(z - m[:, None]) / l[:, None]
    return p / H, tl.where(top == NEVER, NEVER, top + tl.log2(_or_one(total) / H))


@triton.jit
def _share_with_keys(stats_ptr, b, i, in_i, H, N_q, rows_total):
    """Of an image's heads, those whose rows i see any key: Σ p of the mean."""
    count = tl.zeros(i.shape, tl.float32)
    for head in range(H):
        _, _, has = _row_stats(stats_ptr, (b * H + head) * N_q + i, in_i, rows_total)
        count += tl.where(has, 1.0, 0.0)
    return count / H


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_mean_kernel(
    q_s_ptr, k_s_ptr,  # (B, H_s, N_q, d), (B, H_s, N_k, d)
    q_t_ptr, k_t_ptr,  # (B, H_t, N_q, d'), (B, H_t, N_k, d')
    mean_s_ptr, mean_t_ptr,  # (B, H_s, d), (B, H_t, d'): of keys; unused unless IS_CENTRED
    bias_s_ptr, bias_t_ptr,  # (B | 1, H | 1, N_q | 1, N_k | 1); unused unless HAS_BIAS
    top_s_ptr, top_t_ptr,  # (B | 1, H | 1, N_q | 1): of their rows
    mask_ptr,  # (B, N_k); unused unless HAS_MASK
    w_ptr,  # (B, 1, N_q); unused unless HAS_WEIGHT
    stats_ptr, stats_t_ptr,  # (4, B, H_s, N_q), (2, B, H_t, N_q): m, l
    loss_ptr,  # (B, 1, N_q)
    y_ptr, dlog_ptr,  # (images, strip_rows, pitch): student: mean p or its log2; gradient by its log
    stride_qsb, stride_qsh, stride_qsn, stride_qsd,
    stride_ksb, stride_ksh, stride_ksn, stride_ksd,
    stride_qtb, stride_qth, stride_qtn, stride_qtd,
    stride_ktb, stride_kth, stride_ktn, stride_ktd,
    stride_bsb, stride_bsh, stride_bsq, stride_bsk,
    stride_btb, stride_bth, stride_btq, stride_btk,
    stride_usb, stride_ush, stride_usq,
    stride_utb, stride_uth, stride_utq,
    stride_mb, stride_mn, stride_wb, stride_wn,
    H_s, H_t, N_q, N_k, D_s, D_t, q_tiles, rows_s, rows_t, row_start, row_step, first_b, first_row, strip_rows, pitch,
    scale_s, scale_t, bias_scale, factor, inv_keys,
    DIVERGENCE: tl.constexpr,
    HAS_BIAS_S: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_CENTRED_S: tl.constexpr,
    IS_CENTRED_T: tl.constexpr,
    IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DS: tl.constexpr,
    BLOCK_DT: tl.constexpr,
):  # fmt: skip
    """One program per strip of an image's queries: losses of the averaged maps and what every head's gradient needs."""
    local = (tl.program_id(0) // q_tiles).to(tl.int64)
    b = first_b + local
    end = first_row + strip_rows
    i0 = first_row + tl.program_id(0) % q_tiles * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    w = _row_weights(w_ptr + b * stride_wb, i, i < end, stride_wn, factor, HAS_WEIGHT)
    in_i = (i < end) & (w != 0)
    share_s = _share_with_keys(stats_ptr, b, i, in_i, H_s, N_q, rows_s)
    share_t = _share_with_keys(stats_t_ptr, b, i, in_i, H_t, N_q, rows_t)
    g = tl.where((share_s == 0) | (share_t == 0), 0.0, w)[:, None]
    loss = tl.zeros((BLOCK_M,), tl.float32)
    for j0 in range(0, N_k, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        sees = _sees(mask_ptr + b * stride_mb, j, N_k, stride_mn, HAS_MASK)
        visible = _visible(i[:, None], j[None, :], sees[None, :], row_start, row_step, IS_CAUSAL)
        p_s, y_s = _mean_of_heads(
            q_s_ptr + b * stride_qsb, k_s_ptr + b * stride_ksb, mean_s_ptr, bias_s_ptr + b * stride_bsb,
            top_s_ptr + b * stride_usb, stats_ptr, stride_qsh, stride_qsn, stride_qsd, stride_ksh, stride_ksn,
            stride_ksd, stride_bsh, stride_bsq, stride_bsk, stride_ush, stride_usq, i, in_i, j, sees, visible, b, H_s,
            N_q, rows_s, D_s, scale_s, bias_scale, HAS_BIAS_S, IS_CENTRED_S, IS_WIDE, PRECISION, BLOCK_DS,
        )  # fmt: skip
        p_t, y_t = _mean_of_heads(
            q_t_ptr + b * stride_qtb, k_t_ptr + b * stride_ktb, mean_t_ptr, bias_t_ptr + b * stride_btb,
            top_t_ptr + b * stride_utb, stats_t_ptr, stride_qth, stride_qtn, stride_qtd, stride_kth, stride_ktn,
            stride_ktd, stride_bth, stride_btq, stride_btk, stride_uth, stride_utq, i, in_i, j, sees, visible, b, H_t,
            N_q, rows_t, D_t, scale_t, bias_scale, HAS_BIAS_T, IS_CENTRED_T, IS_WIDE, PRECISION, BLOCK_DT,
        )  # fmt: skip
        d = p_s - p_t
        if DIVERGENCE == "kl":
            dlog = d
            terms = tl.where(p_t == 0, 0.0, p_t * (y_t - y_s) * LN_2) + d
        elif DIVERGENCE == "reverse_kl":
            dlog = tl.where(p_s == 0, 0.0, p_s * (y_s - y_t) * LN_2)
            terms = dlog - d
        elif DIVERGENCE == "ce":
            dlog = d
            terms = tl.where(p_t == 0, 0.0, -p_t * y_s * LN_2)
        elif DIVERGENCE == "mse":
            dlog = d * p_s * (2.0 * inv_keys)
            terms = d * d * inv_keys
        else:
            v, terms = _js(p_s, p_t, d)
            dlog = p_s * v
        loss += tl.sum(terms, 1)
        if HAS_GRAD:
            at = (local * strip_rows + (i - first_row))[:, None] * pitch + j[None, :]
            mask = (i < end)[:, None] & (j < N_k)[None, :]
            tl.store(y_ptr + at, tl.where(p_s > 1e-30, p_s, y_s), mask=mask)
            tl.store(dlog_ptr + at, tl.where(g == 0, 0.0, dlog * g), mask=mask)
    if DIVERGENCE == "kl":
        loss -= share_s - share_t
    elif DIVERGENCE == "reverse_kl":
        loss += share_s - share_t
    loss = tl.where((w == 0) | (share_t == 0), 0.0, loss * w)
    tl.store(loss_ptr + b * N_q + i, loss, mask=i < end)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_head_kernel(
    q_s_ptr, k_s_ptr,  # (B, H, N_q, d), (B, H, N_k, d)
    mean_s_ptr,  # (B, H, d): of keys; unused unless IS_CENTRED
    bias_s_ptr,  # (B | 1, H | 1, N_q | 1, N_k | 1); unused unless HAS_BIAS
    top_s_ptr,  # (B | 1, H | 1, N_q | 1): of its rows
    mask_ptr,  # (B, N_k); unused unless HAS_MASK
    w_ptr,  # (B, 1, N_q); unused unless HAS_WEIGHT
    stats_ptr,  # (4, B, H, N_q): m, l, c, part_top
    y_ptr, dlog_ptr,  # (images, strip_rows, pitch)
    dq_ptr,  # (B, H, N_q, d)
    stride_qsb, stride_qsh, stride_qsn, stride_qsd,
    stride_ksb, stride_ksh, stride_ksn, stride_ksd,
    stride_bsb, stride_bsh, stride_bsq, stride_bsk,
    stride_usb, stride_ush, stride_usq,
    stride_mb, stride_mn, stride_wb, stride_wn,
    H, N_q, N_k, D_s, q_tiles, rows_total, row_start, row_step, first_b, first_row, strip_rows, pitch,
    scale_s, bias_scale, dq_scale, factor, inv_H,
    HAS_BIAS_S: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DQ: tl.constexpr,
    IS_ADDED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_CENTRED_S: tl.constexpr,
    IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DS: tl.constexpr,
):  # fmt: skip
    """One program per strip of a head's queries and piece of their gradient's width: c and dq under a mean of heads."""
    local = (tl.program_id(0) // q_tiles // H).to(tl.int64)
    b, h = first_b + local, (tl.program_id(0) // q_tiles % H).to(tl.int64)
    bh = b * H + h
    end = first_row + strip_rows
    i0 = first_row + tl.program_id(0) % q_tiles * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    w = _row_weights(w_ptr + b * stride_wb, i, i < end, stride_wn, factor, HAS_WEIGHT)
    in_i = (i < end) & (w != 0)
    d = tl.arange(0, BLOCK_DS)
    d_out = d + tl.program_id(1) * BLOCK_DS
    rows_q = _head_rows(q_s_ptr + b * stride_qsb + h * stride_qsh, i, stride_qsn)
    q = _load(rows_q, in_i, d, D_s, stride_qsd)
    head_k, mean = k_s_ptr + b * stride_ksb + h * stride_ksh, mean_s_ptr + bh * D_s
    bias_head, top_head = bias_s_ptr + b * stride_bsb + h * stride_bsh, top_s_ptr + b * stride_usb + h * stride_ush
    m, l, _ = _row_stats(stats_ptr, bh * N_q + i, in_i, rows_total)  # noqa: E741
    c = tl.zeros((BLOCK_M,), tl.float32)
    part_top, has_top, seen = c, c, c
    dq = tl.zeros((BLOCK_M, BLOCK_DS), tl.float32)
    stop = _keys_seen(tl.minimum(i0 + BLOCK_M, end) - 1, N_k, row_start, row_step, IS_CAUSAL)
    for sweep in tl.static_range(2):
        if sweep == 0 or HAS_DQ:
            for j0 in range(0, stop, BLOCK_N):
                j = j0 + tl.arange(0, BLOCK_N)
                sees = _sees(mask_ptr + b * stride_mb, j, N_k, stride_mn, HAS_MASK)
                i2, j2, in_i2, sees2 = i[:, None], j[None, :], in_i[:, None], sees[None, :]
                rows_k = _head_rows(head_k, j, stride_ksn)
                k = _load_keys(rows_k, sees, d, D_s, stride_ksd, mean, IS_CENTRED_S)
                z = _product(q, rows_q, in_i, stride_qsd, k, rows_k, sees, stride_ksd, mean, D_s,
                             False, IS_CENTRED_S, IS_WIDE, BLOCK_DS, PRECISION)  # fmt: skip
                visible = _visible(i2, j2, sees2, row_start, row_step, IS_CAUSAL)
                z = _finish_scores(z, scale_s, i2, in_i2, j2, sees2, visible, bias_head, stride_bsq, stride_bsk,
                                   top_head, stride_usq, bias_scale, HAS_BIAS_S, True)  # fmt: skip
                at = (local * strip_rows + (i - first_row))[:, None] * pitch + j[None, :]
                y = tl.load(y_ptr + at, mask=in_i2 & (j2 < N_k), other=NEVER)
                dlog = tl.load(dlog_ptr + at, mask=in_i2 & (j2 < N_k), other=0.0)
                if sweep == 0:
                    p, part = _head_part(z, m[:, None], l[:, None], y, dlog, inv_H)
                    is_top = z == m[:, None]
                    best = tl.max(tl.where(is_top, part, NEVER), 1)
                    new = tl.where((best != NEVER) & (has_top == 0), best, part_top)
                    c -= (new - part_top) * l * seen  # what came before was taken less another multiple of p
                    part_top, has_top = new, tl.where(best != NEVER, 1.0, has_top)
                    c += tl.sum(_less_top(p, part, is_top, l[:, None], part_top[:, None]), 1)
                    seen += tl.sum(p, 1)
                else:
                    if IS_WIDE:
                        k = _load_keys(rows_k, sees, d_out, D_s, stride_ksd, mean, IS_CENTRED_S)
                    dz = _head_dz(z, m[:, None], l[:, None], y, dlog, c[:, None], part_top[:, None], inv_H)
                    dq = _add_gradient(dq, dz, k, PRECISION)
    if tl.program_id(1) == 0:
        tl.store(stats_ptr + 2 * rows_total + bh * N_q + i, c, mask=i < end)
        tl.store(stats_ptr + 3 * rows_total + bh * N_q + i, part_top, mask=i < end)
    if HAS_DQ:
        offs = (bh * N_q + i)[:, None] * D_s + d_out[None, :]
        mask = (i < end)[:, None] & (d_out < D_s)[None, :]
        dq = dq * dq_scale
        if IS_ADDED:
            dq += tl.load(dq_ptr + offs, mask=mask, other=0.0)
        tl.store(dq_ptr + offs, dq.to(dq_ptr.dtype.element_ty), mask=mask)


def _broadcast(x: Tensor | None, ndim: int) -> tuple[int, ...]:
    """Strides, 0 along dimensions of size 1."""
    if x is None:
        return (0,) * ndim
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape[:ndim], x.stride()[:ndim], strict=True))


def _named(prefix: str, letters: str, values: tuple[int, ...]) -> dict[str, int]:
    return {f"stride_{prefix}{letter}": value for letter, value in zip(letters, values, strict=True)}


def _width(d: int) -> int:
    return max(triton.next_power_of_2(d), 16)


class _Network:
    """One network's side of a launch."""

    def __init__(self, q: Tensor, k: Tensor, bias: Tensor | None, scale: float, has_softmax: bool) -> None:
        self.q, self.k, self.scale = q, k, scale
        self.bias = None if has_softmax and bias is not None and bias.shape[3] == 1 else bias  # the same for all keys
        self.top = None if self.bias is None or not has_softmax else self.bias.amax(-1)
        self.has_softmax, self.is_centred = has_softmax, False
        self.mean = q  # a stand-in for what is not read

    def widen(self) -> None:
        """In float32, as the other network is: 16-bit products beside float32 ones save little and spill registers."""
        q = self.q.float()
        self.q, self.k = q, q if self.k is self.q else self.k.float()

    def centre(self, mask: Tensor | None) -> None:
        self.is_centred = self.has_softmax and self.k.dtype == torch.float32
        if not self.is_centred:
            return
        B, H, N_k, D = self.k.shape
        self.mean = self.k.new_empty((B, H, D), dtype=torch.float32)
        BLOCK_D = min(_width(D), 64)
        _attention_centre_kernel[(B * H, triton.cdiv(D, BLOCK_D))](
            self.k, self.k if mask is None else mask, self.mean, *self.k.stride(), *_broadcast(mask, 2), H, N_k, D,
            HAS_MASK=mask is not None, BLOCK_N=CENTRE_BLOCK, BLOCK_D=BLOCK_D,
        )  # fmt: skip

    def arguments(self, suffix: str) -> dict[str, Any]:
        return {
            f"q{suffix}_ptr": self.q,
            f"k{suffix}_ptr": self.k,
            f"mean{suffix}_ptr": self.mean,
            f"bias{suffix}_ptr": self.q if self.bias is None else self.bias,
            f"top{suffix}_ptr": self.q if self.top is None else self.top,
            **_named(f"q{suffix[1:]}", "bhnd", self.q.stride()),
            **_named(f"k{suffix[1:]}", "bhnd", self.k.stride()),
            **_named(f"b{suffix[1:]}", "bhqk", _broadcast(self.bias, 4)),
            **_named(f"u{suffix[1:]}", "bhq", _broadcast(self.top, 3)),
            f"D{suffix}": self.q.shape[3],
            f"HAS_BIAS{suffix.upper()}": self.bias is not None,
            f"IS_CENTRED{suffix.upper()}": self.is_centred,
        }  # fmt: skip


class _Problem:
    """The arguments that all kernels of a call share, by name."""

    def __init__(
        self,
        student: _Network,
        teacher: _Network,
        key_mask: Tensor | None,
        weight: Tensor | None,
        factor: float,
        divergence: str,
        bias_scale: float,
        is_causal: bool,
        row_start: int,
        row_step: int,
    ) -> None:
        self.student, self.teacher = student, teacher
        has_softmax = divergence != "score_mse"
        in_log2 = LOG2_E.value if has_softmax else 1.0
        mask = None if key_mask is None else key_mask.view(torch.uint8)
        networks = (student, teacher)
        itemsize = max(x.itemsize for network in networks for x in (network.q, network.k))
        for network in networks:
            if itemsize == torch.float32.itemsize:
                network.widen()
            network.centre(mask)
        (B, H, N_q, D_s), D_t, N_k = student.q.shape, teacher.q.shape[3], student.k.shape[2]
        self.B, self.H, self.N_q, self.N_k = B, H, N_q, N_k
        table = CONFIGS[architecture(student.q.device), itemsize]
        width = max(_width(D_s), _width(D_t))
        is_wide = width > max(table)
        self.config = table[128 if is_wide else min(w for w in table if w >= width)]
        self.blocks = {"BLOCK_DS": 128, "BLOCK_DT": 128} if is_wide else {
            "BLOCK_DS": _width(D_s), "BLOCK_DT": _width(D_t)
        }  # fmt: skip
        self.pieces = triton.cdiv(D_s, self.blocks["BLOCK_DS"])
        self.arguments: dict[str, Any] = {
            **student.arguments("_s"),
            **teacher.arguments("_t"),
            "mask_ptr": student.q if mask is None else mask,
            **_named("m", "bn", _broadcast(mask, 2)),
            "w_ptr": student.q if weight is None else weight,
            **_named("w", "bhn", _broadcast(weight, 3)),
            "H": H,
            "H_s": H,
            "H_t": teacher.q.shape[1],
            "N_q": N_q,
            "N_k": N_k,
            "rows_total": B * H * N_q,
            "row_start": row_start,
            "row_step": row_step,
            "first_b": 0,
            "first_row": 0,
            "strip_rows": N_q,
            "pitch": 0,
            "scale_s": student.scale * in_log2,
            "scale_t": teacher.scale * in_log2,
            "bias_scale": bias_scale * in_log2,
            "dbias_scale": bias_scale,
            "dq_scale": student.scale,
            "dk_scale": student.scale,
            "factor": factor,
            "inv_keys": 1 / N_k,
            "inv_H": 1 / H,
            "y_ptr": student.q,
            "dlog_ptr": student.q,
            "sum_ptr": student.q,
            "DIVERGENCE": divergence,
            "IS_MEAN": False,
            "HAS_MASK": mask is not None,
            "HAS_WEIGHT": weight is not None,
            "IS_CAUSAL": is_causal,
            "IS_WIDE": is_wide,
            "PRECISION": float32_products(),
        }

    def launch(self, kernel: Any, grid: tuple[int, ...], tile: Tile, **more: Any) -> None:
        """Run a kernel with what of the arguments it names."""
        arguments = self.arguments | self.blocks | more
        blocks = tile._asdict()
        options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
        arguments |= blocks
        kernel[grid](**{name: arguments[name] for name in kernel.arg_names}, **options)

    def fused(self) -> Tile | None:
        """The kernel that forms every score once, where all keys fit on chip and heads fill the card."""
        heads, in_float32 = self.B * self.H, self.student.is_centred or self.teacher.is_centred
        if in_float32 or heads < multiprocessors(self.student.q.device):
            return None
        return next((tile for tile in self.config.fused if tile.BLOCK_N >= self.N_k), None)

    def tiles(self, rows: int, columns: int, tile: Tile) -> dict[str, int]:
        return {"q_tiles": triton.cdiv(rows, tile.BLOCK_M), "k_tiles": triton.cdiv(columns, tile.BLOCK_N)}

    def keys(self, dk: Tensor, total: Tensor | None, images: int, **more: Any) -> None:
        """dk, plus total where that is given."""
        tile = self.config.keys
        tiles = triton.cdiv(self.N_k, tile.BLOCK_N)
        added = {"sum_ptr": dk if total is None else total, "IS_ADDED": total is not None}
        self.launch(_attention_keys_kernel, (images * self.H * tiles, self.pieces), tile,
                    k_tiles=tiles, dk_ptr=dk, **added, **more)  # fmt: skip

    def bias_sums(self, dbias: Tensor) -> Tensor:
        """(splits, *bias): room for the partial sums of a bias' gradient, as many as fill the card."""
        tiles = self.tiles(1 if dbias.shape[2] == 1 else self.N_q, 1 if dbias.shape[3] == 1 else self.N_k,
                           self.config.bias)  # fmt: skip
        programs = dbias.shape[0] * dbias.shape[1] * tiles["q_tiles"] * tiles["k_tiles"]
        splits = min(4 * multiprocessors(dbias.device) // programs, PARTIAL_BYTES // (4 * dbias.numel()), 65535)
        return dbias.new_zeros((max(splits, 1), *dbias.shape), dtype=torch.float32)

    def bias(self, partial: Tensor, images: int, **more: Any) -> None:
        """Add the gradient of a strip of rows to partial sums (splits, B | 1, H | 1, N_q | 1, N_k | 1)."""
        splits, *shape = partial.shape
        tile = self.config.bias
        rows = more.get("strip_rows", self.N_q)
        # A dimension that is 1 on both sides is not summed over, and one of size 1 in a strip of images may be.
        sums = {f"SUM_{letter}": n == 1 for letter, n in zip("BHQK", shape, strict=True)}
        tiles = self.tiles(rows, self.N_k, tile)
        whole = {"B": images, "H": self.H, "Q": tiles["q_tiles"], "K": tiles["k_tiles"]}
        programs = steps = 1
        for letter, n in whole.items():
            if sums[f"SUM_{letter}"]:
                steps *= n
            else:
                programs *= n
        self.launch(_attention_bias_kernel, (programs, splits), tile, partial_ptr=partial, B_bias=shape[0],
                    H_bias=shape[1], steps=steps, per_split=triton.cdiv(steps, splits),
                    bias_numel=partial[0].numel(), **sums, **tiles, **more)  # fmt: skip


def _match(p: _Problem, loss: Tensor, dq: Tensor | None, dk: Tensor | None, dbias: Tensor | None, shared: bool) -> None:
    """Row losses (B, H, N_q) and the gradients wanted, head by head. shared: keys are the queries, and dq is all."""
    q = p.student.q
    fused = p.fused()
    if dbias is None and (dq is not None or dk is not None) and fused is not None:
        d_queries, d_keys = dq, dk
        if shared:  # rounded once, as their sum
            d_queries, d_keys = (torch.empty_like(dq, dtype=torch.float32) for _ in range(2))
        p.launch(_attention_fused_kernel, (p.B * p.H,), fused, loss_ptr=loss,
                 dq_ptr=loss if d_queries is None else d_queries, dk_ptr=loss if d_keys is None else d_keys,
                 HAS_DQ=d_queries is not None, HAS_DK=d_keys is not None)  # fmt: skip
        if shared:
            torch.add(d_queries, d_keys, out=dq)
        return
    tile = p.config.rows
    tiles = triton.cdiv(p.N_q, tile.BLOCK_M)
    stats = q.new_empty((6, p.B, p.H, p.N_q), dtype=torch.float32)
    part = dq
    if shared and dq is not None and dq.dtype != torch.float32:
        part = torch.empty_like(dq, dtype=torch.float32)  # one rounding, of the sum
    p.launch(_attention_rows_kernel, (p.B * p.H * tiles, 1 if dq is None else p.pieces), tile, q_tiles=tiles,
             loss_ptr=loss, stats_ptr=stats, dq_ptr=loss if part is None else part, HAS_DQ=dq is not None)  # fmt: skip
    if shared and dq is not None:
        p.keys(dq, part, p.B, stats_ptr=stats)
    elif dk is not None:
        p.keys(dk, None, p.B, stats_ptr=stats)
    if dbias is not None:
        partial = p.bias_sums(dbias)
        p.bias(partial, p.B, stats_ptr=stats)
        dbias.copy_(partial.sum(0))


def _stats(p: _Problem, network: _Network, scale: float, BLOCK_D: int, planes: int) -> Tensor:
    """(planes, B, H, N_q): m, l, and room."""
    B, H, N_q, _ = network.q.shape
    stats = network.q.new_empty((planes, B, H, N_q), dtype=torch.float32)
    tile = p.config.rows
    tiles = triton.cdiv(N_q, tile.BLOCK_M)
    p.launch(_attention_stats_kernel, (B * H * tiles,), tile, **network.arguments(""), stats_ptr=stats, scale=scale,
             H=H, q_tiles=tiles, rows_total=B * H * N_q, BLOCK_D=BLOCK_D)  # fmt: skip
    return stats


def _mean(p: _Problem, loss: Tensor, dq: Tensor | None, dk: Tensor | None, dbias: Tensor | None, shared: bool) -> None:
    """The same for maps averaged over heads, loss (B, 1, N_q): strip by strip, of which averages are kept."""
    q = p.student.q
    stats_s = _stats(p, p.student, p.arguments["scale_s"], p.blocks["BLOCK_DS"], 4)
    stats_t = _stats(p, p.teacher, p.arguments["scale_t"], p.blocks["BLOCK_DT"], 2)
    has_grad = dq is not None or dk is not None or dbias is not None
    budget = max(STRIP_BYTES // (8 * p.N_k), p.config.rows.BLOCK_M) if has_grad else p.B * p.N_q
    images, rows = max(min(budget // p.N_q, p.B), 1), min(budget, p.N_q)
    y, dlog = (q.new_empty((images, rows, p.N_k) if has_grad else (1,), dtype=torch.float32) for _ in range(2))
    dkeys = dq if shared else dk
    total = None
    if dkeys is not None and (shared or rows < p.N_q):
        total = torch.zeros_like(dkeys, dtype=torch.float32)
    partial = None if dbias is None else p.bias_sums(dbias)
    dqueries = total if shared else dq

    mean, tile = p.config.mean, p.config.rows
    for b in range(0, p.B, images):
        for r in range(0, p.N_q, rows):
            here, tall = min(images, p.B - b), min(rows, p.N_q - r)
            mean_tiles, tiles = (triton.cdiv(tall, x.BLOCK_M) for x in (mean, tile))
            strip = {"first_b": b, "first_row": r, "strip_rows": tall, "pitch": p.N_k, "y_ptr": y, "dlog_ptr": dlog}
            p.launch(_attention_mean_kernel, (here * mean_tiles,), mean, loss_ptr=loss, stats_ptr=stats_s,
                     stats_t_ptr=stats_t, rows_s=stats_s[0].numel(), rows_t=stats_t[0].numel(), HAS_GRAD=has_grad,
                     q_tiles=mean_tiles, **strip)  # fmt: skip
            if not has_grad:
                continue
            strip |= {"stats_ptr": stats_s}
            p.launch(_attention_head_kernel, (here * p.H * tiles, 1 if dqueries is None else p.pieces), tile,
                     dq_ptr=y if dqueries is None else dqueries, HAS_DQ=dqueries is not None, IS_ADDED=shared,
                     q_tiles=tiles, **strip)  # fmt: skip
            if dkeys is not None:
                p.keys(dkeys if total is None else total, total, here, IS_MEAN=True, **strip)
            if partial is not None:
                p.bias(partial, here, IS_MEAN=True, **strip)
    if total is not None:
        dkeys.copy_(total)
    if partial is not None:
        dbias.copy_(partial.sum(0))


def _chunks(x: Tensor, other: Tensor) -> list[slice]:
    """Cuts of the rows of (images, H, N, d) operands."""
    most = max(GRAM_CHUNK // (x.shape[0] * x.shape[1] * (x.shape[3] + other.shape[3])), 1)
    return [slice(r, r + most) for r in range(0, x.shape[2], most)]


def _grams(s: Tensor, t: Tensor, off: Tensor | None, w: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(Sᵀ W S, Tᵀ W S, Tᵀ W T) of every head in float64; rows that are off count as 0."""
    (n, H, _, d_s), d_t = s.shape, t.shape[3]
    ss, ts, tt = (s.new_zeros((n, H, a, b), dtype=torch.float64) for a, b in ((d_s, d_s), (d_t, d_s), (d_t, d_t)))
    for r in _chunks(s, t):
        x, y = (
            v[:, :, r].double() if off is None else v[:, :, r].double().masked_fill(off[:, :, r], 0) for v in (s, t)
        )
        wx, wy = (x, y) if w is None else (x * w[:, :, r], y * w[:, :, r])
        ss += wx.mT @ x
        ts += wy.mT @ x
        tt += wy.mT @ y
    return ss, ts, tt


def _gram(
    student: _Network, teacher: _Network, key_mask: Tensor | None, w: Tensor, dq: Tensor | None, dk: Tensor | None
) -> Tensor:
    """Σ W (Q_s K_sᵀ - Q_t K_tᵀ)² = <A_ss, C_ss> - 2 <A_ts, C_ts> + <A_tt, C_tt>, A_xy = Q_xᵀ W Q_y, C_xy = K_xᵀ K_y.

    dQ_s = 2 W (Q_s C_ss - Q_t C_ts), dK_s = 2 (K_s A_ss - K_t A_ts), in float64: near a match the terms cancel.
    """
    B, H, _, d_s = student.q.shape
    total = w.new_zeros((), dtype=torch.float64)
    scales = (student.scale**2, teacher.scale * student.scale, teacher.scale**2)
    f_ss, f_ts, f_tt = (scale / student.k.shape[2] for scale in scales)
    images = max(GRAM_CHUNK // (H * (d_s + teacher.q.shape[3]) ** 2), 1)
    for b in (slice(b0, b0 + images) for b0 in range(0, B, images)):
        q_s, q_t, k_s, k_t = (x[b] for x in (student.q, teacher.q, student.k, teacher.k))
        weight = w[b].double()
        off = weight == 0
        hidden = None if key_mask is None else ~key_mask[b, None, :, None]
        a_ss, a_ts, a_tt = _grams(q_s, q_t, off, weight)
        c_ss, c_ts, c_tt = _grams(k_s, k_t, hidden, None)
        total += f_ss * (a_ss * c_ss).sum() - 2 * f_ts * (a_ts * c_ts).sum() + f_tt * (a_tt * c_tt).sum()
        for out, x, y, without, gram_x, gram_y in ((dq, q_s, q_t, off, c_ss, c_ts), (dk, k_s, k_t, hidden, a_ss, a_ts)):
            if out is None:
                continue
            for r in _chunks(x, y):
                d = x[:, :, r].double() @ (2 * f_ss * gram_x) - y[:, :, r].double() @ (2 * f_ts * gram_y)
                if out is dq:
                    d *= weight[:, :, r]
                out[b, :, r] = (d if without is None else d.masked_fill_(without[:, :, r], 0)).to(out.dtype)
    return total.clamp_min(0)  # rounding alone can take a zero below 0


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
    scale_student: float,
    scale_teacher: float,
    bias_scale: float,
    is_causal: bool,
    row_start: int,
    row_step: int,
    with_dq: bool,
    with_dk: bool,
    with_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k = q_student if k_student is None else k_student
    has_softmax = divergence != "score_mse"
    student = _Network(q_student, k, bias_student, scale_student, has_softmax)
    teacher = _Network(q_teacher, k_teacher, bias_teacher, scale_teacher, has_softmax)
    B, H, N_q = q_student.shape[:3]
    H_out = 1 if heads == "mean" else H
    bias = q_student if bias_student is None else bias_student
    dq, dk, dbias = (
        x.new_empty(x.shape if wanted else (0,), dtype=stored_gradient(x))
        for x, wanted in ((q_student, with_dq), (k, with_dk), (bias, with_dbias))
    )
    if bias_student is None:
        dbias = dbias.float()
    factor = 1.0
    if reduction == "mean":
        factor = 1 / (B * H_out) if row_weight is not None else 1 / (B * H_out * N_q)
    wanted = [x if want else None for x, want in ((dq, with_dq), (dk, with_dk), (dbias, with_dbias))]
    if algorithm == "gram":
        w = q_student.new_full((1, 1), factor, dtype=torch.float32) if row_weight is None else row_weight * factor
        w = w.expand(B, N_q)[:, None, :, None]
        with torch.autocast(q_student.device.type, enabled=False):
            return _gram(student, teacher, key_mask, w, *wanted[:2]).float(), dq, dk, dbias
    rows = q_student.new_empty((B, H_out, N_q), dtype=torch.float32)
    weight = None if row_weight is None else row_weight[:, None]
    problem = _Problem(
        student, teacher, key_mask, weight, factor, divergence, bias_scale, is_causal, row_start, row_step
    )
    (_mean if heads == "mean" else _match)(problem, rows, *wanted, shared=k_student is None)
    return rows if reduction == "none" else rows.sum(dtype=torch.float64).float(), dq, dk, dbias


def attention_bwd(
    drows: Tensor,
    q_student: Tensor,
    k_student: Tensor | None,
    q_teacher: Tensor,
    k_teacher: Tensor,
    bias_student: Tensor | None,
    bias_teacher: Tensor | None,
    key_mask: Tensor | None,
    divergence: str,
    heads: str,
    scale_student: float,
    scale_teacher: float,
    bias_scale: float,
    is_causal: bool,
    row_start: int,
    row_step: int,
    with_dq: bool,
    with_dk: bool,
    with_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of reduction "none", drows (B, H | 1, N_q): the same tiles again, weighted by what comes in."""
    k = q_student if k_student is None else k_student
    has_softmax = divergence != "score_mse"
    student = _Network(q_student, k, bias_student, scale_student, has_softmax)
    teacher = _Network(q_teacher, k_teacher, bias_teacher, scale_teacher, has_softmax)
    bias = drows if bias_student is None else bias_student
    dq, dk, dbias = (
        x.new_empty(x.shape if wanted else (0,))
        for x, wanted in ((q_student, with_dq), (k, with_dk), (bias, with_dbias))
    )
    wanted = [x if want else None for x, want in ((dq, with_dq), (dk, with_dk), (dbias, with_dbias))]
    problem = _Problem(student, teacher, key_mask, drows, 1.0, divergence, bias_scale, is_causal, row_start, row_step)
    (_mean if heads == "mean" else _match)(problem, torch.empty_like(drows), *wanted, shared=k_student is None)
    return dq, dk, dbias
