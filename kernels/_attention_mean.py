"""Kernels that compare averages over heads."""

import triton
import triton.language as tl

from ._attention_rows import LN_2, NEVER, _add_gradient, _advance, _base, _js, _or_one, _restored, _row_weights
from ._attention_scores import _by_row, _keys, _keys_seen, _queries, _scores, _sees, _visible
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


@triton.jit
def _of_mean(y_ptr, dlog_ptr, place, in_i, j, N_k, pitch, ARE_KEYS_FIRST: tl.constexpr):
    """The mean p, or its log2, of a tile of the rows at `place`, and the gradient by its log."""
    at = _by_row(place, ARE_KEYS_FIRST) * pitch + _by_row(j, not ARE_KEYS_FIRST)
    mask = _by_row(in_i, ARE_KEYS_FIRST) & _by_row(j < N_k, not ARE_KEYS_FIRST)
    return tl.load(y_ptr + at, mask=mask, other=NEVER), tl.load(dlog_ptr + at, mask=mask, other=0.0)


@triton.jit
def _mean_dz(z, stats_ptr, y_ptr, dlog_ptr, place, row, in_i, j, N_k, rows_total, pitch, inv_H,
             ARE_KEYS_FIRST: tl.constexpr):  # fmt: skip
    """_head_dz of a tile, from what is stored of its rows: their statistics, and y and dlog at their `place`."""
    m, l, _ = _row_stats(stats_ptr, row, in_i, rows_total)  # noqa: E741
    c = tl.load(stats_ptr + 2 * rows_total + row, mask=in_i, other=0.0)
    part_top = tl.load(stats_ptr + 3 * rows_total + row, mask=in_i, other=0.0)
    y, dlog = _of_mean(y_ptr, dlog_ptr, place, in_i, j, N_k, pitch, ARE_KEYS_FIRST)
    return _head_dz(z, _by_row(m, ARE_KEYS_FIRST), _by_row(l, ARE_KEYS_FIRST), y, dlog, _by_row(c, ARE_KEYS_FIRST),
                    _by_row(part_top, ARE_KEYS_FIRST), inv_H)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_stats_kernel(
    network,  # Operands
    key_mask,  # (B, N_k) and strides, or None
    weight,  # (B, 1, N_q) and strides, or None
    stats_ptr,  # (2, B, H, N_q): m, l
    H, N_q, N_k, q_tiles, rows_total, row_start, row_step,
    scale, bias_scale, factor,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_CENTRED: tl.constexpr, IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per strip of a head's queries: maximum and sum of its rows, of one network."""
    bh = (tl.program_id(0) // q_tiles).to(tl.int64)
    b, h = bh // H, bh % H
    i0 = tl.program_id(0) % q_tiles * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    w = _row_weights(weight, b, 0, i, i < N_q, factor, HAS_WEIGHT)
    in_i = (i < N_q) & (w != 0)
    d = tl.arange(0, BLOCK_D)
    q = _queries(network, b, h, i, in_i, d)
    m = tl.full((BLOCK_M,), NEVER, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
    for j0 in range(0, _keys_seen(tl.minimum(i0 + BLOCK_M, N_q) - 1, N_k, row_start, row_step, IS_CAUSAL), BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        sees = _sees(key_mask, b, j, N_k, HAS_MASK)
        k = _keys(network, b, h, H, j, sees, d, IS_CENTRED)
        visible = _visible(i, j, sees, row_start, row_step, False, IS_CAUSAL)
        z = _scores(network, b, h, H, q, i, in_i, k, j, sees, visible, scale, bias_scale, False,
                    HAS_BIAS, True, IS_CENTRED, IS_WIDE, PRECISION, BLOCK_D)  # fmt: skip
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
    network, stats_ptr, i, in_i, j, sees, visible, b, H, N_q, rows_total, scale, bias_scale,
    HAS_BIAS: tl.constexpr, IS_CENTRED: tl.constexpr, IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean over a network's heads of a tile's p, and its log2, of image b."""
    d = tl.arange(0, BLOCK_D)
    top = tl.full((i.shape[0], j.shape[0]), NEVER, tl.float32)
    total = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    p = total
    for head in range(H):
        h = tl.cast(head, tl.int64)
        q, k = _queries(network, b, h, i, in_i, d), _keys(network, b, h, H, j, sees, d, IS_CENTRED)
        z = _scores(network, b, h, H, q, i, in_i, k, j, sees, visible, scale, bias_scale, False,
                    HAS_BIAS, True, IS_CENTRED, IS_WIDE, PRECISION, BLOCK_D)  # fmt: skip
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
    student, teacher,  # Operands
    key_mask,  # (B, N_k) and strides, or None
    weight,  # (B, 1, N_q) and strides, or None
    stats_ptr, stats_t_ptr,  # (4, B, H_s, N_q), (2, B, H_t, N_q): m, l
    loss_ptr,  # (B, 1, N_q)
    y_ptr, dlog_ptr,  # (images, strip_rows, pitch): student: mean p or its log2; gradient by its log
    H_s, H_t, N_q, N_k, q_tiles, rows_s, rows_t, row_start, row_step, first_b, first_row, strip_rows, pitch,
    scale_s, scale_t, bias_scale, factor, inv_keys,
    DIVERGENCE: tl.constexpr, HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_CENTRED_S: tl.constexpr, IS_CENTRED_T: tl.constexpr, IS_WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DS: tl.constexpr, BLOCK_DT: tl.constexpr,
):  # fmt: skip
    """One program per strip of an image's queries: losses of the averaged maps and what every head's gradient needs."""
    local = (tl.program_id(0) // q_tiles).to(tl.int64)
    b = first_b + local
    end = first_row + strip_rows
    i0 = first_row + tl.program_id(0) % q_tiles * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    w = _row_weights(weight, b, 0, i, i < end, factor, HAS_WEIGHT)
    in_i = (i < end) & (w != 0)
    share_s = _share_with_keys(stats_ptr, b, i, in_i, H_s, N_q, rows_s)
    share_t = _share_with_keys(stats_t_ptr, b, i, in_i, H_t, N_q, rows_t)
    g = tl.where((share_s == 0) | (share_t == 0), 0.0, w)[:, None]
    loss = tl.zeros((BLOCK_M,), tl.float32)
    for j0 in range(0, N_k, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        sees = _sees(key_mask, b, j, N_k, HAS_MASK)
        visible = _visible(i, j, sees, row_start, row_step, False, IS_CAUSAL)
        p_s, y_s = _mean_of_heads(
            student, stats_ptr, i, in_i, j, sees, visible, b, H_s, N_q, rows_s, scale_s, bias_scale,
            HAS_BIAS_S, IS_CENTRED_S, IS_WIDE, PRECISION, BLOCK_DS,
        )  # fmt: skip
        p_t, y_t = _mean_of_heads(
            teacher, stats_t_ptr, i, in_i, j, sees, visible, b, H_t, N_q, rows_t, scale_t, bias_scale,
            HAS_BIAS_T, IS_CENTRED_T, IS_WIDE, PRECISION, BLOCK_DT,
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
    student,  # Operands
    key_mask,  # (B, N_k) and strides, or None
    weight,  # (B, 1, N_q) and strides, or None
    stats_ptr,  # (4, B, H, N_q): m, l, c, part_top
    y_ptr, dlog_ptr,  # (images, strip_rows, pitch)
    dq_ptr,  # (B, H, N_q, d)
    H, N_q, N_k, q_tiles, rows_total, row_start, row_step, first_b, first_row, strip_rows, pitch,
    scale_s, bias_scale, dq_scale, factor, inv_H,
    HAS_BIAS_S: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DQ: tl.constexpr,
    IS_ADDED: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_CENTRED_S: tl.constexpr, IS_WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DS: tl.constexpr,
):  # fmt: skip
    """One program per strip of a head's queries and piece of their gradient's width: c and dq under a mean of heads."""
    rows_total = tl.cast(rows_total, tl.int64)  # its multiples are offsets
    local = (tl.program_id(0) // q_tiles // H).to(tl.int64)
    b, h = first_b + local, (tl.program_id(0) // q_tiles % H).to(tl.int64)
    bh = b * H + h
    end = first_row + strip_rows
    i0 = first_row + tl.program_id(0) % q_tiles * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    w = _row_weights(weight, b, 0, i, i < end, factor, HAS_WEIGHT)
    in_i = (i < end) & (w != 0)
    d = tl.arange(0, BLOCK_DS)
    d_out = d + tl.program_id(1) * BLOCK_DS
    q = _queries(student, b, h, i, in_i, d)
    m, l, _ = _row_stats(stats_ptr, bh * N_q + i, in_i, rows_total)  # noqa: E741
    c = tl.zeros((BLOCK_M,), tl.float32)
    part_top, has_top, seen = c, c, c
    dq = tl.zeros((BLOCK_M, BLOCK_DS), tl.float32)
    dq_top = tl.zeros((BLOCK_M, 1), tl.float32)
    stop = _keys_seen(tl.minimum(i0 + BLOCK_M, end) - 1, N_k, row_start, row_step, IS_CAUSAL)
    for sweep in tl.static_range(2):
        if sweep == 0 or HAS_DQ:
            for j0 in range(0, stop, BLOCK_N):
                j = j0 + tl.arange(0, BLOCK_N)
                sees = _sees(key_mask, b, j, N_k, HAS_MASK)
                k = _keys(student, b, h, H, j, sees, d, IS_CENTRED_S)
                visible = _visible(i, j, sees, row_start, row_step, False, IS_CAUSAL)
                z = _scores(student, b, h, H, q, i, in_i, k, j, sees, visible, scale_s, bias_scale, False,
                            HAS_BIAS_S, True, IS_CENTRED_S, IS_WIDE, PRECISION, BLOCK_DS)  # fmt: skip
                place = local * strip_rows + (i - first_row)
                y, dlog = _of_mean(y_ptr, dlog_ptr, place, in_i, j, N_k, pitch, False)
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
                        k = _keys(student, b, h, H, j, sees, d_out, IS_CENTRED_S)
                    dz = _head_dz(z, m[:, None], l[:, None], y, dlog, c[:, None], part_top[:, None], inv_H)
                    dq, dq_top = _add_gradient(dq, dq_top, dz, k, PRECISION)
    if tl.program_id(1) == 0:
        tl.store(stats_ptr + 2 * rows_total + bh * N_q + i, c, mask=i < end)
        tl.store(stats_ptr + 3 * rows_total + bh * N_q + i, part_top, mask=i < end)
    if HAS_DQ:
        offs = (bh * N_q + i)[:, None] * student.D + d_out[None, :]
        mask = (i < end)[:, None] & (d_out < student.D)[None, :]
        dq = _restored(dq, dq_top, q.dtype != tl.float32) * dq_scale
        if IS_ADDED:
            dq += tl.load(dq_ptr + offs, mask=mask, other=0.0)
        tl.store(dq_ptr + offs, dq.to(dq_ptr.dtype.element_ty), mask=mask)
