"""Kernels that compare networks head by head, and those of the keys' gradients."""

import triton
import triton.language as tl

from ._attention_mean import _head_dz, _row_stats
from ._attention_rows import (
    LN_2,
    NEVER,
    _add_gradient,
    _advance,
    _advance_cross,
    _base,
    _dz,
    _kl,
    _or_one,
    _row_weights,
    _score_difference,
    _value,
    _whole_rows,
)
from ._attention_scores import (
    _dot,
    _finish_scores,
    _head_rows,
    _keys_seen,
    _load,
    _load_keys,
    _product,
    _sees,
    _visible,
)
from ._attention_tiles import UNSPECIALIZED


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
    rows_total = tl.cast(rows_total, tl.int64)  # its multiples are offsets
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
    rows_total = tl.cast(rows_total, tl.int64)  # its multiples are offsets
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
