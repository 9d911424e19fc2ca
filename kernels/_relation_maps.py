"""Kernels of long groups, whose maps are formed in one launch and applied to rows in another; and of drawn rows."""

import triton
import triton.language as tl

from ._common import of_layer
from ._relation_rows import (
    _drawn,
    _inverse_norms,
    _load,
    _products,
    _row_pointers,
    _scales,
    _terms,
)
from ._relation_tiles import UNSPECIALIZED

W_SCALE = tl.constexpr(2.0**25)  # of a W of unit rows, which is below 2**-10 (|E| <= 2): so small ones keep digits


@triton.jit
def _factors(rows, r, NORMALIZE: tl.constexpr):
    """(c, m) of rows at these pointers: c scales them in a product, m the product."""
    c, m = _scales(r, NORMALIZE)
    if rows.dtype.element_ty != tl.float32:  # 16-bit rows enter products as they are
        m = r if NORMALIZE else tl.full(r.shape, 1.0, tl.float32)
    return c, m


@triton.jit
def _similarities(x_i, r_i, in_i, x_j, r_j, in_j, D, stride_d, NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """m_i m_j <c_i x_i, c_j x_j>. Where both networks are equal, so are the bits: the select, which changes nothing,
    keeps compilers from contracting one network's product with the difference of the two."""
    c_i, m_i = _factors(x_i, r_i, NORMALIZE)
    c_j, m_j = _factors(x_j, r_j, NORMALIZE)
    dot = _products(x_i, in_i, c_i, x_j, in_j, c_j, D, stride_d, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), BLOCK_K)
    return tl.where(in_i[:, None] & in_j[None, :], dot * m_i[:, None] * m_j[None, :], 0.0)


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
def _store_terms(ptr, mask, term, w, r, scale, NORMALIZE: tl.constexpr, TERMS: tl.constexpr):
    """Store W of these columns' r as float16 terms."""
    _, m = _scales(r, NORMALIZE)
    high, low = _terms(w * (m * scale)[None, :])
    tl.store(ptr, high, mask=mask)
    if TERMS == 2:
        tl.store(ptr + term, low, mask=mask)


@triton.jit
def _tile(s, t, s_strides, t_strides, norms, total, norm_strides, index_ptr, layer, g, run, i, j, n, Ds, Dt,
          w, along, w_row, w_rows, pitch, term, scale, column_i, column_j, is_diagonal,
          HAS_GRAD: tl.constexpr, IS_TRIANGLE: tl.constexpr, NORMALIZE: tl.constexpr, RECTIFY_S: tl.constexpr,
          RECTIFY_T: tl.constexpr, TERMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_K: tl.constexpr):  # fmt: skip
    """Return the sum of E² over rows i and columns j of a map, twice off the diagonal of a triangle.

    Store W there at rows w_row and columns j of w, and mirrored, if those are fewer than w_rows; and Σ_j E_ij Ŝ_ij over
    the tile, at along's row of the column tile column_j, and mirrored.
    """
    in_i, in_j = i < n, j < n
    # Rows past the last are loaded as zeros, whose similarities are 0 in both networks.
    row_i, row_j = _drawn(index_ptr, layer, i, n), _drawn(index_ptr, layer, j, n)
    # The teacher comes first and is scaled at once, which frees its norms' registers before the student's products.
    q_i = _inverse_norms(norms + total, g, row_i, norm_strides, in_i)
    q_j = _inverse_norms(norms + total, g, row_j, norm_strides, in_j)
    t_i, t_j = _row_pointers(t, g, row_i, run, t_strides), _row_pointers(t, g, row_j, run, t_strides)
    map_t = _similarities(t_i, q_i, in_i, t_j, q_j, in_j, Dt, t_strides[3], NORMALIZE, BLOCK_M, BLOCK_N, BLOCK_K)
    r_i = _inverse_norms(norms, g, row_i, norm_strides, in_i)
    r_j = _inverse_norms(norms, g, row_j, norm_strides, in_j)
    s_i, s_j = _row_pointers(s, g, row_i, run, s_strides), _row_pointers(s, g, row_j, run, s_strides)
    map_s = _similarities(s_i, r_i, in_i, s_j, r_j, in_j, Ds, s_strides[3], NORMALIZE, BLOCK_M, BLOCK_N, BLOCK_K)
    e, e_grad = _difference(map_s, map_t, RECTIFY_S, RECTIFY_T)

    square = tl.sum(e * e)  # at once: Triton 3.6 fails on nested sums over tensor memory
    mirrored = IS_TRIANGLE and not is_diagonal
    if IS_TRIANGLE:
        square = tl.where(is_diagonal, square, 2 * square)

    if HAS_GRAD:
        if NORMALIZE:
            x = e_grad * map_s
            tl.store(along + n.to(tl.int64) * column_j + i, tl.sum(x, 1), mask=in_i)
            if mirrored:
                tl.store(along + n.to(tl.int64) * column_i + j, tl.sum(x, 0), mask=in_j)
        # Rows of a shorter last tile are all there are.
        mask = (w_row < w_rows)[:, None] & (j >= 0)[None, :] if BLOCK_N < BLOCK_M else None
        _store_terms(w + w_row.to(tl.int64)[:, None] * pitch + j[None, :], mask, term, e_grad, r_j, scale, NORMALIZE,
                     TERMS)  # fmt: skip
        if mirrored:
            _store_terms(w + j.to(tl.int64)[:, None] * pitch + i[None, :], None, term, tl.trans(e_grad), r_i, scale,
                         NORMALIZE, TERMS)  # fmt: skip
    return square


