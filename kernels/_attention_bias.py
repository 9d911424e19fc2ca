"""The kernel of the bias gradient."""

import triton
import triton.language as tl

from ._attention_mean import _head_dz, _row_stats
from ._attention_rows import NEVER, _dz, _row_weights
from ._attention_scores import _finish_scores, _head_rows, _load, _load_keys, _product, _sees, _visible
from ._attention_tiles import UNSPECIALIZED


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
    rows_total = tl.cast(rows_total, tl.int64)  # its multiples are offsets
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
