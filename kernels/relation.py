"""Relation loss: differences E of two Gram maps tile by tile, no map beyond a bounded strip.

With r, q the inverse norms of student and teacher rows:  E_ij = r_i r_j <s_i, s_j> - q_i q_j <t_i, t_j>,
W_ij = E_ij r_j,  dS_i = 4/(G n²) r_i (Σ_j W_ij s_j - s_i r_i² Σ_j W_ij <s_i, s_j>).

Raw rows enter the products, so 16-bit ones reach the matrix units as they are. W goes there in the student's dtype: as
two terms, high and low, where that has 16 bits. One would do far from a match; a trained student's gradient is a small
difference of large terms and then 3 times as wrong as its own rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, float32_products, multiprocessors, stored_gradient

STRIP_BYTES = 12 << 20  # of W, beside as many bytes as the student has
UNSPECIALIZED = (  # that a count is 1 or a multiple of 16, or so an offset's pointer, is not worth a compilation
    "partial_ptr", "loss_ptr", "total", "n", "run", "first_group", "first_tile", "first_row", "tiles", "row_tiles",
    "columns", "strips", "count", "G", "K", "N",
)  # fmt: skip
GRAM_CHUNK = 1 << 20  # elements of student and teacher taken to float64 at a time
SUM_BLOCK = 1024
LAYERS = 16  # of equal shapes, that share their launches at most: each is an argument of the kernels
SCATTER_BLOCK = (32, 128)  # drawn rows, columns
NORM_BLOCK = (16, 128)  # rows, columns


class Map(NamedTuple):
    """Tiles of the difference map: BLOCK_M rows and columns, products over BLOCK_K."""

    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Apply(NamedTuple):
    """W S: tiles of BLOCK_M rows and BLOCK_D columns, products over BLOCK_N rows of S."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


