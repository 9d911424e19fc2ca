"""Relation loss: differences E of two Gram maps tile by tile, no map beyond a bounded strip.

With r, q the inverse norms of student and teacher rows:  E_ij = r_i r_j <s_i, s_j> - q_i q_j <t_i, t_j>,
W_ij = E_ij r_j,  dS_i = 4/(G n²) r_i (Σ_j W_ij s_j - s_i r_i² Σ_j W_ij <s_i, s_j>).

Raw rows enter the products, so 16-bit ones reach the matrix units as they are. W goes there in the student's dtype: as
two terms, high and low, where that has 16 bits. One would do far from a match; a trained student's gradient is a small
difference of large terms and then 3 times as wrong as its own rounding.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, float32_products, multiprocessors

STRIP_BYTES = 12 << 20  # of W, beside as many bytes as the student has
UNSPECIALIZED = (  # that a count is 1 or a multiple of 16, or so an offset's pointer, is not worth a compilation
    "partial_ptr", "loss_ptr", "total", "n", "run", "first_group", "first_tile", "first_row", "tiles", "row_tiles",
    "columns", "strips", "count",
)  # fmt: skip
GRAM_CHUNK = 1 << 20  # elements of student and teacher taken to float64 at a time
SUM_BLOCK = 1024
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


# By architecture and bytes of the wider input dtype. At most 8 registers spill (Triton 3.9); 8.x stays below the 99 KB
# that a block has on a consumer card, 10.x within the 512 columns of its tensor memory.
CONFIGS: dict[tuple[str, int], Config] = {
    ("8.x", 2): Config(
        Map(128, 32, 8, 3),
        (Apply(128, 32, 128, 8, 3), Apply(64, 32, 64, 4, 3)),
        {384: Fused(64, 32, 32, 128, 8, 3)},
    ),
    ("9.0", 2): Config(
        Map(128, 64, 8, 3),
        (Apply(128, 64, 128, 8, 3), Apply(64, 64, 64, 4, 3)),
        {256: Fused(64, 64, 64, 64, 8, 3), 384: Fused(64, 32, 32, 128, 8, 3)},
    ),
    ("10.x", 2): Config(
        Map(128, 64, 8, 3),
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
def _row_pointers(ptr, group, i, run, stride_g, stride_o, stride_i):
    i = i.to(tl.int64)
    return ptr + group * stride_g + i // run * stride_o + i % run * stride_i


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
def _row_norms(x_ptr, out_ptr, row, total, n, run, D, stride_g, stride_o, stride_i, stride_d, eps, INVERT: tl.constexpr,
               BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    mask = row < total
    rows = _row_pointers(x_ptr, row // n, row % n, run, stride_g, stride_o, stride_i)
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
    s_ptr,  # (B, N, Ds)
    t_ptr,  # (B, N, Dt)
    norms_ptr,  # (2, G, n): of s, of t; their inverses if INVERT
    stride_sg, stride_so, stride_si, stride_sd,
    stride_tg, stride_to, stride_ti, stride_td,
    total, n, run, Ds, Dt, eps,
    INVERT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_R rows of student or teacher."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(1) == 0:
        _row_norms(s_ptr, norms_ptr, row, total, n, run, Ds, stride_sg, stride_so, stride_si, stride_sd, eps,
                   INVERT, BLOCK_R, BLOCK_K)  # fmt: skip
    else:
        _row_norms(t_ptr, norms_ptr + total, row, total, n, run, Dt, stride_tg, stride_to, stride_ti, stride_td, eps,
                   INVERT, BLOCK_R, BLOCK_K)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_sum_kernel(
    partial_ptr,  # (count,)
    loss_ptr,  # ()
    count,
    scale,
    BLOCK: tl.constexpr,
):
    """One program: the partial losses' sum in float64, in a fixed order."""
    total = tl.zeros((BLOCK,), tl.float64)
    for i0 in range(0, count, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + i, mask=i < count, other=0.0).to(tl.float64)
    tl.store(loss_ptr, (tl.sum(total, 0) * scale).to(tl.float32))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_map_kernel(
    s_ptr,  # (B, N, Ds)
    t_ptr,  # (B, N, Dt)
    norms_ptr,  # (2, G, n), inverse; unused unless NORMALIZE
    scale_ptr,  # (G,), of a float16 W; unused unless HAS_SCALE
    partial_ptr,  # (groups * tiles,)
    w_ptr,  # (TERMS, groups, rows, pitch)
    along_ptr,  # (groups, column tiles, n): Σ_j W_ij <s_i, s_j> of a tile
    stride_sg, stride_so, stride_si, stride_sd,
    stride_tg, stride_to, stride_ti, stride_td,
    total, n, run, Ds, Dt,
    first_group, first_tile, tiles, pitch, stride_wg, term,
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
    s_i = _row_pointers(s_ptr, group, i, run, stride_sg, stride_so, stride_si)
    s_j = _row_pointers(s_ptr, group, j, run, stride_sg, stride_so, stride_si)
    t_i = _row_pointers(t_ptr, group, i, run, stride_tg, stride_to, stride_ti)
    t_j = _row_pointers(t_ptr, group, j, run, stride_tg, stride_to, stride_ti)
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
    s_ptr,  # (B, N, Ds)
    norms_ptr,  # (2, G, n), inverse; unused unless NORMALIZE
    scale_ptr,  # (G,); unused unless HAS_SCALE
    ds_ptr,  # (B, N, Ds)
    stride_sg, stride_so, stride_si, stride_sd,
    stride_dg, stride_do, stride_di, stride_dd,
    n, run, Ds,
    first_group, first_row, row_tiles, columns, pitch, stride_wg, term, factor,
    HAS_SCALE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    IS_ADDED: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows of a strip of W and of columns of the student."""
    local = (tl.program_id(0) // row_tiles).to(tl.int64)
    group = first_group + local
    i_w = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    i = first_row + i_w
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    u = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    w_rows = w_ptr + local * stride_wg + i_w.to(tl.int64)[:, None] * pitch
    for j0 in range(0, n, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        s_j = _load(_row_pointers(s_ptr, group, j, run, stride_sg, stride_so, stride_si), j < n, d, Ds, stride_sd)
        u = tl.dot(tl.load(w_rows + j[None, :]), s_j, u, input_precision=PRECISION)
        if TERMS == 2:
            u = tl.dot(tl.load(w_rows + term + j[None, :]), s_j, u, input_precision=PRECISION)

    mask = i < n
    if HAS_SCALE:
        factor = factor / tl.load(scale_ptr + group)
    r_i = _inverse_norms(norms_ptr + group * n, i, mask, NORMALIZE)
    along = tl.zeros((BLOCK_M,), tl.float32)
    if NORMALIZE:
        for tile in range(columns):
            along += tl.load(along_ptr + (local * columns + tile) * n + i, mask=mask, other=0.0)
        if HAS_SCALE:
            along = along * tl.load(scale_ptr + group)
    s_i = _row_pointers(s_ptr, group, i, run, stride_sg, stride_so, stride_si)
    out = _row_pointers(ds_ptr, group, i, run, stride_dg, stride_do, stride_di)
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
    s_ptr,  # (B, N, Ds)
    t_ptr,  # (B, N, Dt)
    norms_ptr,  # (2, G, n), inverse; unused unless NORMALIZE
    scale_ptr,  # (G,); unused unless HAS_SCALE
    partial_ptr,  # (G * strips,)
    ds_ptr,  # (B, N, Ds)
    stride_sg, stride_so, stride_si, stride_sd,
    stride_tg, stride_to, stride_ti, stride_td,
    stride_dg, stride_do, stride_di, stride_dd,
    total, n, run, Ds, Dt, strips, factor,
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
    s_i = _row_pointers(s_ptr, group, i, run, stride_sg, stride_so, stride_si)
    t_i = _row_pointers(t_ptr, group, i, run, stride_tg, stride_to, stride_ti)
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
        s_j = _row_pointers(s_ptr, group, j, run, stride_sg, stride_so, stride_si)
        t_j = _row_pointers(t_ptr, group, j, run, stride_tg, stride_to, stride_ti)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        map_t = _products(t_i, in_i, t_j, in_j, Dt, stride_td, zero, BLOCK_K, PRECISION)
        if NORMALIZE:
            map_t *= q_i[:, None] * _inverse_norms(q, j, in_j, True)[None, :]
        dot_s = _products(s_i, in_i, s_j, in_j, Ds, stride_sd, zero, BLOCK_K, PRECISION)
        r_j = _inverse_norms(r, j, in_j, NORMALIZE)
        e, e_grad = _difference(dot_s, map_t, r_i, r_j, NORMALIZE, RECTIFY_S, RECTIFY_T)
        square += tl.sum(e * e, 1)
        w = e_grad * (r_j * scale)[None, :]
        high = w.to(s_ptr.dtype.element_ty)
        low = (w - high.to(tl.float32)).to(s_ptr.dtype.element_ty)
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
    out = _row_pointers(ds_ptr, group, i, run, stride_dg, stride_do, stride_di)
    _store_gradient(u0, along, s_i, out, in_i, d + 0 * BLOCK_D, Ds, stride_sd, stride_dd, r_i, factor,
                    CHUNKS > 0, NORMALIZE, IS_ADDED)  # fmt: skip
    _store_gradient(u1, along, s_i, out, in_i, d + 1 * BLOCK_D, Ds, stride_sd, stride_dd, r_i, factor,
                    CHUNKS > 1, NORMALIZE, IS_ADDED)  # fmt: skip
    _store_gradient(u2, along, s_i, out, in_i, d + 2 * BLOCK_D, Ds, stride_sd, stride_dd, r_i, factor,
                    CHUNKS > 2, NORMALIZE, IS_ADDED)  # fmt: skip
    _store_gradient(u3, along, s_i, out, in_i, d + 3 * BLOCK_D, Ds, stride_sd, stride_dd, r_i, factor,
                    CHUNKS > 3, NORMALIZE, IS_ADDED)  # fmt: skip


def _largest(norms: Tensor, normalize: bool) -> Tensor:
    """(G,): a bound of |W| in each group, from inverse norms (|E| <= 2) or from norms."""
    if normalize:
        return 2 * norms[0].amax(1)
    return norms.amax(2).square().sum(0)


def _fill(
    choices: tuple[Apply, ...], groups: int, rows: int, Ds: int, device: torch.device
) -> tuple[tuple[int, int], Apply]:
    """The first configuration with a program for every multiprocessor, else the last; and its grid."""
    for apply in choices:
        grid = groups * triton.cdiv(rows, apply.BLOCK_M), triton.cdiv(Ds, apply.BLOCK_D)
        if grid[0] * grid[1] >= multiprocessors(device):
            break
    return grid, apply


def _tile(
    student: Tensor,
    teacher: Tensor,
    loss: Tensor,
    dstudent: Tensor | None,
    scope: str,
    normalize: bool,
    rectify: str,
    eps: float,
    weight: float = 1.0,
    is_added: bool = False,
) -> None:
    """Write the loss; write the gradient of weight times it, or add that to what dstudent holds."""
    B, N, Ds = student.shape
    Dt = teacher.shape[2]
    G, n, run = {"intra": (B, N, N), "inter": (N, B, B), "batch": (1, B * N, N)}[scope]
    s_rows, t_rows = _rows(student, scope), _rows(teacher, scope)
    config = CONFIGS[architecture(student.device), max(student.itemsize, teacher.itemsize)]
    # float16 would lose a W that is too large or small; bfloat16 has float32's range.
    has_scale = dstudent is not None and student.dtype == torch.float16

    norms = scale = student  # stand-ins for what is not read
    if normalize or has_scale:
        norms = student.new_empty((2, G, n), dtype=torch.float32)
        BLOCK_R, BLOCK_K = NORM_BLOCK
        _relation_norms_kernel[(triton.cdiv(G * n, BLOCK_R), 2)](
            student, teacher, norms, *s_rows, *t_rows, G * n, n, run, Ds, Dt, eps,
            INVERT=normalize, BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    if has_scale:
        scale = 2.0**14 / _largest(norms, normalize).clamp_min_(torch.finfo(torch.float32).tiny * 2.0**15)

    factor = 4 * weight / (G * n * n)
    flags = {"NORMALIZE": normalize, "TERMS": 2 if student.itemsize == 2 else 1, "PRECISION": float32_products()}
    clamps = {"RECTIFY_S": rectify == "both", "RECTIFY_T": rectify != "none"}
    BLOCK_M = config.map.BLOCK_M
    columns = triton.cdiv(n, BLOCK_M)
    pitch = columns * BLOCK_M  # W is stored in whole tiles, so that its rows are aligned and need no mask
    budget = (STRIP_BYTES + student.numel() * student.itemsize) // (4 * pitch)  # rows of W
    triangle = columns * (columns + 1) // 2

    if dstudent is None:
        partial = student.new_empty(G * triangle, dtype=torch.float32)
        _relation_map_kernel[(G * triangle,)](
            student, teacher, norms, scale, partial, student, student, *s_rows, *t_rows, G * n, n, run, Ds, Dt,
            0, 0, triangle, 0, 0, 0, IS_TRIANGLE=True, HAS_GRAD=False, HAS_SCALE=False, **flags, **clamps,
            **config.map._asdict(),
        )  # fmt: skip
    elif budget < pitch and Ds <= max(config.fused):
        fused = config.fused[min(width for width in config.fused if width >= Ds)]
        strips = triton.cdiv(n, fused.BLOCK_M)
        partial = student.new_empty(G * strips, dtype=torch.float32)
        _relation_fused_kernel[(G * strips,)](
            student, teacher, norms, scale, partial, dstudent, *s_rows, *t_rows, *_rows(dstudent, scope),
            G * n, n, run, Ds, Dt, strips, factor,
            HAS_SCALE=has_scale, IS_ADDED=is_added, CHUNKS=triton.cdiv(Ds, fused.BLOCK_D),
            **flags, **clamps, **fused._asdict(),
        )  # fmt: skip
    else:
        # Whole maps, several groups at a time, where they fit; else strips of one map's rows.
        is_triangle = budget >= pitch
        groups = min(max(budget // pitch, 1), G)
        groups = triton.cdiv(G, triton.cdiv(G, groups))
        row_tiles = columns if is_triangle else min(max(budget // BLOCK_M, 1), columns)
        row_tiles = triton.cdiv(columns, triton.cdiv(columns, row_tiles))
        terms = flags["TERMS"]
        w = student.new_empty((terms, groups, row_tiles * BLOCK_M, pitch))
        along = student.new_empty((groups, columns, n), dtype=torch.float32)
        partial = student.new_empty(G * (triangle if is_triangle else columns * columns), dtype=torch.float32)
        done = 0
        for g in range(0, G, groups):
            for first_tile in range(0, columns, row_tiles):
                here, tall = min(groups, G - g), min(row_tiles, columns - first_tile)
                tiles = triangle if is_triangle else tall * columns
                _relation_map_kernel[(here * tiles,)](
                    student, teacher, norms, scale, partial[done:], w, along, *s_rows, *t_rows,
                    G * n, n, run, Ds, Dt, g, first_tile, tiles, pitch, w.stride(1), w.stride(0),
                    IS_TRIANGLE=is_triangle, HAS_GRAD=True, HAS_SCALE=has_scale, **flags, **clamps,
                    **config.map._asdict(),
                )  # fmt: skip
                done += here * tiles
                rows = min(tall * BLOCK_M, n - first_tile * BLOCK_M)
                grid, apply = _fill(config.apply, here, rows, Ds, student.device)
                _relation_apply_kernel[grid](
                    w, along, student, norms, scale, dstudent, *s_rows, *_rows(dstudent, scope), n, run, Ds,
                    g, first_tile * BLOCK_M, grid[0] // here, columns, pitch, w.stride(1), w.stride(0), factor,
                    HAS_SCALE=has_scale, IS_ADDED=is_added, **flags, **apply._asdict(),
                )  # fmt: skip

    _relation_sum_kernel[(1,)](partial, loss, partial.numel(), 1 / (G * n * n), BLOCK=SUM_BLOCK)


def _gram(student: Tensor, teacher: Tensor, dstudent: Tensor | None, scope: str, normalize: bool, eps: float) -> Tensor:
    """||SSᵀ - TTᵀ||² = ||SᵀS||² - 2||SᵀT||² + ||TᵀT||², dŜ = 4/(G n²) (S(SᵀS) - T(TᵀS)); Grams in float64."""
    Ds, Dt = student.shape[2], teacher.shape[2]

    def folded(x: Tensor) -> Tensor:  # (G, runs, rows of a run, D), a view
        return x[None] if scope == "batch" else (x if scope == "intra" else x.transpose(0, 1))[:, None]

    def unit(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        if not normalize:
            return x, x.new_ones(())
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inv = norm.reciprocal().masked_fill_(norm <= eps, 0)
        return x * inv, inv

    s, t = folded(student), folded(teacher)
    ds = None if dstudent is None else folded(dstudent)
    G, runs, run = s.shape[:3]
    n = runs * run
    scale = 1 / (G * n * n)
    total = student.new_zeros((), dtype=torch.float64)
    groups = min(max(GRAM_CHUNK // (Ds * Ds + Ds * Dt + Dt * Dt), 1), G)
    long = min(max(GRAM_CHUNK // (groups * (Ds + Dt)), 1), run)
    many = max(GRAM_CHUNK // (groups * long * (Ds + Dt)), 1) if long == run else 1
    for g0 in range(0, G, groups):
        g = slice(g0, g0 + groups)
        pieces = [
            (g, slice(a, a + many), slice(b, b + long)) for a in range(0, runs, many) for b in range(0, run, long)
        ]
        shape = len(s[g])
        ss, st, tt = (total.new_zeros((shape, a, b)) for a, b in ((Ds, Ds), (Ds, Dt), (Dt, Dt)))
        for at in pieces:
            s64, t64 = (unit(x[at])[0].double().flatten(1, 2) for x in (s, t))
            ss.baddbmm_(s64.mT, s64)
            st.baddbmm_(s64.mT, t64)
            tt.baddbmm_(t64.mT, t64)
        for gram, weight in ((ss, 1), (st, -2), (tt, 1)):
            total += weight * torch.linalg.vector_norm(gram).square()
        if ds is None:
            continue
        ss, ts = ss.float(), st.mT.float()
        for at in pieces:
            (s_hat, inv), t_hat = unit(s[at]), unit(t[at])[0]
            flat = torch.baddbmm(s_hat.flatten(1, 2) @ ss, t_hat.flatten(1, 2), ts, alpha=-1).mul_(4 * scale)
            ds_hat = flat.view_as(s_hat)
            if normalize:
                ds_hat = inv * (ds_hat - s_hat * (s_hat * ds_hat).sum(-1, keepdim=True))
            ds[at] = ds_hat.to(ds.dtype)
    return (total.clamp_min(0) * scale).float()  # rounding alone can take a zero below 0


def _stored_gradient(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == torch.float16 else x.dtype


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
    dstudent = student.new_empty(student.shape if with_grad else (0,), dtype=_stored_gradient(student))
    ds = dstudent if with_grad else None
    if algorithm == "gram":
        with torch.autocast(student.device.type, enabled=False):
            return _gram(student, teacher, ds, scope, normalize, eps), dstudent
    loss = student.new_empty((), dtype=torch.float32)
    _tile(student, teacher, loss, ds, scope, normalize, rectify, eps)
    return loss, dstudent


def manifold_fwd(
    students: list[Tensor],
    teachers: list[Tensor],
    indices: list[Tensor],
    intra: float,
    inter: float,
    random: float,
    with_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    terms = students[0].new_empty((len(students), 3), dtype=torch.float32)
    dstudents = []
    for loss, s, t, index in zip(terms, students, teachers, indices, strict=True):
        options = {"normalize": True, "rectify": "none", "eps": 1e-12}
        total = s.new_empty(s.shape, dtype=torch.float32) if with_grad else None
        _tile(s, t, loss[0], total, "intra", **options, weight=intra)
        _tile(s, t, loss[1], total, "inter", **options, weight=inter, is_added=True)
        at = (index // s.shape[1], index % s.shape[1])
        s_k, t_k = s[at][None], t[at][None]
        d = s.new_empty(s_k.shape, dtype=torch.float32) if with_grad else None
        _tile(s_k, t_k, loss[2], d, "intra", **options, weight=random)
        if with_grad:
            total.index_put_(at, d[0], accumulate=True)
            dstudents.append(total.to(_stored_gradient(s)))
        else:
            dstudents.append(s.new_empty((0,), dtype=_stored_gradient(s)))
    return terms, dstudents
