"""Kernels that compare networks head by head, and those of the keys' gradients."""

import triton
import triton.language as tl

from ._attention_mean import _mean_dz, _row_stats
from ._attention_rows import (
    LN_2,
    NEVER,
    _add_gradient,
    _add_product,
    _add_scaled,
    _advance,
    _advance_cross,
    _base,
    _difference,
    _dz,
    _half,
    _kl,
    _or_one,
    _restored,
    _row_weights,
    _score_difference,
    _value,
)
from ._attention_scores import _by_row, _keys, _keys_seen, _queries, _scores, _sees, _visible
from ._attention_tiles import UNSPECIALIZED


@triton.jit
def _add_difference(dq, dq_top, keys, keys_top, e_s, e_t, alpha_s, alpha_t, old_rho, rho, k, PRECISION: tl.constexpr):
    """Σ (e_s - (1 + ρ) e_t) k and Σ e_t k with a tile more, where the maxima and ρ, so far, are new as well.

    At the end that is l_s Σ (p_s - p_t) k. Of a tile, only what its ρ lacked of the last one goes through the second
    sum, so that no more digits are lost than p_s - p_t loses in the first.
    """
    half, factors = _half(k)
    IS_FLOAT16: tl.constexpr = k.dtype == tl.float16
    share = (alpha_s - alpha_t) + (alpha_s * old_rho - alpha_t * rho)
    dq, dq_top = _add_scaled(dq, dq_top, alpha_s[:, None], keys, keys_top, share[:, None])
    difference = _difference(e_s, e_t, 1.0, rho[:, None])
    dq, dq_top = _add_product(dq, dq_top, 1.0, difference, half, factors, IS_FLOAT16, PRECISION)
    keys, keys_top = _add_product(keys, keys_top, alpha_t[:, None], e_t, half, factors, IS_FLOAT16, PRECISION)
    return dq, dq_top, keys, keys_top


