"""The kernel that computes every score once: loss and both gradients of heads whose keys fit on chip."""

import triton
import triton.language as tl

from ._attention_rows import _add_gradient, _half, _half_scale, _restored, _row_weights, _whole_rows
from ._attention_scores import _keys, _queries, _scores, _sees, _visible
from ._attention_tiles import UNSPECIALIZED


@triton.jit
def _query_gradient(dz, k, factors, IS_FLOAT16: tl.constexpr, PRECISION: tl.constexpr):
    """kᵀ dz, of keys down and rows across: dq with its rows across. k and factors are from _half; dz is rounded as
    _add_product has it, but both terms are columns of one product: the first of two would be computed by all warps."""
    if k.dtype == tl.float32:
        return tl.dot(tl.trans(k), dz, input_precision=PRECISION)
    dz = dz * factors[:, None]
    scale, unit = _half_scale(tl.max(tl.abs(dz), 0))
    dz = dz * scale[None, :]
    high = dz.to(tl.float16)
    if IS_FLOAT16:
        low = (dz - high.to(tl.float32)).to(tl.float16)
        both = tl.dot(tl.trans(k), tl.join(high, low).reshape(dz.shape[0], 2 * dz.shape[1]))
        out = tl.sum(both.reshape(k.shape[1], dz.shape[1], 2), 2)
    else:
        out = tl.dot(tl.trans(k), high)
    return out * unit[None, :]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_fused_kernel(
    student, teacher,  # Operands
    key_mask,  # (B, N_k) and strides, or None
    weight,  # (B, H, N_q) and strides, or None
    loss_ptr,  # (B, H, N_q)
    dq_ptr,  # (B, H, N_q, d)
    dk_ptr,  # (B, H, N_k, d)
    H, N_q, N_k, row_start, row_step,
    scale_s, scale_t, bias_scale, dq_scale, dk_scale, factor, inv_keys,
    DIVERGENCE: tl.constexpr, HAS_BIAS_S: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_DQ: tl.constexpr, HAS_DK: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DS: tl.constexpr, BLOCK_DT: tl.constexpr,
):  # fmt: skip
    """One program per head: losses and both gradients, all keys against strips of queries. A score is formed once."""
    HAS_SOFTMAX: tl.constexpr = DIVERGENCE != "score_mse"
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    j = tl.arange(0, BLOCK_N)
    sees = _sees(key_mask, b, j, N_k, HAS_MASK)
    d_s, d_t = tl.arange(0, BLOCK_DS), tl.arange(0, BLOCK_DT)
    k_s = _keys(student, b, h, H, j, sees, d_s, False)
    k_t = _keys(teacher, b, h, H, j, sees, d_t, False)
    dk = tl.zeros((BLOCK_N, BLOCK_DS), tl.float32)
    dk_top = tl.zeros((BLOCK_N, 1), tl.float32)
    half, factors = _half(k_s)
    IS_HALF: tl.constexpr = k_s.dtype != tl.float32
    for i0 in range(0, N_q, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        w = _row_weights(weight, b, h, i, i < N_q, factor, HAS_WEIGHT)
        in_i = (i < N_q) & (w != 0)
        visible = _visible(i, j, sees, row_start, row_step, True, IS_CAUSAL)
        q_s = _queries(student, b, h, i, in_i, d_s)
        q_t = _queries(teacher, b, h, i, in_i, d_t)
        z_s = _scores(student, b, h, H, q_s, i, in_i, k_s, j, sees, visible, scale_s, bias_scale, True,
                      HAS_BIAS_S, HAS_SOFTMAX, False, False, PRECISION, BLOCK_DS)  # fmt: skip
        z_t = _scores(teacher, b, h, H, q_t, i, in_i, k_t, j, sees, visible, scale_t, bias_scale, True,
                      HAS_BIAS_T, HAS_SOFTMAX, False, False, PRECISION, BLOCK_DT)  # fmt: skip
        loss, dz = _whole_rows(z_s, z_t, w, inv_keys, DIVERGENCE)
        tl.store(loss_ptr + bh * N_q + i, loss, mask=i < N_q)
        if HAS_DK:
            dk, dk_top = _add_gradient(dk, dk_top, dz, q_s, PRECISION)
        if HAS_DQ:
            dq = _query_gradient(dz, half, factors, k_s.dtype == tl.float16, PRECISION) * dq_scale
            offs = (bh * N_q + i)[None, :] * student.D + d_s[:, None]
            mask = (i < N_q)[None, :] & (d_s < student.D)[:, None]
            tl.store(dq_ptr + offs, dq.to(dq_ptr.dtype.element_ty), mask=mask)
    if HAS_DK:
        dk = _restored(dk, dk_top, IS_HALF)
        offs = (bh * N_k + j)[:, None] * student.D + d_s[None, :]
        mask = (j < N_k)[:, None] & (d_s < student.D)[None, :]
        tl.store(dk_ptr + offs, (dk * dk_scale).to(dk_ptr.dtype.element_ty), mask=mask)