@triton.jit
def _of_triangle(tile, columns):
    """Return row and column of a tile of an upper triangle, whose tiles are numbered from 0."""
    # Rows a and columns - 1 - a of the triangle make one row of a rectangle.
    odd = columns % 2
    width = columns + 1 - odd
    a, b = tile // width, tile % width
    upper = b + odd > a
    return tl.where(upper, a, columns - 1 + odd - a), tl.where(upper, b - 1 + odd, columns - 1 - b)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_map_kernel(
    s_ptr,  # layers of (B, N, Ds)
    t_ptr,  # layers of (B, N, Dt)
    index_ptr,  # layers of (n,), or None
    norms_ptr,  # (2, layers, tokens): r of s, of t
    scale_ptr,  # (layers, G), of a W of raw rows, or None
    partial_ptr,  # (groups * tiles,)
    w_ptr,  # (TERMS, groups, rows, pitch)
    along_ptr,  # (groups, column tiles, n): Σ_j E_ij Ŝ_ij of a tile
    s_strides, t_strides, norm_strides,
    total, tokens, n, G, run, Ds, Dt,
    first_group, first_tile, tiles, w_rows, pitch, term,
    IS_TRIANGLE: tl.constexpr, HAS_GRAD: tl.constexpr, NORMALIZE: tl.constexpr, RECTIFY_S: tl.constexpr,
    RECTIFY_T: tl.constexpr,
    TERMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per tile of a group's map: of its upper triangle, W mirrored, or of a strip of its rows."""
    local = (tl.program_id(0) // tiles).to(tl.int64)
    group = first_group + local
    tile = tl.program_id(0) % tiles
    columns = tl.cdiv(n, BLOCK_M)
    if IS_TRIANGLE:
        tile_i, tile_j = _of_triangle(tile, columns)
    else:
        tile_i, tile_j = first_tile + tile // columns, tile % columns
    i = tile_i * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_j * BLOCK_M + tl.arange(0, BLOCK_M)
    layer, g = group // G, group % G
    scale = W_SCALE if scale_ptr is None else tl.load(scale_ptr + group)
    square = _tile(
        of_layer(s_ptr, layer), of_layer(t_ptr, layer), s_strides, t_strides, norms_ptr + layer * tokens, total,
        norm_strides, index_ptr, layer, g, run, i, j, n, Ds, Dt, w_ptr + local * w_rows * pitch,
        along_ptr + local * columns * n, i - first_tile * BLOCK_M, w_rows, pitch, term, scale, tile_i, tile_j,
        tile_i == tile_j, HAS_GRAD, IS_TRIANGLE, NORMALIZE, RECTIFY_S, RECTIFY_T, TERMS, BLOCK_M, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    tl.store(partial_ptr + tl.program_id(0), square)


@triton.jit
def _add_products(u, w_rows, term, s, g, run, s_strides, norms, norm_strides, index_ptr, layer, j, n, d, Ds,
                  NORMALIZE: tl.constexpr, TERMS: tl.constexpr):  # fmt: skip
    """u + Σ_j W_ij c_j s_j on columns d. float16 holds c s exactly, or in two terms if it is float32; digits below
    2**-36 of a row are lost."""
    row_j, in_j = _drawn(index_ptr, layer, j, n), j < n
    c, _ = _scales(_inverse_norms(norms, g, row_j, norm_strides, in_j), NORMALIZE)
    rows = _load(_row_pointers(s, g, row_j, run, s_strides), in_j, d, Ds, s_strides[3])
    high, low = _terms(rows.to(tl.float32) * c[:, None])
    w = tl.load(w_rows + j[None, :])
    if rows.dtype == tl.float32:
        u = tl.dot(w, low, u)
    u = tl.dot(w, high, u)
    if TERMS == 2:
        u = tl.dot(tl.load(w_rows + term + j[None, :]), high, u)
    return u


@triton.jit
def _to_halves(x):
    """Return rows of float32 numbers as float16 ones, and of each row the power of two that they are to be multiplied
    by. The largest comes to 2**14 and more, so that numbers down to 2**-28 of it keep 11 bits."""
    exponent = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000
    down = tl.maximum(exponent, 15 << 23) - (14 << 23)
    halves = x * (0x7F000000 - down).to(tl.float32, bitcast=True)[:, None]
    return halves.to(tl.float16), down.to(tl.float32, bitcast=True)


@triton.jit
def _store_gradient(u, s, s_strides, norms, norm_strides, index_ptr, layer, g, run, i, n, d, Ds, along, columns,
                    before, out, d_strides, sums, powers, factor, scale, NORMALIZE: tl.constexpr):  # fmt: skip
    """factor r_i (u / scale - ŝ_i Σ_j E_ij Ŝ_ij) on columns d, or factor u / scale of raw rows; plus `before`.

    sums and powers, at these columns: where they are given, they are what is added; without `out`, they are written.
    """
    mask = i < n
    u = u * (1.0 / scale)
    if NORMALIZE:
        row_i = _drawn(index_ptr, layer, i, n)
        r_i = _inverse_norms(norms, g, row_i, norm_strides, mask)
        a = tl.zeros(i.shape, tl.float32)
        for column in range(columns):
            a += tl.load(along + n.to(tl.int64) * column + i, mask=mask, other=0.0)
        rows = _load(_row_pointers(s, g, row_i, run, s_strides), mask, d, Ds, s_strides[3]).to(tl.float32)
        u = r_i[:, None] * (u - rows * r_i[:, None] * a[:, None])
    u = u * factor
    if sums is not None:
        token = g * norm_strides[0] + i.to(tl.int64) * norm_strides[1]
        sum_rows = sums + token * Ds
        if out is None:
            halves, power = _to_halves(u)
            tl.store(sum_rows[:, None] + d[None, :], halves, mask=mask[:, None] & (d < Ds)[None, :])
            tl.store(powers + token, power.to(powers.dtype.element_ty), mask=mask)
        else:
            power = tl.load(powers + token, mask=mask, other=0.0).to(tl.float32)
            u += _load(sum_rows, mask, d, Ds, 1).to(tl.float32) * power[:, None]
    if before is not None:
        u += _load(_row_pointers(of_layer(before, layer), g, i, run, d_strides), mask, d, Ds, d_strides[3])
    if out is not None:
        rows = _row_pointers(of_layer(out, layer), g, i, run, d_strides)
        to = rows[:, None] + d.to(tl.int64)[None, :] * d_strides[3]
        tl.store(to, u.to(to.dtype.element_ty), mask=mask[:, None] & (d < Ds)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_apply_kernel(
    w_ptr,  # (TERMS, groups, rows, pitch)
    along_ptr,  # (groups, column tiles, n)
    s_ptr,  # layers of (B, N, Ds)
    index_ptr,  # layers of (n,), or None
    norms_ptr,  # (2, layers, tokens)
    scale_ptr,  # (layers, G), or None
    before_ptr,  # layers of float32 gradients that are added, or None
    ds_ptr,  # layers of (B, N, Ds), or of (1, n, Ds) of drawn rows
    s_strides, norm_strides, d_strides,
    tokens, n, G, run, Ds,
    first_group, first_row, row_tiles, columns, w_rows, pitch, term, factor,
    NORMALIZE: tl.constexpr,
    TERMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows of a strip of W and of columns of the student; those of the same rows run together,
    so that W comes from memory once."""
    pieces = tl.cdiv(Ds, BLOCK_D)
    tile = tl.program_id(0) // pieces
    local = (tile // row_tiles).to(tl.int64)
    group = first_group + local
    i_w = tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % pieces * BLOCK_D + tl.arange(0, BLOCK_D)
    layer, g = group // G, group % G
    s, norms = of_layer(s_ptr, layer), norms_ptr + layer * tokens
    w = w_ptr + local * w_rows * pitch + i_w.to(tl.int64)[:, None] * pitch
    u = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for j0 in range(0, n, BLOCK_N):
        u = _add_products(u, w, term, s, g, run, s_strides, norms, norm_strides, index_ptr, layer,
                          j0 + tl.arange(0, BLOCK_N), n, d, Ds, NORMALIZE, TERMS)  # fmt: skip
    scale = W_SCALE if scale_ptr is None else tl.load(scale_ptr + group)
    _store_gradient(u, s, s_strides, norms, norm_strides, index_ptr, layer, g, run, first_row + i_w, n, d, Ds,
                    along_ptr + local * columns * n, columns, before_ptr, ds_ptr, d_strides, None, None, factor, scale,
                    NORMALIZE)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_scatter_kernel(
    d_ptr,  # layers of (1, K, D)
    index_ptr,  # layers of (K,)
    out_ptr,  # layers of (B, N, D), contiguous, or None
    sums_ptr,  # float16 (layers, tokens, D), or None
    powers_ptr,  # (pieces, layers, tokens), of the sums
    K, D, tokens, total,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per drawn row and piece of its width: adds all draws of that row, by the first of them."""
    k, layer, piece = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    index, drawn = of_layer(index_ptr, layer), of_layer(d_ptr, layer)
    row = tl.load(index + k)
    others = tl.arange(0, BLOCK_K)
    earlier = 0
    for k0 in range(0, k, BLOCK_K):
        earlier += tl.sum((tl.load(index + k0 + others, mask=k0 + others < k, other=-1) == row).to(tl.int32))
    if earlier == 0:
        d = piece * BLOCK_D + tl.arange(0, BLOCK_D)
        added = tl.zeros((BLOCK_D,), tl.float32)
        for k0 in range(k, K, BLOCK_K):
            same = tl.load(index + k0 + others, mask=k0 + others < K, other=-1) == row
            at = (k0 + others).to(tl.int64)[:, None] * D + d[None, :]
            added += tl.sum(tl.load(drawn + at, mask=same[:, None] & (d < D)[None, :], other=0.0), 0)
        if sums_ptr is None:
            out = of_layer(out_ptr, layer) + row * D + d
            tl.store(out, tl.load(out, mask=d < D, other=0.0) + added, mask=d < D)
        else:
            row += layer * tokens
            at = sums_ptr + row * D + d
            power = powers_ptr + total.to(tl.int64) * piece + row + tl.zeros((1,), tl.int32)
            before = tl.load(at, mask=d < D, other=0.0).to(tl.float32)[None, :] * tl.load(power).to(tl.float32)
            tl.debug_barrier()  # every thread has read what one of them replaces
            halves, down = _to_halves(before + added[None, :])
            tl.store(at[None, :], halves, mask=(d < D)[None, :])
            tl.store(power, down.to(power.dtype.element_ty))
