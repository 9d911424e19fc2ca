"""Kernels that compare averages over heads."""

import triton
import triton.language as tl

from ._attention_rows import LN_2, NEVER, _add_gradient, _advance, _base, _js, _or_one, _row_weights
from ._attention_scores import _finish_scores, _head_rows, _keys_seen, _load, _load_keys, _product, _sees, _visible
from ._attention_tiles import UNSPECIALIZED


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
    """Return the share of an image's heads whose rows i attend to any key, which is Σ p of the mean."""
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
    rows_total = tl.cast(rows_total, tl.int64)  # its multiples are offsets
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
