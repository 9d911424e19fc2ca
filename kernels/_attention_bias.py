"""The kernel of the bias gradient."""

import triton
import triton.language as tl

from ._attention_match import _match_dz
from ._attention_mean import _mean_dz
from ._attention_rows import _row_weights
from ._attention_scores import _keys, _queries, _scores, _sees, _visible
from ._attention_tiles import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bias_kernel(  # noqa: C901 (branches on constants, of which one is compiled)
    student, teacher,  # Operands
    key_mask,  # (B, N_k) and strides, or None
    weight,  # (B, H, N_q) and strides, or None
    stats_ptr,  # (6, B, H, N_q): m_s, l_s (0: no gradient), m_t, l_s / l_t - 1, c, v_top
    y_ptr, dlog_ptr,  # (images, strip_rows, pitch): the mean p or its log2, gradient by its log; unused unless IS_MEAN
    partial_ptr,  # (splits, B | 1, H | 1, N_q | 1, N_k | 1): added to
    H, N_q, N_k, rows_total, row_start, row_step, first_b, first_row, strip_rows, pitch,
    B_bias, H_bias, q_tiles, k_tiles, steps, per_split, bias_numel,
    scale_s, scale_t, bias_scale, dbias_scale, factor, inv_keys, inv_H,
    DIVERGENCE: tl.constexpr, IS_MEAN: tl.constexpr, HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_CENTRED_S: tl.constexpr, IS_CENTRED_T: tl.constexpr, IS_WIDE: tl.constexpr,
    SUM_B: tl.constexpr, SUM_H: tl.constexpr, SUM_Q: tl.constexpr, SUM_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DS: tl.constexpr, BLOCK_DT: tl.constexpr,
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
        w = _row_weights(weight, b, h, i, i < end, factor, HAS_WEIGHT)
        in_i = (i < end) & (w != 0)
        sees = _sees(key_mask, b, j, N_k, HAS_MASK)
        visible = _visible(i, j, sees, row_start, row_step, False, IS_CAUSAL)
        q_s, k_s = _queries(student, b, h, i, in_i, d_s), _keys(student, b, h, H, j, sees, d_s, IS_CENTRED_S)
        z_s = _scores(student, b, h, H, q_s, i, in_i, k_s, j, sees, visible, scale_s, bias_scale, False,
                      HAS_BIAS_S, HAS_SOFTMAX, IS_CENTRED_S, IS_WIDE, PRECISION, BLOCK_DS)  # fmt: skip
        row = bh * N_q + i
        if IS_MEAN:
            place = local * strip_rows + (i - first_row)
            total += _mean_dz(z_s, stats_ptr, y_ptr, dlog_ptr, place, row, in_i, j, N_k, rows_total, pitch, inv_H,
                              False)  # fmt: skip
        else:
            q_t, k_t = _queries(teacher, b, h, i, in_i, d_t), _keys(teacher, b, h, H, j, sees, d_t, IS_CENTRED_T)
            z_t = _scores(teacher, b, h, H, q_t, i, in_i, k_t, j, sees, visible, scale_t, bias_scale, False,
                          HAS_BIAS_T, HAS_SOFTMAX, IS_CENTRED_T, IS_WIDE, PRECISION, BLOCK_DT)  # fmt: skip
            total += _match_dz(z_s, z_t, w, stats_ptr, row, in_i, rows_total, inv_keys, False, DIVERGENCE)

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
