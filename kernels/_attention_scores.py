"""Scores of a tile: loads, centred keys, products, and which keys a query may see."""

import triton
import triton.language as tl

from ._attention_rows import NEVER, _base
from ._attention_tiles import UNSPECIALIZED

CENTRE_BLOCK = 128  # keys


@triton.jit
def _head_rows(ptr, i, stride_n):
    return ptr + i.to(tl.int64) * stride_n


@triton.jit
def _load(rows, mask, d, D, stride_d):
    """Columns d of some rows: (rows, d)."""
    return tl.load(rows[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _load_keys(rows, mask, d, D, stride_d, mean_ptr, IS_CENTRED: tl.constexpr):
    """Load keys, under a softmax minus their mean: softmax is invariant to it, and this avoids cancellation."""
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
    """Return whether query i attends to key j; i, j and sees broadcast to a tile."""
    if IS_CAUSAL:
        sees = sees & (j <= row_start + i.to(tl.int64) * row_step)
    return sees


@triton.jit
def _finish_scores(z, scale, i, in_i, j, sees, visible, bias_ptr, stride_bq, stride_bk, top_ptr, stride_top,
                   bias_scale, HAS_BIAS: tl.constexpr, HAS_SOFTMAX: tl.constexpr):  # fmt: skip
    """Return z of a tile, -inf where hidden. Under a softmax, a bias is used minus its row maximum."""
    z = z * scale
    if HAS_BIAS:
        offs = i.to(tl.int64) * stride_bq + j.to(tl.int64) * stride_bk
        bias = tl.load(bias_ptr + offs, mask=in_i & sees, other=0.0).to(tl.float32)
        if HAS_SOFTMAX:
            top = tl.load(top_ptr + i.to(tl.int64) * stride_top, mask=in_i, other=0.0).to(tl.float32)
            bias = bias - _base(top)
        # Kernels compare a score with a maximum that another kernel found: its bits are equal only if no compiler is
        # left to choose between one rounding and two.
        z = tl.fma(bias, bias_scale, z)
    return tl.where(visible, z, NEVER)


@triton.jit
def _sees(mask_ptr, j, N_k, stride_mn, HAS_MASK: tl.constexpr):
    """Return the keys that the mask keeps."""
    if HAS_MASK:
        return tl.load(mask_ptr + j.to(tl.int64) * stride_mn, mask=j < N_k, other=0) != 0
    return j < N_k


@triton.jit
def _keys_seen(i_last, N_k, row_start, row_step, IS_CAUSAL: tl.constexpr):
    """Return the maximum number of keys that rows up to i_last attend to."""
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
