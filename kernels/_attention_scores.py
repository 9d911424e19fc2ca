"""Scores of a tile: loads, centred keys, products, and which keys a query may see."""

import triton
import triton.language as tl

from ._attention_rows import NEVER, _base
from ._attention_tiles import UNSPECIALIZED

CENTRE_BLOCK = 128  # keys


@triton.jit
def _by_row(x, ARE_KEYS_FIRST: tl.constexpr):
    """A value per query, as it broadcasts over a tile of queries and keys, or of keys and queries."""
    if ARE_KEYS_FIRST:
        return x[None, :]
    else:  # noqa: RET505 (one of the two is compiled)
        return x[:, None]


@triton.jit
def _head(ptr, stride_b, stride_h, b, h):
    """A head of q or k, or that of a bias or of its rows' maxima."""
    return ptr + b * stride_b + h * stride_h


@triton.jit
def _load(head, stride_n, stride_d, i, mask, d, D):
    """Columns d of rows i of a head: (rows, d)."""
    rows = head + i.to(tl.int64) * stride_n
    return tl.load(rows[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _queries(network, b, h, i, in_i, d):
    q = _head(network.q, network.q_stride_b, network.q_stride_h, b, h)
    return _load(q, network.q_stride_n, network.q_stride_d, i, in_i, d, network.D)


@triton.jit
def _keys(network, b, h, H, j, sees, d, IS_CENTRED: tl.constexpr):
    """Load keys, under a softmax minus their mean: softmax is invariant to it, and this avoids cancellation."""
    k = _head(network.k, network.k_stride_b, network.k_stride_h, b, h)
    k = _load(k, network.k_stride_n, network.k_stride_d, j, sees, d, network.D)
    if IS_CENTRED:
        mean = tl.load(network.mean + (b * H + h) * network.D + d, mask=d < network.D, other=0.0)
        k = k.to(tl.float32) - mean[None, :]
    return k


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if a.dtype != b.dtype:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _product(network, b, h, H, q, i, in_i, k, j, sees, ARE_KEYS_FIRST: tl.constexpr, IS_CENTRED: tl.constexpr,
             IS_WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """q kᵀ, or k qᵀ, of loaded queries and keys; of a wide head piece by piece, which are loaded here."""
    M: tl.constexpr = k.shape[0] if ARE_KEYS_FIRST else q.shape[0]
    N: tl.constexpr = q.shape[0] if ARE_KEYS_FIRST else k.shape[0]
    z = tl.zeros((M, N), tl.float32)
    if IS_WIDE:
        for d0 in range(0, network.D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            q_d = _queries(network, b, h, i, in_i, d)
            k_d = _keys(network, b, h, H, j, sees, d, IS_CENTRED)
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
def _visible(i, j, sees, row_start, row_step, ARE_KEYS_FIRST: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Return whether query i attends to key j, of a tile; without causality, of every query."""
    sees = _by_row(sees, not ARE_KEYS_FIRST)
    if IS_CAUSAL:
        last = row_start + _by_row(i, ARE_KEYS_FIRST).to(tl.int64) * row_step
        sees = sees & (_by_row(j, not ARE_KEYS_FIRST) <= last)
    return sees


@triton.jit
def _scores(network, b, h, H, q, i, in_i, k, j, sees, visible, scale, bias_scale, ARE_KEYS_FIRST: tl.constexpr,
            HAS_BIAS: tl.constexpr, HAS_SOFTMAX: tl.constexpr, IS_CENTRED: tl.constexpr, IS_WIDE: tl.constexpr,
            PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Return z of a tile of a head, -inf where hidden. Under a softmax, a bias is used minus its row maximum."""
    z = _product(network, b, h, H, q, i, in_i, k, j, sees, ARE_KEYS_FIRST, IS_CENTRED, IS_WIDE, PRECISION, BLOCK_D)
    z = z * scale
    if HAS_BIAS:
        i, in_i = _by_row(i.to(tl.int64), ARE_KEYS_FIRST), _by_row(in_i, ARE_KEYS_FIRST)
        j, sees = _by_row(j.to(tl.int64), not ARE_KEYS_FIRST), _by_row(sees, not ARE_KEYS_FIRST)
        bias_ptr = _head(network.bias, network.bias_stride_b, network.bias_stride_h, b, h)
        offs = i * network.bias_stride_q + j * network.bias_stride_k
        bias = tl.load(bias_ptr + offs, mask=in_i & sees, other=0.0).to(tl.float32)
        if HAS_SOFTMAX:
            top_ptr = _head(network.top, network.top_stride_b, network.top_stride_h, b, h)
            top = tl.load(top_ptr + i * network.top_stride_q, mask=in_i, other=0.0).to(tl.float32)
            bias = bias - _base(top)
        # Kernels compare a score with a maximum that another kernel found: its bits are equal only if no compiler is
        # left to choose between one rounding and two.
        z = tl.fma(bias, bias_scale, z)
    return tl.where(visible, z, NEVER)


@triton.jit
def _sees(key_mask, b, j, N_k, HAS_MASK: tl.constexpr):
    """Return the keys that the mask, (pointer, strides of B and N_k), keeps."""
    if HAS_MASK:
        return tl.load(key_mask[0] + b * key_mask[1] + j.to(tl.int64) * key_mask[2], mask=j < N_k, other=0) != 0
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
    key_mask,  # (B, N_k) and strides, or None
    mean_ptr,  # (B, H, d)
    k_strides,
    H, N_k, D,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per head and piece of its width: the mean of the keys that the mask leaves."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    k_head = _head(k_ptr, k_strides[0], k_strides[1], b, h)
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = 0.0
    for j0 in range(0, N_k, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        sees = _sees(key_mask, b, j, N_k, HAS_MASK)
        total += tl.sum(_load(k_head, k_strides[2], k_strides[3], j, sees, d, D).to(tl.float32), 0)
        count += tl.sum(tl.where(sees, 1.0, 0.0), 0)
    tl.store(mean_ptr + bh * D + d, total / tl.maximum(count, 1.0), mask=d < D)