@triton.jit
def _match_dz(z_s, z_t, w, stats_ptr, row, in_i, rows_total, inv_keys, ARE_KEYS_FIRST: tl.constexpr,
              DIVERGENCE: tl.constexpr):  # fmt: skip
    """_dz of a tile, from the stored statistics of its rows."""
    if DIVERGENCE == "score_mse":
        dz = _dz(z_s, z_t, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, _by_row(w, ARE_KEYS_FIRST), inv_keys, DIVERGENCE)
    else:
        m_s, l_s, has_gradient = _row_stats(stats_ptr, row, in_i, rows_total)
        m_t = tl.load(stats_ptr + 2 * rows_total + row, mask=in_i, other=0.0)
        rho = tl.load(stats_ptr + 3 * rows_total + row, mask=in_i, other=0.0)
        c, v_top = m_t, m_t  # unused, or
        if DIVERGENCE != "kl" and DIVERGENCE != "ce":
            c = tl.load(stats_ptr + 4 * rows_total + row, mask=in_i, other=0.0)
            v_top = tl.load(stats_ptr + 5 * rows_total + row, mask=in_i, other=0.0)
        w = tl.where(has_gradient, w, 0.0)
        dz = _dz(z_s, z_t, _by_row(m_s, ARE_KEYS_FIRST), _by_row(l_s, ARE_KEYS_FIRST), _by_row(m_t, ARE_KEYS_FIRST),
                 _by_row(rho, ARE_KEYS_FIRST), _by_row(c, ARE_KEYS_FIRST), _by_row(v_top, ARE_KEYS_FIRST),
                 _by_row(w, ARE_KEYS_FIRST), inv_keys, DIVERGENCE)  # fmt: skip
    return dz


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_rows_kernel(  # noqa: C901 (branches on constants, of which one is compiled)
    student, teacher,  # Operands
    key_mask,  # (B, N_k) and strides, or None
    weight,  # (B, H, N_q) and strides, or None
    loss_ptr,  # (B, H, N_q)
    stats_ptr,  # (6, B, H, N_q): m_s, l_s (0: no gradient), m_t, l_s / l_t - 1, c, v_top
    dq_ptr,  # (B, H, N_q, d)
    H, N_q, N_k, q_tiles, rows_total, row_start, row_step,
    scale_s, scale_t, bias_scale, dq_scale, factor, inv_keys,
    DIVERGENCE: tl.constexpr, HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_DQ: tl.constexpr, PRECISION: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_CENTRED_S: tl.constexpr, IS_CENTRED_T: tl.constexpr, IS_WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DS: tl.constexpr, BLOCK_DT: tl.constexpr,
):  # fmt: skip
    """One program per strip of a head's queries and piece of their gradient's width: losses, statistics, dq."""
    HAS_SOFTMAX: tl.constexpr = DIVERGENCE != "score_mse"
    IS_TWO_SWEEPS: tl.constexpr = DIVERGENCE == "js" or DIVERGENCE == "mse"
    HAS_TOP: tl.constexpr = IS_TWO_SWEEPS or DIVERGENCE == "reverse_kl"
    IS_HALF: tl.constexpr = student.q.dtype.element_ty != tl.float32
    # Two sums then give dq in the first sweep; float32, wide heads and biases leave too few registers for them.
    HAS_ROOM: tl.constexpr = IS_HALF and not (IS_WIDE or HAS_BIAS_S or HAS_BIAS_T)
    IS_ONE_SWEEP: tl.constexpr = (DIVERGENCE == "kl" or DIVERGENCE == "ce") and HAS_ROOM
    rows_total = tl.cast(rows_total, tl.int64)  # its multiples are offsets
    bh = (tl.program_id(0) // q_tiles).to(tl.int64)
    b, h = bh // H, bh % H
    i0 = tl.program_id(0) % q_tiles * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    w = _row_weights(weight, b, h, i, i < N_q, factor, HAS_WEIGHT)
    in_i = (i < N_q) & (w != 0)  # a row without weight may hold anything
    d_s, d_t = tl.arange(0, BLOCK_DS), tl.arange(0, BLOCK_DT)
    d_out = d_s + tl.program_id(1) * BLOCK_DS
    q_s = _queries(student, b, h, i, in_i, d_s)
    q_t = _queries(teacher, b, h, i, in_i, d_t)
    stop = _keys_seen(tl.minimum(i0 + BLOCK_M, N_q) - 1, N_k, row_start, row_step, IS_CAUSAL)

    m_s = tl.full((BLOCK_M,), NEVER, tl.float32)
    m_t = m_s
    l_s = tl.zeros((BLOCK_M,), tl.float32)
    l_t, u, x, c, rho, v_top = l_s, l_s, l_s, l_s, l_s, l_s
    z_top = m_s  # of the teacher, at the student's likeliest key
    dq = tl.zeros((BLOCK_M, BLOCK_DS), tl.float32)
    dq_top = tl.zeros((BLOCK_M, 1), tl.float32)
    keys, keys_top = dq, dq_top  # Σ e_t k
    for sweep in tl.static_range(3):
        # Statistics, the losses of one sweep and the dq that needs no more; losses of two; other dq.
        if sweep == 2:
            g = tl.where((l_s == 0) | (l_t == 0), 0.0, w) if HAS_SOFTMAX else w
        if sweep == 0 or (sweep == 1 and IS_TWO_SWEEPS) or (sweep == 2 and HAS_DQ and HAS_SOFTMAX and not IS_ONE_SWEEP):
            base_s, base_t, sum_s = _base(m_s)[:, None], _base(m_t)[:, None], _or_one(l_s)[:, None]
            for j0 in range(0, stop, BLOCK_N):
                j = j0 + tl.arange(0, BLOCK_N)
                sees = _sees(key_mask, b, j, N_k, HAS_MASK)
                visible = _visible(i, j, sees, row_start, row_step, False, IS_CAUSAL)
                k_s = _keys(student, b, h, H, j, sees, d_s, IS_CENTRED_S)
                k_t = _keys(teacher, b, h, H, j, sees, d_t, IS_CENTRED_T)
                z_s = _scores(student, b, h, H, q_s, i, in_i, k_s, j, sees, visible, scale_s, bias_scale, False,
                              HAS_BIAS_S, HAS_SOFTMAX, IS_CENTRED_S, IS_WIDE, PRECISION, BLOCK_DS)  # fmt: skip
                z_t = _scores(teacher, b, h, H, q_t, i, in_i, k_t, j, sees, visible, scale_t, bias_scale, False,
                              HAS_BIAS_T, HAS_SOFTMAX, IS_CENTRED_T, IS_WIDE, PRECISION, BLOCK_DT)  # fmt: skip
                if sweep == 2:
                    dz = _dz(z_s, z_t, base_s, sum_s, base_t, rho[:, None], c[:, None], v_top[:, None], g[:, None],
                             inv_keys, DIVERGENCE)  # fmt: skip
                    if IS_WIDE:
                        k_s = _keys(student, b, h, H, j, sees, d_out, IS_CENTRED_S)
                    dq, dq_top = _add_gradient(dq, dq_top, dz, k_s, PRECISION)
                elif sweep == 1:
                    e_s, e_t = tl.exp2(z_s - base_s), tl.exp2(z_t - base_t)
                    v, terms = _value(e_s, e_t, sum_s, rho[:, None], DIVERGENCE)
                    u += tl.sum(terms, 1)
                    c += tl.sum(e_s / sum_s * (v - v_top[:, None]), 1)
                elif HAS_SOFTMAX:
                    old_s, old_t, old_top, old_rho = l_s, l_t, z_top, rho
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
                    if HAS_DQ and IS_ONE_SWEEP:
                        rho = x / _or_one(l_t)
                        if IS_WIDE:
                            k_s = _keys(student, b, h, H, j, sees, d_out, IS_CENTRED_S)
                        dq, dq_top, keys, keys_top = _add_difference(
                            dq, dq_top, keys, keys_top, e_s, e_t, alpha_s, alpha_t, old_rho, rho, k_s, PRECISION
                        )
                else:
                    d = _score_difference(z_s, z_t)
                    u += tl.sum(d * d, 1)
                    if HAS_DQ:
                        if IS_WIDE:
                            k_s = _keys(student, b, h, H, j, sees, d_out, IS_CENTRED_S)
                        dq, dq_top = _add_gradient(dq, dq_top, d, k_s, PRECISION)
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
        offs = (bh * N_q + i)[:, None] * student.D + d_out[None, :]
        dq = _restored(dq, dq_top, IS_HALF)
        if not HAS_SOFTMAX:
            dq = dq * (w * (2.0 * inv_keys))[:, None]
        elif IS_ONE_SWEEP:
            g = tl.where((l_s == 0) | (l_t == 0), 0.0, w)[:, None]
            dq = tl.where(g == 0, 0.0, dq / _or_one(l_s)[:, None] * g)
        out = (dq * dq_scale).to(dq_ptr.dtype.element_ty)
        tl.store(dq_ptr + offs, out, mask=(i < N_q)[:, None] & (d_out < student.D)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_keys_kernel(
    student, teacher,  # Operands
    key_mask,  # (B, N_k) and strides, or None
    weight,  # (B, H, N_q) and strides, or None
    stats_ptr,  # (6, B, H, N_q): m_s, l_s (0: no gradient), m_t, l_s / l_t - 1, c, v_top
    y_ptr, dlog_ptr,  # (images, strip_rows, pitch): the mean p or its log2, gradient by its log; unused unless IS_MEAN
    sum_ptr,  # (B, H, N_k, d), float32: added where IS_ADDED
    dk_ptr,  # (B, H, N_k, d)
    H, N_q, N_k, k_tiles, rows_total, row_start, row_step, first_b, first_row, strip_rows, pitch,
    scale_s, scale_t, bias_scale, dk_scale, factor, inv_keys, inv_H,
    DIVERGENCE: tl.constexpr, IS_MEAN: tl.constexpr, HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr, IS_ADDED: tl.constexpr, PRECISION: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_CENTRED_S: tl.constexpr, IS_CENTRED_T: tl.constexpr, IS_WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DS: tl.constexpr, BLOCK_DT: tl.constexpr,
):  # fmt: skip
    """One program per strip of a head's keys and piece of their gradient's width: dk from a strip of queries."""
    HAS_SOFTMAX: tl.constexpr = DIVERGENCE != "score_mse"
    rows_total = tl.cast(rows_total, tl.int64)  # its multiples are offsets
    local = (tl.program_id(0) // k_tiles // H).to(tl.int64)
    b, h = first_b + local, (tl.program_id(0) // k_tiles % H).to(tl.int64)
    bh = b * H + h
    j0 = tl.program_id(0) % k_tiles * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    sees = _sees(key_mask, b, j, N_k, HAS_MASK)
    d_s, d_t = tl.arange(0, BLOCK_DS), tl.arange(0, BLOCK_DT)
    d_out = d_s + tl.program_id(1) * BLOCK_DS
    k_s = _keys(student, b, h, H, j, sees, d_s, IS_CENTRED_S)
    if not IS_MEAN:  # whose teacher may have fewer heads
        k_t = _keys(teacher, b, h, H, j, sees, d_t, IS_CENTRED_T)
    begin, end = first_row, first_row + strip_rows
    if IS_CAUSAL:  # the first row at or beyond position j0
        begin = tl.maximum(begin, tl.cdiv(tl.maximum(j0 - row_start, 0), row_step))

    dk = tl.zeros((BLOCK_N, BLOCK_DS), tl.float32)
    dk_top = tl.zeros((BLOCK_N, 1), tl.float32)
    for i0 in range(begin, end, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        w = _row_weights(weight, b, h, i, i < end, factor, HAS_WEIGHT)
        in_i = (i < end) & (w != 0)
        visible = _visible(i, j, sees, row_start, row_step, True, IS_CAUSAL)
        q_s = _queries(student, b, h, i, in_i, d_s)
        z_s = _scores(student, b, h, H, q_s, i, in_i, k_s, j, sees, visible, scale_s, bias_scale, True,
                      HAS_BIAS_S, HAS_SOFTMAX, IS_CENTRED_S, IS_WIDE, PRECISION, BLOCK_DS)  # fmt: skip
        row = bh * N_q + i
        if IS_MEAN:
            place = local * strip_rows + (i - first_row)
            dz = _mean_dz(z_s, stats_ptr, y_ptr, dlog_ptr, place, row, in_i, j, N_k, rows_total, pitch, inv_H,
                          True)  # fmt: skip
        else:
            q_t = _queries(teacher, b, h, i, in_i, d_t)
            z_t = _scores(teacher, b, h, H, q_t, i, in_i, k_t, j, sees, visible, scale_t, bias_scale, True,
                          HAS_BIAS_T, HAS_SOFTMAX, IS_CENTRED_T, IS_WIDE, PRECISION, BLOCK_DT)  # fmt: skip
            dz = _match_dz(z_s, z_t, w, stats_ptr, row, in_i, rows_total, inv_keys, True, DIVERGENCE)
        if IS_WIDE:
            q_s = _queries(student, b, h, i, in_i, d_out)
        dk, dk_top = _add_gradient(dk, dk_top, dz, q_s, PRECISION)

    offs = (bh * N_k + j)[:, None] * student.D + d_out[None, :]
    mask = (j < N_k)[:, None] & (d_out < student.D)[None, :]
    dk = _restored(dk, dk_top, student.q.dtype.element_ty != tl.float32) * dk_scale
    if IS_ADDED:
        dk += tl.load(sum_ptr + offs, mask=mask, other=0.0)
    tl.store(dk_ptr + offs, dk.to(dk_ptr.dtype.element_ty), mask=mask)