class Fused(NamedTuple):
    """Both in one: BLOCK_M rows of U = W S stay in registers as cdiv(Ds, BLOCK_D) <= 4 accumulators."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    map: Map
    apply: tuple[Apply, ...]  # the first that fills the card, else the last
    fused: dict[int, Fused]  # by the widest student it takes


# By architecture and bytes of the wider input dtype. 8.x stays below the 99 KB that a block has on a consumer card,
# 10.x within the 512 columns of its tensor memory; a map of 128 rows spills 240 bytes a thread there under Triton 3.6.
CONFIGS: dict[tuple[str, int], Config] = {
    ("8.x", 2): Config(
        Map(128, 32, 8, 3),
        (Apply(128, 32, 128, 8, 3), Apply(64, 32, 64, 4, 3)),
        {384: Fused(64, 32, 32, 128, 8, 3)},
    ),
    ("9.0", 2): Config(
        Map(128, 64, 8, 3),
        (Apply(128, 64, 128, 8, 3), Apply(64, 64, 64, 4, 3)),
        {256: Fused(64, 64, 64, 64, 8, 3)},
    ),
    ("10.x", 2): Config(
        Map(64, 64, 8, 3),
        (Apply(128, 64, 128, 8, 3), Apply(64, 64, 64, 4, 3)),
        {256: Fused(64, 64, 64, 64, 8, 3), 384: Fused(64, 32, 64, 128, 8, 3)},
    ),
    ("cdna", 2): Config(
        Map(128, 32, 8, 2),
        (Apply(128, 32, 128, 8, 2), Apply(64, 32, 64, 4, 2)),
        {256: Fused(64, 64, 32, 64, 8, 2), 384: Fused(64, 64, 32, 128, 8, 2)},
    ),
    **dict.fromkeys(
        (("8.x", 4), ("9.0", 4), ("10.x", 4)),
        Config(
            Map(64, 16, 4, 3),
            (Apply(64, 16, 64, 4, 3), Apply(32, 16, 32, 4, 3)),
            {256: Fused(32, 16, 16, 64, 8, 3), 384: Fused(32, 16, 16, 128, 8, 3)},
        ),
    ),
    ("cdna", 4): Config(
        Map(64, 16, 4, 2),
        (Apply(64, 16, 64, 4, 2), Apply(32, 16, 32, 4, 2)),
        {256: Fused(32, 16, 16, 64, 8, 2)},
    ),
}


class Rows(NamedTuple):
    """A (B, N, D) tensor as G groups of n rows: strides of group, of runs of `run` rows, of a row in a run, of D."""

    group: int
    outer: int
    inner: int
    column: int


def _rows(x: Tensor, scope: str) -> Rows:
    b, n, d = x.stride()
    return {"intra": Rows(b, 0, n, d), "inter": Rows(n, 0, b, d), "batch": Rows(0, b, n, d)}[scope]


@triton.jit
def _of_layer(ptrs, layer):
    """One of a tuple of pointers."""
    ptr = ptrs[0]
    for k in tl.static_range(1, len(ptrs)):
        ptr = tl.where(layer == k, ptrs[k], ptr)
    return ptr


@triton.jit
def _drawn(index_ptr, layer, i, n, HAS_INDEX: tl.constexpr):
    """Which row of a layer is the i-th of its group."""
    row = i
    if HAS_INDEX:
        row = tl.load(index_ptr + layer * n + i, mask=i < n, other=0)
    return row


@triton.jit
def _row_pointers(ptr, group, i, run, stride_g, stride_o, stride_i):
    """Of rows in runs, whose division has as many bits as i; `run` is None where a group is one."""
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
def _difference(dot_s, map_t, r_i, r_j, NORMALIZE: tl.constexpr, RECTIFY_S: tl.constexpr, RECTIFY_T: tl.constexpr):
    """E and, where the gradient sees another one (a clamped student passes none), that."""
    map_s = dot_s
    if NORMALIZE:
        map_s = dot_s * r_i[:, None] * r_j[None, :]
    if RECTIFY_T:
        map_t = tl.where(map_t < 0, 0.0, map_t)  # keeps NaN, as maximum does not
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

    # Rows past the last are loaded as zeros: they relate as 0 on both sides.
    zero = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    layer, g = group // G, group % G
    s, t = _of_layer(s_ptr, layer), _of_layer(t_ptr, layer)
    row_i, row_j = _drawn(index_ptr, layer, i, n, HAS_INDEX), _drawn(index_ptr, layer, j, n, HAS_INDEX)
    s_i = _row_pointers(s, g, row_i, run, stride_sg, stride_so, stride_si)
    s_j = _row_pointers(s, g, row_j, run, stride_sg, stride_so, stride_si)
    t_i = _row_pointers(t, g, row_i, run, stride_tg, stride_to, stride_ti)
    t_j = _row_pointers(t, g, row_j, run, stride_tg, stride_to, stride_ti)
    # The teacher first, scaled at once: its norms' registers are free again when the student's products are summed.
    map_t = _products(t_i, in_i, t_j, in_j, Dt, stride_td, zero, BLOCK_K, PRECISION)
    r, q = norms_ptr + group * n, norms_ptr + total + group * n
    if NORMALIZE:
        map_t *= _inverse_norms(q, i, in_i, True)[:, None] * _inverse_norms(q, j, in_j, True)[None, :]
    dot_s = _products(s_i, in_i, s_j, in_j, Ds, stride_sd, zero, BLOCK_K, PRECISION)
    r_i, r_j = _inverse_norms(r, i, in_i, NORMALIZE), _inverse_norms(r, j, in_j, NORMALIZE)
    e, e_grad = _difference(dot_s, map_t, r_i, r_j, NORMALIZE, RECTIFY_S, RECTIFY_T)

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
        if NORMALIZE:
            map_t *= q_i[:, None] * _inverse_norms(q, j, in_j, True)[None, :]
        dot_s = _products(s_i, in_i, s_j, in_j, Ds, stride_sd, zero, BLOCK_K, PRECISION)
        r_j = _inverse_norms(r, j, in_j, NORMALIZE)
        e, e_grad = _difference(dot_s, map_t, r_i, r_j, NORMALIZE, RECTIFY_S, RECTIFY_T)
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


def _largest(norms: Tensor, normalize: bool) -> Tensor:
    """(G,): a bound of |W| in each group, from inverse norms (|E| <= 2) or from norms."""
    if normalize:
        return 2 * norms[0].amax(1)
    return norms.amax(2).square().sum(0)


def _fill(choices: tuple[Apply, ...], groups: int, rows: int, Ds: int, device: torch.device) -> tuple[int, int, Apply]:
    """The first configuration with a program for every multiprocessor, else the last: programs, tiles of rows, it."""
    for apply in choices:
        row_tiles = triton.cdiv(rows, apply.BLOCK_M)
        programs = groups * row_tiles * triton.cdiv(Ds, apply.BLOCK_D)
        if programs >= multiprocessors(device):
            break
    return programs, row_tiles, apply


def _tile(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    loss: Tensor,
    dstudents: Sequence[Tensor] | None,
    scope: str,
    normalize: bool,
    rectify: str,
    eps: float,
    weight: float = 1.0,
    is_added: bool = False,
    index: Tensor | None = None,
) -> None:
    """Write the losses (layers,) of tensors of one shape, dtype and strides; write the gradients of weight times them,
    or add those to what dstudents hold. With index (layers, K) the groups are those rows of a batch, and so are
    dstudents (1, K, Ds)."""
    student, layers = students[0], len(students)
    B, N, Ds = student.shape
    Dt = teachers[0].shape[2]
    G, n, run = {"intra": (B, N, None), "inter": (N, B, None), "batch": (1, B * N, N)}[scope]
    n = n if index is None else index.shape[1]
    every, total = layers * G, layers * G * n
    s_rows, t_rows = _rows(student, scope), _rows(teachers[0], scope)
    config = CONFIGS[architecture(student.device), max(student.itemsize, teachers[0].itemsize)]
    # float16 would lose a W that is too large or small; bfloat16 has float32's range.
    has_scale = dstudents is not None and student.dtype == torch.float16

    s, t = tuple(students), tuple(teachers)
    norms = scale = student  # stand-ins for what is not read
    drawn = student if index is None else index
    if normalize or has_scale:
        norms = student.new_empty((2, every, n), dtype=torch.float32)
        BLOCK_R, BLOCK_K = NORM_BLOCK
        _relation_norms_kernel[(triton.cdiv(G * n, BLOCK_R), 2, layers)](
            s, t, drawn, norms, *s_rows, *t_rows, total, n, G, run, Ds, Dt, eps,
            HAS_INDEX=index is not None, INVERT=normalize, BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    if has_scale:
        scale = 2.0**14 / _largest(norms, normalize).clamp_min_(torch.finfo(torch.float32).tiny * 2.0**15)

    factor = 4 * weight / (G * n * n)
    flags = {"NORMALIZE": normalize, "TERMS": 2 if student.itemsize == 2 else 1, "PRECISION": float32_products()}
    flags["HAS_INDEX"] = index is not None
    clamps = {"RECTIFY_S": rectify == "both", "RECTIFY_T": rectify != "none"}
    BLOCK_M = config.map.BLOCK_M
    columns = triton.cdiv(n, BLOCK_M)
    pitch = columns * BLOCK_M  # W is stored in whole tiles, so that its rows are aligned and need no mask
    budget = (STRIP_BYTES + layers * student.numel() * student.itemsize) // (4 * pitch)  # rows of W
    triangle = columns * (columns + 1) // 2

    d_rows = s_rows if dstudents is None else _rows(dstudents[0], scope)
    if index is not None:  # drawn rows lie one after another: N of them take up N times a row
        d_rows = Rows(0, N * Ds, Ds, 1)
    if dstudents is None:
        partial = student.new_empty(every * triangle, dtype=torch.float32)
        _relation_map_kernel[(every * triangle,)](
            s, t, drawn, norms, scale, partial, student, student, *s_rows, *t_rows, total, n, G, run, Ds, Dt,
            0, 0, triangle, 0, 0, 0, IS_TRIANGLE=True, HAS_GRAD=False, HAS_SCALE=False, **flags, **clamps,
            **config.map._asdict(),
        )  # fmt: skip
    elif budget < pitch and Ds <= max(config.fused):
        fused = config.fused[min(width for width in config.fused if width >= Ds)]
        strips = triton.cdiv(n, fused.BLOCK_M)
        partial = student.new_empty(every * strips, dtype=torch.float32)
        _relation_fused_kernel[(every * strips,)](
            s, t, drawn, norms, scale, partial, tuple(dstudents), *s_rows, *t_rows, *d_rows,
            total, n, G, run, Ds, Dt, strips, factor,
            HAS_SCALE=has_scale, IS_ADDED=is_added, CHUNKS=triton.cdiv(Ds, fused.BLOCK_D),
            **flags, **clamps, **fused._asdict(),
        )  # fmt: skip
    else:
        # Whole maps, several groups at a time, where they fit; else strips of one map's rows.
        is_triangle = budget >= pitch
        groups = min(max(budget // pitch, 1), every)
        groups = triton.cdiv(every, triton.cdiv(every, groups))
        row_tiles = columns if is_triangle else min(max(budget // BLOCK_M, 1), columns)
        row_tiles = triton.cdiv(columns, triton.cdiv(columns, row_tiles))
        terms = flags["TERMS"]
        w = student.new_empty((terms, groups, row_tiles * BLOCK_M, pitch))
        along = student.new_empty((groups, columns, n), dtype=torch.float32)
        partial = student.new_empty(every * (triangle if is_triangle else columns * columns), dtype=torch.float32)
        done = 0
        for g in range(0, every, groups):
            for first_tile in range(0, columns, row_tiles):
                here, tall = min(groups, every - g), min(row_tiles, columns - first_tile)
                tiles = triangle if is_triangle else tall * columns
                _relation_map_kernel[(here * tiles,)](
                    s, t, drawn, norms, scale, partial[done:], w, along, *s_rows, *t_rows,
                    total, n, G, run, Ds, Dt, g, first_tile, tiles, pitch, w.stride(1), w.stride(0),
                    IS_TRIANGLE=is_triangle, HAS_GRAD=True, HAS_SCALE=has_scale, **flags, **clamps,
                    **config.map._asdict(),
                )  # fmt: skip
                done += here * tiles
                rows = min(tall * BLOCK_M, n - first_tile * BLOCK_M)
                programs, apply_tiles, apply = _fill(config.apply, here, rows, Ds, student.device)
                _relation_apply_kernel[(programs,)](
                    w, along, s, drawn, norms, scale, tuple(dstudents), *s_rows, *d_rows, n, G, run, Ds,
                    g, first_tile * BLOCK_M, apply_tiles, columns, pitch, w.stride(1), w.stride(0), factor,
                    HAS_SCALE=has_scale, IS_ADDED=is_added, **flags, **apply._asdict(),
                )  # fmt: skip

    count = partial.numel() // layers
    _relation_sum_kernel[(layers,)](partial, loss, count, loss.stride(0), 1 / (G * n * n), BLOCK=SUM_BLOCK)


def _gram(student: Tensor, teacher: Tensor, dstudent: Tensor | None, scope: str, normalize: bool, eps: float) -> Tensor:
    """||SSᵀ - TTᵀ||² = ||SᵀS||² - 2||SᵀT||² + ||TᵀT||², dŜ = 4/(G n²) (S(SᵀS) - T(TᵀS)), in float64.

    Both networks' rows stand side by side, Z = [S T]: a piece takes three launches for ZᵀZ and one product for dŜ.
    """
    Ds, Dt = student.shape[2], teacher.shape[2]

    def folded(x: Tensor) -> Tensor:  # (G, runs, rows of a run, D), a view
        return x[None] if scope == "batch" else (x if scope == "intra" else x.transpose(0, 1))[:, None]

    def inverse_norms(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return norm.reciprocal().masked_fill_(norm <= eps, 0)

    networks = [(x, inverse_norms(x) if normalize else None) for x in (folded(student), folded(teacher))]
    ds = None if dstudent is None else folded(dstudent)
    (s, r), _ = networks
    G, runs, run = s.shape[:3]
    n = runs * run
    scale = 1 / (G * n * n)
    total = student.new_zeros((), dtype=torch.float64)

    def side_by_side(at: tuple[slice, ...]) -> Tensor:  # (groups, rows, Ds + Dt), of float32 unit rows
        shape = s[at].shape[:3]
        z = total.new_empty((*shape, Ds + Dt))
        for (x, inv), columns in zip(networks, (slice(0, Ds), slice(Ds, None)), strict=True):
            if inv is None:
                z[..., columns] = x[at]
            else:
                torch.mul(x[at], inv[at], out=z[..., columns])
        return z.flatten(1, 2)

    groups = min(max(GRAM_CHUNK // (Ds + Dt) ** 2, 1), G)
    long = min(max(GRAM_CHUNK // (groups * (Ds + Dt)), 1), run)
    many = max(GRAM_CHUNK // (groups * long * (Ds + Dt)), 1) if long == run else 1
    for g0 in range(0, G, groups):
        g = slice(g0, g0 + groups)
        pieces = [
            (g, slice(a, a + many), slice(b, b + long)) for a in range(0, runs, many) for b in range(0, run, long)
        ]
        zz = total.new_zeros((len(s[g]), Ds + Dt, Ds + Dt))
        for at in pieces:
            z = side_by_side(at)
            zz.baddbmm_(z.mT, z)
        ss, st, tt = zz[:, :Ds, :Ds], zz[:, :Ds, Ds:], zz[:, Ds:, Ds:]
        for gram, weight in ((ss, 1), (st, -2), (tt, 1)):
            total += weight * torch.linalg.vector_norm(gram).square()
        if ds is None:
            continue
        factor = torch.cat([ss, -st.mT], 1).mul_(4 * scale)
        for at in pieces:
            z = side_by_side(at)
            d = (z @ factor).view(ds[at].shape)
            if r is not None:
                s_hat = z[..., :Ds].view_as(d)
                d = d.addcmul_(s_hat, (s_hat * d).sum(-1, keepdim=True), value=-1).mul_(r[at])
            ds[at] = d
    return (total.clamp_min(0) * scale).float()  # rounding alone can take a zero below 0


def relation_fwd(
    student: Tensor,
    teacher: Tensor,
    scope: str,
    normalize: bool,
    rectify: str,
    eps: float,
    algorithm: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    dstudent = student.new_empty(student.shape if with_grad else (0,), dtype=stored_gradient(student))
    ds = dstudent if with_grad else None
    if algorithm == "gram":
        with torch.autocast(student.device.type, enabled=False):
            return _gram(student, teacher, ds, scope, normalize, eps), dstudent
    loss = student.new_empty(1, dtype=torch.float32)
    _tile([student], [teacher], loss, None if ds is None else [ds], scope, normalize, rectify, eps)
    return loss.view(()), dstudent


def _alike(students: list[Tensor], teachers: list[Tensor], indices: list[Tensor]) -> list[list[int]]:
    """Layers that share their launches: of one shape, dtype and strides."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for layer, tensors in enumerate(zip(students, teachers, indices, strict=True)):
        key = tuple((x.shape, x.stride(), x.dtype) for x in tensors)
        groups.setdefault(key, []).append(layer)
    return [members[i : i + LAYERS] for members in groups.values() for i in range(0, len(members), LAYERS)]


