"""Kernels that form the maps, apply them to rows, or do both at once."""

import triton
import triton.language as tl

from ._relation_rows import (
    _difference,
    _drawn,
    _inverse_norms,
    _load,
    _of_layer,
    _products,
    _row_pointers,
    _similarities,
    _store_terms,
)
from ._relation_tiles import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_map_kernel(
    s_ptr,  # layers of (B, N, Ds)
    t_ptr,  # layers of (B, N, Dt)
    index_ptr,  # (layers, n); unused unless HAS_INDEX
    norms_ptr,  # (2, layers, G, n), inverse; unused unless NORMALIZE
    scale_ptr,  # (layers, G), of a float16 W; unused unless HAS_SCALE
    partial_ptr,  # (groups * tiles,)
    w_ptr,  # (TERMS, groups, rows, pitch)
    along_ptr,  # (groups, column tiles, n): Σ_j W_ij <s_i, s_j> of a tile
    stride_sg, stride_so, stride_si, stride_sd,
    stride_tg, stride_to, stride_ti, stride_td,
    total, n, G, run, Ds, Dt,
    first_group, first_tile, tiles, pitch, stride_wg, term,
    HAS_INDEX: tl.constexpr,
    IS_TRIANGLE: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RECTIFY_S: tl.constexpr,
    RECTIFY_T: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per tile of a group's map: of its upper triangle, W mirrored, or of a strip of its rows."""
    local = (tl.program_id(0) // tiles).to(tl.int64)
    group = first_group + local
    tile = tl.program_id(0) % tiles
    columns = tl.cdiv(n, BLOCK_M)
    if IS_TRIANGLE:
        # Rows a and columns - 1 - a of the triangle make one row of a rectangle.
        odd = columns % 2
        width = columns + 1 - odd
        a, b = tile // width, tile % width
        upper = b + odd > a
        tile_i = tl.where(upper, a, columns - 1 + odd - a)
        tile_j = tl.where(upper, b - 1 + odd, columns - 1 - b)
    else:
        tile_i, tile_j = first_tile + tile // columns, tile % columns
    i = tile_i * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_j * BLOCK_M + tl.arange(0, BLOCK_M)
    in_i, in_j = i < n, j < n

    # Rows past the last are loaded as zeros, whose similarities are 0 in both networks.
    zero = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    layer, g = group // G, group % G
    s, t = _of_layer(s_ptr, layer), _of_layer(t_ptr, layer)
    row_i, row_j = _drawn(index_ptr, layer, i, n, HAS_INDEX), _drawn(index_ptr, layer, j, n, HAS_INDEX)
    s_i = _row_pointers(s, g, row_i, run, stride_sg, stride_so, stride_si)
    s_j = _row_pointers(s, g, row_j, run, stride_sg, stride_so, stride_si)
    t_i = _row_pointers(t, g, row_i, run, stride_tg, stride_to, stride_ti)
    t_j = _row_pointers(t, g, row_j, run, stride_tg, stride_to, stride_ti)
    # The teacher comes first and is scaled at once, which frees its norms' registers before the student's products.
    map_t = _products(t_i, in_i, t_j, in_j, Dt, stride_td, zero, BLOCK_K, PRECISION)
    r, q = norms_ptr + group * n, norms_ptr + total + group * n
    q_i, q_j = _inverse_norms(q, i, in_i, NORMALIZE), _inverse_norms(q, j, in_j, NORMALIZE)
    map_t = _similarities(map_t, q_i, q_j, in_i, in_j, NORMALIZE)
    dot_s = _products(s_i, in_i, s_j, in_j, Ds, stride_sd, zero, BLOCK_K, PRECISION)
    r_i, r_j = _inverse_norms(r, i, in_i, NORMALIZE), _inverse_norms(r, j, in_j, NORMALIZE)
    map_s = _similarities(dot_s, r_i, r_j, in_i, in_j, NORMALIZE)
    e, e_grad = _difference(map_s, map_t, RECTIFY_S, RECTIFY_T)

    square = tl.sum(e * e)  # at once: Triton 3.6 fails on nested sums over tensor memory
    if IS_TRIANGLE:
        square = tl.where(tile_i == tile_j, square, 2 * square)
    tl.store(partial_ptr + tl.program_id(0), square)

    if HAS_GRAD:
        scale = tl.load(scale_ptr + group) if HAS_SCALE else 1.0
        mirrored = IS_TRIANGLE and tile_i != tile_j
        if NORMALIZE:
            along = along_ptr + local * columns * n
            x = e_grad * dot_s
            tl.store(along + tile_j.to(tl.int64) * n + i, tl.sum(x * r_j[None, :], 1), mask=in_i)
            if mirrored:
                tl.store(along + tile_i.to(tl.int64) * n + j, tl.sum(x * r_i[:, None], 0), mask=in_j)
        w_tile = w_ptr + local * stride_wg
        i_w = (i - first_tile * BLOCK_M).to(tl.int64)
        _store_terms(w_tile + i_w[:, None] * pitch + j[None, :], term, e_grad * (r_j * scale)[None, :], TERMS)
        if mirrored:
            w = tl.trans(e_grad * (r_i * scale)[:, None])
            _store_terms(w_tile + j.to(tl.int64)[:, None] * pitch + i[None, :], term, w, TERMS)


@triton.jit
def _store_gradient(u, along, rows, out, mask, d, D, stride_d, stride_dd, r_i, factor, IS_USED: tl.constexpr,
                    NORMALIZE: tl.constexpr, IS_ADDED: tl.constexpr):  # fmt: skip
    """factor r_i (u - s_i r_i² along) on columns d, or factor u of raw rows."""
    if IS_USED:
        if NORMALIZE:
            s = _load(rows, mask, d, D, stride_d).to(tl.float32)
            u = r_i[:, None] * (u - s * (r_i * r_i * along)[:, None])
        u = u * factor
        if IS_ADDED:
            u += _load(out, mask, d, D, stride_dd).to(tl.float32)
        out = out[:, None] + d.to(tl.int64)[None, :] * stride_dd
        tl.store(out, u.to(out.dtype.element_ty), mask=mask[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_apply_kernel(
    w_ptr,  # (TERMS, groups, rows, pitch)
    along_ptr,  # (groups, column tiles, n)
    s_ptr,  # layers of (B, N, Ds)
    index_ptr,  # (layers, n); unused unless HAS_INDEX
    norms_ptr,  # (2, layers, G, n), inverse; unused unless NORMALIZE
    scale_ptr,  # (layers, G); unused unless HAS_SCALE
    ds_ptr,  # layers of (B, N, Ds), or of (1, n, Ds) of drawn rows
    stride_sg, stride_so, stride_si, stride_sd,
    stride_dg, stride_do, stride_di, stride_dd,
    n, G, run, Ds,
    first_group, first_row, row_tiles, columns, pitch, stride_wg, term, factor,
    HAS_INDEX: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    IS_ADDED: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows of a strip of W and of columns of the student; those of the same rows run together,
    so that W comes from memory once."""
    pieces = tl.cdiv(Ds, BLOCK_D)
    tile = tl.program_id(0) // pieces
    local = (tile // row_tiles).to(tl.int64)
    group = first_group + local
    i_w = tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    i = first_row + i_w
    d = tl.program_id(0) % pieces * BLOCK_D + tl.arange(0, BLOCK_D)
    u = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    layer, g = group // G, group % G
    s = _of_layer(s_ptr, layer)
    w_rows = w_ptr + local * stride_wg + i_w.to(tl.int64)[:, None] * pitch
    for j0 in range(0, n, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        row_j = _drawn(index_ptr, layer, j, n, HAS_INDEX)
        s_j = _load(_row_pointers(s, g, row_j, run, stride_sg, stride_so, stride_si), j < n, d, Ds, stride_sd)
        u = tl.dot(tl.load(w_rows + j[None, :]), s_j, u, input_precision=PRECISION)
        if TERMS == 2:
            u = tl.dot(tl.load(w_rows + term + j[None, :]), s_j, u, input_precision=PRECISION)

    mask = i < n
    if HAS_SCALE:
        factor = factor / tl.load(scale_ptr + group)
    r_i = _inverse_norms(norms_ptr + group * n, i, mask, NORMALIZE)
    along = tl.zeros((BLOCK_M,), tl.float32)
    if NORMALIZE:
        for column in range(columns):
            along += tl.load(along_ptr + (local * columns + column) * n + i, mask=mask, other=0.0)
        if HAS_SCALE:
            along = along * tl.load(scale_ptr + group)
    row_i = _drawn(index_ptr, layer, i, n, HAS_INDEX)
    s_i = _row_pointers(s, g, row_i, run, stride_sg, stride_so, stride_si)
    out = _row_pointers(_of_layer(ds_ptr, layer), g, i, run, stride_dg, stride_do, stride_di)
    _store_gradient(u, along, s_i, out, mask, d, Ds, stride_sd, stride_dd, r_i, factor, True, NORMALIZE, IS_ADDED)


@triton.jit
def _add_products(u, high, low, rows, mask, d, D, stride_d, IS_USED: tl.constexpr, TERMS: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """u + W S on columns d of S."""
    if IS_USED:
        s = _load(rows, mask, d, D, stride_d)
        u = tl.dot(high, s, u, input_precision=PRECISION)
        if TERMS == 2:
            u = tl.dot(low, s, u, input_precision=PRECISION)
    return u


@triton.jit
def _along(along, u, rows, mask, d, D, stride_d, IS_USED: tl.constexpr):
    """along + <s_i, u_i> on columns d."""
    if IS_USED:
        along += tl.sum(u * _load(rows, mask, d, D, stride_d).to(tl.float32), 1)
    return along


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_fused_kernel(
    s_ptr,  # layers of (B, N, Ds)
    t_ptr,  # layers of (B, N, Dt)
    index_ptr,  # (layers, n); unused unless HAS_INDEX
    norms_ptr,  # (2, layers, G, n), inverse; unused unless NORMALIZE
    scale_ptr,  # (layers, G); unused unless HAS_SCALE
    partial_ptr,  # (layers * G * strips,)
    ds_ptr,  # layers of (B, N, Ds), or of (1, n, Ds) of drawn rows
    stride_sg, stride_so, stride_si, stride_sd,
    stride_tg, stride_to, stride_ti, stride_td,
    stride_dg, stride_do, stride_di, stride_dd,
    total, n, G, run, Ds, Dt, strips, factor,
    HAS_INDEX: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RECTIFY_S: tl.constexpr,
    RECTIFY_T: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    IS_ADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per strip of rows of a group's map: its loss and its rows of the gradient."""
    group = (tl.program_id(0) // strips).to(tl.int64)
    i = tl.program_id(0) % strips * BLOCK_M + tl.arange(0, BLOCK_M)
    in_i = i < n
    layer, g = group // G, group % G
    s, t = _of_layer(s_ptr, layer), _of_layer(t_ptr, layer)
    row_i = _drawn(index_ptr, layer, i, n, HAS_INDEX)
    s_i = _row_pointers(s, g, row_i, run, stride_sg, stride_so, stride_si)
    t_i = _row_pointers(t, g, row_i, run, stride_tg, stride_to, stride_ti)
    r, q = norms_ptr + group * n, norms_ptr + total + group * n
    r_i, q_i = _inverse_norms(r, i, in_i, NORMALIZE), _inverse_norms(q, i, in_i, NORMALIZE)
    scale = tl.load(scale_ptr + group) if HAS_SCALE else 1.0
    d = tl.arange(0, BLOCK_D)
    square = tl.zeros((BLOCK_M,), tl.float32)
    u0 = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    u1, u2, u3 = u0, u0, u0

    for j0 in range(0, n, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        in_j = j < n
        row_j = _drawn(index_ptr, layer, j, n, HAS_INDEX)
        s_j = _row_pointers(s, g, row_j, run, stride_sg, stride_so, stride_si)
        t_j = _row_pointers(t, g, row_j, run, stride_tg, stride_to, stride_ti)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        map_t = _products(t_i, in_i, t_j, in_j, Dt, stride_td, zero, BLOCK_K, PRECISION)
        map_t = _similarities(map_t, q_i, _inverse_norms(q, j, in_j, NORMALIZE), in_i, in_j, NORMALIZE)
        dot_s = _products(s_i, in_i, s_j, in_j, Ds, stride_sd, zero, BLOCK_K, PRECISION)
        r_j = _inverse_norms(r, j, in_j, NORMALIZE)
        map_s = _similarities(dot_s, r_i, r_j, in_i, in_j, NORMALIZE)
        e, e_grad = _difference(map_s, map_t, RECTIFY_S, RECTIFY_T)
        square += tl.sum(e * e, 1)
        w = e_grad * (r_j * scale)[None, :]
        high = w.to(s.dtype.element_ty)
        low = (w - high.to(tl.float32)).to(s.dtype.element_ty)
        u0 = _add_products(u0, high, low, s_j, in_j, d + 0 * BLOCK_D, Ds, stride_sd, CHUNKS > 0, TERMS, PRECISION)
        u1 = _add_products(u1, high, low, s_j, in_j, d + 1 * BLOCK_D, Ds, stride_sd, CHUNKS > 1, TERMS, PRECISION)
        u2 = _add_products(u2, high, low, s_j, in_j, d + 2 * BLOCK_D, Ds, stride_sd, CHUNKS > 2, TERMS, PRECISION)
        u3 = _add_products(u3, high, low, s_j, in_j, d + 3 * BLOCK_D, Ds, stride_sd, CHUNKS > 3, TERMS, PRECISION)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(square, 0))

    factor = factor / scale
    along = tl.zeros((BLOCK_M,), tl.float32)
    if NORMALIZE:
        along = _along(along, u0, s_i, in_i, d + 0 * BLOCK_D, Ds, stride_sd, CHUNKS > 0)
        along = _along(along, u1, s_i, in_i, d + 1 * BLOCK_D, Ds, stride_sd, CHUNKS > 1)
        along = _along(along, u2, s_i, in_i, d + 2 * BLOCK_D, Ds, stride_sd, CHUNKS > 2)
        along = _along(along, u3, s_i, in_i, d + 3 * BLOCK_D, Ds, stride_sd, CHUNKS > 3)
    out = _row_pointers(_of_layer(ds_ptr, layer), g, i, run, stride_dg, stride_do, stride_di)
    _store_gradient(u0, along, s_i, out, in_i, d + 0 * BLOCK_D, Ds, stride_sd, stride_dd, r_i, factor,
                    CHUNKS > 0, NORMALIZE, IS_ADDED)  # fmt: skip
    _store_gradient(u1, along, s_i, out, in_i, d + 1 * BLOCK_D, Ds, stride_sd, stride_dd, r_i, factor,
                    CHUNKS > 1, NORMALIZE, IS_ADDED)  # fmt: skip
    _store_gradient(u2, along, s_i, out, in_i, d + 2 * BLOCK_D, Ds, stride_sd, stride_dd, r_i, factor,
                    CHUNKS > 2, NORMALIZE, IS_ADDED)  # fmt: skip
    _store_gradient(u3, along, s_i, out, in_i, d + 3 * BLOCK_D, Ds, stride_sd, stride_dd, r_i, factor,
                    CHUNKS > 3, NORMALIZE, IS_ADDED)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_scatter_kernel(
    d_ptr,  # (layers, K, D)
    index_ptr,  # (layers, K)
    out_ptr,  # layers of (B, N, D), contiguous
    K, D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per drawn row and piece of its width: adds all draws of that row, by the first of them."""
    k, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index = index_ptr + layer * K
    row = tl.load(index + k)
    others = tl.arange(0, BLOCK_K)
    earlier = 0
    for k0 in range(0, k, BLOCK_K):
        earlier += tl.sum((tl.load(index + k0 + others, mask=k0 + others < k, other=-1) == row).to(tl.int32))
    if earlier == 0:
        d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_D,), tl.float32)
        for k0 in range(k, K, BLOCK_K):
            same = tl.load(index + k0 + others, mask=k0 + others < K, other=-1) == row
            at = (layer * K + k0 + others)[:, None] * D + d[None, :]
            total += tl.sum(tl.load(d_ptr + at, mask=same[:, None] & (d < D)[None, :], other=0.0), 0)
        out = _of_layer(out_ptr, layer) + row * D + d
        tl.store(out, tl.load(out, mask=d < D, other=0.0) + total, mask=d < D)
