"""The kernel of short groups: a program forms a group's whole difference map and applies it at once."""

import triton
import triton.language as tl

from ._common import of_layer
from ._relation_maps import W_SCALE, _add_products, _store_gradient, _tile
from ._relation_rows import _norms
from ._relation_tiles import UNSPECIALIZED


@triton.jit
def _apply(i, piece, first_tail, w, along, s, s_strides, norms, norm_strides, index_ptr, layer, g, run, n, Ds,
           columns, pitch, before, out, d_strides, sums, powers, total, factor, scale,
           NORMALIZE: tl.constexpr, TERMS: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Store rows i of the gradient: W S in tiles of BLOCK_N rows of S, and one of its last TAIL rows."""
    d = piece * BLOCK_D + tl.arange(0, BLOCK_D)
    u = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    w_rows = w + i[:, None] * pitch
    for j0 in range(0, first_tail if TAIL > 0 else n, BLOCK_N):
        u = _add_products(u, w_rows, pitch * pitch, s, g, run, s_strides, norms, norm_strides, index_ptr, layer,
                          j0 + tl.arange(0, BLOCK_N), n, d, Ds, NORMALIZE, TERMS)  # fmt: skip
    if TAIL > 0:
        u = _add_products(u, w_rows, pitch * pitch, s, g, run, s_strides, norms, norm_strides, index_ptr, layer,
                          first_tail + tl.arange(0, TAIL), n, d, Ds, NORMALIZE, TERMS)  # fmt: skip
    if sums is not None:
        powers += total.to(tl.int64) * piece
    _store_gradient(u, s, s_strides, norms, norm_strides, index_ptr, layer, g, run, i, n, d, Ds, along, columns, before,
                    out, d_strides, sums, powers, factor, scale, NORMALIZE)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_group_kernel(
    s_ptr,  # layers of (B, N, Ds)
    t_ptr,  # layers of (B, N, Dt)
    index_ptr,  # layers of (n,), or None
    norms_ptr,  # (2, layers, tokens): r of s, of t; written unless HAS_NORMS
    scale_ptr,  # (layers, G), of a W of raw rows, or None
    partial_ptr,  # (layers * G,)
    w_ptr,  # (programs, TERMS, pitch, pitch): each program's W, of one group after another
    along_ptr,  # (programs, column tiles, n)
    before_ptr,  # layers of float32 gradients that are added, or None
    ds_ptr,  # layers of (B, N, Ds), or of (1, n, Ds) of drawn rows; None if the gradients go to the sums
    sums_ptr,  # float16 (layers, tokens, Ds), or None: gradients that are added to those of ds, or written without ds
    powers_ptr,  # (pieces of BLOCK_D columns, layers, tokens): powers of two that the sums are to be multiplied by
    s_strides, t_strides, norm_strides, d_strides,
    total, tokens, n, G, run, Ds, Dt,
    groups, programs, full, pitch, factor, eps,
    HAS_NORMS: tl.constexpr, HAS_GRAD: tl.constexpr, NORMALIZE: tl.constexpr, RECTIFY_S: tl.constexpr,
    RECTIFY_T: tl.constexpr,
    TERMS: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per multiprocessor's share of the groups. A group has `full` tiles of BLOCK_M rows and, if TAIL > 0,
    one of TAIL rows. W stays in cache: a program overwrites it group by group."""
    local = tl.program_id(0).to(tl.int64)
    term = pitch * pitch
    columns = full + (TAIL > 0)
    w, along = w_ptr + local * TERMS * term, along_ptr + local * columns * n
    block, tail = tl.arange(0, BLOCK_M), full * BLOCK_M + tl.arange(0, TAIL if TAIL > 0 else 1)
    for at in range(tl.program_id(0), groups, programs):
        group = tl.cast(at, tl.int64)
        layer, g = group // G, group % G
        s, t = of_layer(s_ptr, layer), of_layer(t_ptr, layer)
        norms = norms_ptr + layer * tokens
        if not HAS_NORMS:
            for i0 in range(0, n, BLOCK_M):
                i = i0 + block
                to = g * norm_strides[0] + i.to(tl.int64) * norm_strides[1]
                _norms(s, i, to, i < n, g, run, Ds, s_strides, norms, eps, NORMALIZE, BLOCK_M, BLOCK_K)
                _norms(t, i, to, i < n, g, run, Dt, t_strides, norms + total, eps, NORMALIZE, BLOCK_M, BLOCK_K)
            tl.debug_barrier()  # they are read by other threads
        scale = W_SCALE if scale_ptr is None else tl.load(scale_ptr + group)
        sums = None if sums_ptr is None else sums_ptr + layer * tokens * Ds
        powers = None if sums_ptr is None else powers_ptr + layer * tokens

        square = 0.0
        for column_i in range(columns):
            i = column_i * BLOCK_M + block
            for column_j in range(column_i, full):
                square += _tile(
                    s, t, s_strides, t_strides, norms, total, norm_strides, index_ptr, layer, g, run, i,
                    column_j * BLOCK_M + block, n, Ds, Dt, w, along, i, pitch, pitch, term, scale, column_i, column_j,
                    column_i == column_j, HAS_GRAD, True, NORMALIZE, RECTIFY_S, RECTIFY_T, TERMS, BLOCK_M, BLOCK_M,
                    BLOCK_K,
                )  # fmt: skip
            if TAIL > 0:
                square += _tile(
                    s, t, s_strides, t_strides, norms, total, norm_strides, index_ptr, layer, g, run, i,
                    tail, n, Ds, Dt, w, along, i, pitch, pitch, term, scale, column_i, full,
                    column_i == full, HAS_GRAD, True, NORMALIZE, RECTIFY_S, RECTIFY_T, TERMS, BLOCK_M, TAIL, BLOCK_K,
                )  # fmt: skip
        tl.store(partial_ptr + group, square)

        if HAS_GRAD:
            tl.debug_barrier()  # W and its sums are read by other threads
            pieces = tl.cdiv(Ds, BLOCK_D)
            for tile in range(full * pieces):
                _apply(tile // pieces * BLOCK_M + block, tile % pieces, full * BLOCK_M, w, along, s, s_strides, norms,
                       norm_strides, index_ptr, layer, g, run, n, Ds, columns, pitch, before_ptr, ds_ptr, d_strides,
                       sums, powers, total, factor, scale, NORMALIZE, TERMS, TAIL, BLOCK_M, BLOCK_N,
                       BLOCK_D)  # fmt: skip
            if TAIL > 0:
                for piece in range(pieces):
                    _apply(tail, piece, full * BLOCK_M, w, along, s, s_strides, norms, norm_strides, index_ptr, layer,
                           g, run, n, Ds, columns, pitch, before_ptr, ds_ptr, d_strides, sums, powers, total,
                           factor, scale, NORMALIZE, TERMS, TAIL, TAIL, BLOCK_N, BLOCK_D)  # fmt: skip
            tl.debug_barrier()  # the next group's W replaces this one's
