"""Rows of the tokens: where they lie, their norms, and the difference of two maps at a tile."""

import triton
import triton.language as tl

from ._relation_tiles import UNSPECIALIZED


@triton.jit
def _of_layer(ptrs, layer):
    """Return one of a tuple of pointers."""
    ptr = ptrs[0]
    for k in tl.static_range(1, len(ptrs)):
        ptr = tl.where(layer == k, ptrs[k], ptr)
    return ptr


@triton.jit
def _drawn(index_ptr, layer, i, n, HAS_INDEX: tl.constexpr):
    """Return the row of a layer that is the i-th of its group."""
    row = i
    if HAS_INDEX:
        row = tl.load(index_ptr + layer * n + i, mask=i < n, other=0)
    return row


@triton.jit
def _row_pointers(ptr, group, i, run, stride_g, stride_o, stride_i):
    """Return pointers to rows stored in runs; `run` is None if a group is one run. The division has i's bits."""
    rows = ptr + group * stride_g
    if run is None:
        rows += i.to(tl.int64) * stride_i
    else:
        rows += (i // run).to(tl.int64) * stride_o + (i % run).to(tl.int64) * stride_i
    return rows


@triton.jit
def _load(rows, mask, d, D, stride_d):
    """Columns d of some rows: (rows, d)."""
    return tl.load(rows[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _products(a_rows, a_mask, b_rows, b_mask, D, stride_d, acc, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """acc + <a_i, b_j>"""
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = _load(a_rows, a_mask, k, D, stride_d)
        b = _load(b_rows, b_mask, k, D, stride_d)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _inverse_norms(ptr, i, mask, NORMALIZE: tl.constexpr):
    """1 for raw rows."""
    return tl.load(ptr + i, mask=mask, other=0.0) if NORMALIZE else tl.full(i.shape, 1.0, tl.float32)


@triton.jit
def _similarities(dot, r_i, r_j, in_i, in_j, NORMALIZE: tl.constexpr):
    """r_i r_j <x_i, x_j>. Where both networks are equal, so are the bits: the select, which changes nothing, keeps
    compilers from contracting one network's product with the difference of the two."""
    if NORMALIZE:
        dot = tl.where(in_i[:, None] & in_j[None, :], dot * r_i[:, None] * r_j[None, :], 0.0)
    return dot


@triton.jit
def _difference(map_s, map_t, RECTIFY_S: tl.constexpr, RECTIFY_T: tl.constexpr):
    """Return E, and E as the gradient sees it (clamped similarities of the student pass no gradient)."""
    if RECTIFY_T:
        map_t = tl.where(map_t < 0, 0.0, map_t)  # keeps NaN, unlike maximum
    if RECTIFY_S:
        e = tl.where(map_s < 0, 0.0, map_s) - map_t
        e_grad = tl.where(map_s < 0, 0.0, e)
    else:
        e = map_s - map_t
        e_grad = e
    return e, e_grad


@triton.jit
def _store_terms(ptr, term, w, TERMS: tl.constexpr):
    high = w.to(ptr.dtype.element_ty)
    tl.store(ptr, high)
    if TERMS == 2:
        tl.store(ptr + term, (w - high.to(tl.float32)).to(ptr.dtype.element_ty))


@triton.jit
def _row_norms(x_ptr, out_ptr, row, i, G, n, run, D, stride_g, stride_o, stride_i, stride_d, eps, INVERT: tl.constexpr,
               BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    mask = row < G.to(tl.int64) * n
    rows = _row_pointers(x_ptr, row // n, i, run, stride_g, stride_o, stride_i)
    squares = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        x = _load(rows, mask, k0 + tl.arange(0, BLOCK_K), D, stride_d).to(tl.float32)
        squares += x * x
    norm = tl.sqrt_rn(tl.sum(squares, 1))
    if INVERT:
        short = norm <= eps
        norm = tl.where(short, 0.0, 1.0 / tl.where(short, 1.0, norm))
    tl.store(out_ptr + row, norm, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_norms_kernel(
    s_ptr,  # layers of (B, N, Ds)
    t_ptr,  # layers of (B, N, Dt)
    index_ptr,  # (layers, n); unused unless HAS_INDEX
    norms_ptr,  # (2, layers, G, n): of s, of t; their inverses if INVERT
    stride_sg, stride_so, stride_si, stride_sd,
    stride_tg, stride_to, stride_ti, stride_td,
    total, n, G, run, Ds, Dt, eps,
    HAS_INDEX: tl.constexpr,
    INVERT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_R rows of a layer's student or teacher."""
    layer = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = _drawn(index_ptr, layer, row % n, n, HAS_INDEX)
    out = norms_ptr + layer * G * n
    if tl.program_id(1) == 0:
        _row_norms(_of_layer(s_ptr, layer), out, row, i, G, n, run, Ds, stride_sg, stride_so, stride_si, stride_sd, eps,
                   INVERT, BLOCK_R, BLOCK_K)  # fmt: skip
    else:
        _row_norms(_of_layer(t_ptr, layer), out + total, row, i, G, n, run, Dt, stride_tg, stride_to, stride_ti,
                   stride_td, eps, INVERT, BLOCK_R, BLOCK_K)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_sum_kernel(
    partial_ptr,  # (layers, count)
    loss_ptr,  # (layers,)
    count,
    stride_l,
    scale,
    BLOCK: tl.constexpr,
):
    """One program per layer: the partial losses' sum in float64, in a fixed order."""
    layer = tl.program_id(0).to(tl.int64)
    partial_ptr += layer * count
    total = tl.zeros((BLOCK,), tl.float64)
    for i0 in range(0, count, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + i, mask=i < count, other=0.0).to(tl.float64)
    tl.store(loss_ptr + layer * stride_l, (tl.sum(total, 0) * scale).to(tl.float32))