def manifold_fwd(
    students: list[Tensor],
    teachers: list[Tensor],
    indices: list[Tensor],
    intra: float,
    inter: float,
    random: float,
    with_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    terms: dict[int, Tensor] = {}
    dstudents = [s.new_empty(s.shape if with_grad else (0,), dtype=stored_gradient(s)) for s in students]
    options = {"normalize": True, "rectify": "none", "eps": 1e-12}
    for layers in _alike(students, teachers, indices):
        s, t = [students[i] for i in layers], [teachers[i] for i in layers]
        index = torch.stack([indices[i] for i in layers])
        sums = drawn = None
        if with_grad:
            # In float32 until the three terms are added up.
            sums = [d if d.dtype == torch.float32 else torch.empty_like(d, dtype=torch.float32)
                    for d in (dstudents[i] for i in layers)]  # fmt: skip
            drawn = s[0].new_empty((len(layers), 1, index.shape[1], s[0].shape[2]), dtype=torch.float32)
        loss = s[0].new_empty((3, len(layers)), dtype=torch.float32)
        _tile(s, t, loss[0], sums, "intra", **options, weight=intra)
        _tile(s, t, loss[1], sums, "inter", **options, weight=inter, is_added=True)
        _tile(s, t, loss[2], None if drawn is None else list(drawn), "batch", **options, weight=random, index=index)
        terms |= zip(layers, loss.unbind(1), strict=True)
        if sums is None or drawn is None:
            continue
        (K, D), (BLOCK_K, BLOCK_D) = drawn.shape[2:], SCATTER_BLOCK
        _relation_scatter_kernel[(K, len(layers), triton.cdiv(D, BLOCK_D))](
            drawn, index, tuple(sums), K, D, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D
        )
        if sums[0].dtype != dstudents[layers[0]].dtype:
            torch._foreach_copy_([dstudents[i] for i in layers], sums)
    return torch.stack([terms[i] for i in range(len(students))]), dstudents
