"""Rows of the tokens: where they lie, their norms, and the scales at which float16 holds them."""

import triton
import triton.language as tl

from ._common import of_layer
from ._relation_tiles import UNSPECIALIZED


@triton.jit
def _drawn(index_ptr, layer, i, n):
    """Return the row of a layer that is the i-th of its group: of its own draw, or i where there is none."""
    return i if index_ptr is None else tl.load(of_layer(index_ptr, layer) + i, mask=i < n, other=0)


@triton.jit
def _row_pointers(ptr, group, i, run, strides):
    """Return pointers to rows stored in runs, from the strides of group, run, row in a run and column; `run` is None if
    a group is one run. The division has i's bits."""
    rows = ptr + group * strides[0]
    if run is None:
        rows += i.to(tl.int64) * strides[2]
    else:
        rows += (i // run).to(tl.int64) * strides[1] + (i % run).to(tl.int64) * strides[2]
    return rows


@triton.jit
def _load(rows, mask, d, D, stride_d):
    """Columns d of some rows: (rows, d)."""
    return tl.load(rows[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _inverse_norms(ptr, group, row, strides, mask):
    """Return r of rows, which are stored by token: strides of group and row."""
    return tl.load(ptr + group * strides[0] + row.to(tl.int64) * strides[1], mask=mask, other=0.0)


@triton.jit
def _scales(r, NORMALIZE: tl.constexpr):
    """(c, m) of rows x: c is 2**12 times the power of two below r, so that float16 holds c x; m c is r, or 1 of raw
    rows. Both products are exact."""
    bits = r.to(tl.int32, bitcast=True)
    exponent = bits & 0x7F800000
    c = exponent.to(tl.float32, bitcast=True) * 4096.0
    if NORMALIZE:
        m = ((bits & 0x007FFFFF) | 0x39800000).to(tl.float32, bitcast=True)  # from 2**-12 to 2**-11
    else:
        m = (0x7F000000 - exponent).to(tl.float32, bitcast=True) * (1.0 / 4096.0)
    return c, tl.where(r == 0, 0.0, m)


@triton.jit
def _terms(x):
    """Return two float16 numbers whose sum is x to 22 bits."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _products(a_rows, a_mask, a_scale, b_rows, b_mask, b_scale, D, stride_d, acc, BLOCK_K: tl.constexpr):
    """acc + <a_i, b_j>; of float32 rows acc + <c_i a_i, c_j b_j>, in three products of two terms each: the fourth is
    below 2**-22 of the sum of |c_i a_i c_j b_j|."""
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = _load(a_rows, a_mask, k, D, stride_d)
        b = _load(b_rows, b_mask, k, D, stride_d)
        if a.dtype == tl.float32:
            a_high, a_low = _terms(a * a_scale[:, None])
            b_high, b_low = _terms(b * b_scale[:, None])
            acc = tl.dot(a_low, tl.trans(b_high), acc)
            acc = tl.dot(a_high, tl.trans(b_low), acc)
            acc = tl.dot(a_high, tl.trans(b_high), acc)
        else:
            acc = tl.dot(a, tl.trans(b), acc)
    return acc


@triton.jit
def _norms(ptr, row, at, mask, group, run, D, strides, out, eps, NORMALIZE: tl.constexpr, BLOCK_R: tl.constexpr,
           BLOCK_K: tl.constexpr):  # fmt: skip
    """Store r of rows at out, and return it: of raw rows the inverse of the largest |x|, which is their scale."""
    rows = _row_pointers(ptr, group, row, run, strides)
    squares = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    far = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)  # of numbers whose squares are beyond float32
    for k0 in range(0, D, BLOCK_K):
        x = _load(rows, mask, k0 + tl.arange(0, BLOCK_K), D, strides[3]).to(tl.float32)
        if NORMALIZE:
            squares += x * x
            small = x * 5.421010862427522e-20  # 2**-64
            far += small * small
        else:
            squares = tl.maximum(squares, tl.abs(x))
    if NORMALIZE:
        square = tl.sum(squares, 1)
        far_norm = tl.minimum(tl.sqrt_rn(tl.sum(far, 1)) * 1.8446744073709552e19, 8.5e37)
        norm = tl.where(square == float("inf"), far_norm, tl.sqrt_rn(square))
    else:
        norm = tl.minimum(tl.maximum(tl.max(squares, 1), 7.9e-31), 8.5e37)
        eps = 0.0
    short = norm <= eps
    r = tl.where(short, 0.0, 1.0 / tl.where(short, 1.0, norm))
    tl.store(out + at, r, mask=mask)
    return r


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_norms_kernel(
    s_ptr,  # layers of (B, N, Ds)
    t_ptr,  # layers of (B, N, Dt)
    norms_ptr,  # (2, layers, tokens): r of s, of t
    s_strides,  # of tokens as one group in runs of an image
    t_strides,
    total, tokens, run, Ds, Dt, eps,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_R tokens of a layer's student or teacher."""
    layer = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = row < tokens
    out = norms_ptr + layer * tokens
    if tl.program_id(1) == 0:
        _norms(of_layer(s_ptr, layer), row, row, mask, 0, run, Ds, s_strides, out, eps, NORMALIZE, BLOCK_R, BLOCK_K)
    else:
        _norms(of_layer(t_ptr, layer), row, row, mask, 0, run, Dt, t_strides, out + total, eps, NORMALIZE, BLOCK_R,
               BLOCK_K)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_sum_kernel(
    partial_ptr,  # terms of (count,)
    terms_ptr,  # (terms,), or None
    loss_ptr,  # their weighted sum
    counts, scales, weights,  # terms
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: each term's partial losses are summed in float64, in a fixed order. ADD: to what is there."""
    loss = tl.zeros((), tl.float64)
    for term in tl.static_range(len(counts)):
        total = tl.zeros((BLOCK,), tl.float64)
        for i0 in range(0, counts[term], BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            total += tl.load(partial_ptr[term] + i, mask=i < counts[term], other=0.0).to(tl.float64)
        mean = tl.sum(total, 0) * scales[term]
        mean = tl.where(mean < 0, 0.0, mean)  # rounding can take a difference of Grams there; NaN stays
        loss += mean * weights[term]
        if terms_ptr is not None:
            if ADD:
                mean += tl.load(terms_ptr + term)
            tl.store(terms_ptr + term, mean.to(tl.float32))
    if ADD:
        loss += tl.load(loss_ptr)
    tl.store(loss_ptr, loss.to(tl.float32))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_scale_kernel(
    d_ptr,  # layers of (elements,)
    by_ptr,  # a number
    out_ptr,  # layers of (elements,)
    elements,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK elements of a layer: its stored gradient times the incoming one, rounded once."""
    layer = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(of_layer(d_ptr, layer) + i, mask=i < elements, other=0.0).to(tl.float32) * tl.load(by_ptr)
    out = of_layer(out_ptr, layer) + i
    tl.store(out, d.to(out.dtype.element_ty), mask=i < elements)
