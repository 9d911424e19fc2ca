"""Kernels of Gram matrices: exact products of 8-bit digits, and the gradient as a product with two float16 terms.

A number v of a scaled row, |v| <= 1, is held as v = Σ_a 2**(-6 - 8a) v_a by four digits of 8 bits, to 2**-31. The Grams
of such numbers are sums of whole numbers, so that they are exact, however near a match is.
"""

import triton
import triton.language as tl

from ._relation_maps import _of_triangle
from ._relation_rows import _load, _norms, _row_pointers, _scales, _terms
from ._relation_tiles import UNSPECIALIZED

DIGITS = tl.constexpr(4)
LEVELS = tl.constexpr(2.0**-44)  # what 1 is worth in a product of the last level, digits 1 and 3 or 2 and 2


@triton.jit
def _power_of_two(r):
    """Return the power of two below a positive r, which is normal."""
    return (r.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _store_digits(ptr, group, i, n, run, D, strides, peak, r_out, planes, plane, pitch, eps, NORMALIZE: tl.constexpr,
                  BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Store r of rows i, and the digits of the rows at columns of planes (D, pitch); return how many numbers have none:
    NaN and infinity."""
    mask = i < n
    r = _norms(ptr, i, i, mask, group, run, D, strides, r_out, eps, NORMALIZE, BLOCK_R, BLOCK_K)
    scale = r if peak is None else tl.zeros_like(r) + _power_of_two(tl.load(peak))
    rows = _row_pointers(ptr, group, i, run, strides)
    lost = 0
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = _load(rows, mask, k, D, strides[3]).to(tl.float32) * scale[:, None]
        is_known = tl.abs(v) <= 2.0
        lost += tl.sum(tl.where(is_known, 0, 1))
        rest = tl.floor(tl.where(is_known, v, 0.0) * 1073741824.0 + 0.5).to(tl.int32)  # 2**30
        out = planes[:, None] + k.to(tl.int64)[None, :] * pitch
        for a in tl.static_range(DIGITS - 1, 0, -1):
            digit = ((rest + 128) & 255) - 128
            rest = (rest - digit) >> 8
            tl.store(out + a * plane, digit.to(tl.int8), mask=(k < D)[None, :])
        tl.store(out, rest.to(tl.int8), mask=(k < D)[None, :])
    return lost


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_digits_kernel(
    s_ptr,  # (B, N, Ds)
    t_ptr,  # (B, N, Dt)
    peaks_ptr,  # (2, G): the inverse of the largest |x| of a network's group, or None of unit rows
    norms_ptr,  # (2, G, n): r of s, of t
    planes_ptr,  # (groups, DIGITS, Ds + Dt, pitch): a column for every row of a piece of a group, zeros past the last
    lost_ptr,  # (groups, 2, blocks): numbers without digits
    s_strides, t_strides,
    n, G, run, Ds, Dt,
    first_group, first_row, blocks, pitch, eps,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_R rows of a network and group."""
    local = tl.program_id(2).to(tl.int64)
    group = first_group + local
    column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = first_row + column
    plane = (Ds + Dt) * pitch
    planes = planes_ptr + local * DIGITS * plane + column
    peaks, norms = None if peaks_ptr is None else peaks_ptr + group, norms_ptr + group * n
    lost = lost_ptr + local * 2 * blocks + first_row // BLOCK_R + tl.program_id(0)
    if tl.program_id(1) == 0:
        tl.store(lost, _store_digits(s_ptr, group, i, n, run, Ds, s_strides, peaks, norms, planes, plane, pitch, eps,
                                     NORMALIZE, BLOCK_R, BLOCK_K))  # fmt: skip
    else:
        if peaks is not None:
            peaks += G
        tl.store(lost + blocks,
                 _store_digits(t_ptr, group, i, n, run, Dt, t_strides, peaks, norms + tl.cast(G, tl.int64) * n,
                               planes + tl.cast(Ds, tl.int64) * pitch, plane, pitch, eps, NORMALIZE, BLOCK_R,
                               BLOCK_K))  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_gram_kernel(
    planes_ptr,  # (groups, DIGITS, D, pitch)
    gram_ptr,  # (groups, pieces, tiles, BLOCK_D, BLOCK_D), float64
    D, pitch, steps, share, pieces, tiles, first_row,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per tile of the upper triangle of ZᵀZ and piece of the rows of Z = [S T]: `share` of `steps` times
    BLOCK_N. A sum has products of at most 2**14 each, four of them per row: 2**15 rows do not fit.

    The products of digits 2 and 3, and of 3 and 3, are left out: 2**-36 of a v v' at most, of either sign.
    """
    tile, piece = tl.program_id(0) % tiles, tl.program_id(0) // tiles % pieces
    tile_i, tile_j = _of_triangle(tile, tl.cdiv(D, BLOCK_D))
    inside = tl.arange(0, BLOCK_D)
    i, j, k = tile_i * BLOCK_D + inside, tile_j * BLOCK_D + inside, tl.arange(0, BLOCK_N)
    plane = D * pitch
    planes = planes_ptr + (tl.program_id(0) // (tiles * pieces)).to(tl.int64) * DIGITS * plane
    # Columns past the last are read as the first, and are not used.
    a = planes + tl.where(i < D, i, 0).to(tl.int64)[:, None] * pitch + k[None, :]
    b = planes + tl.where(j < D, j, 0).to(tl.int64)[:, None] * pitch + k[None, :]
    level_0 = tl.zeros((BLOCK_D, BLOCK_D), tl.int32)
    level_1, level_2, level_3, level_4 = level_0, level_0, level_0, level_0
    for step in range(piece * share, tl.minimum((piece + 1) * share, steps)):
        at = step * BLOCK_N
        a_0, b_0 = tl.load(a + at), tl.trans(tl.load(b + at))
        a_1, b_1 = tl.load(a + plane + at), tl.trans(tl.load(b + plane + at))
        a_2, b_2 = tl.load(a + 2 * plane + at), tl.trans(tl.load(b + 2 * plane + at))
        a_3, b_3 = tl.load(a + 3 * plane + at), tl.trans(tl.load(b + 3 * plane + at))
        level_0 = tl.dot(a_0, b_0, level_0, out_dtype=tl.int32)
        level_1 = tl.dot(a_0, b_1, level_1, out_dtype=tl.int32)
        level_1 = tl.dot(a_1, b_0, level_1, out_dtype=tl.int32)
        level_2 = tl.dot(a_0, b_2, level_2, out_dtype=tl.int32)
        level_2 = tl.dot(a_1, b_1, level_2, out_dtype=tl.int32)
        level_2 = tl.dot(a_2, b_0, level_2, out_dtype=tl.int32)
        level_3 = tl.dot(a_0, b_3, level_3, out_dtype=tl.int32)
        level_3 = tl.dot(a_1, b_2, level_3, out_dtype=tl.int32)
        level_3 = tl.dot(a_2, b_1, level_3, out_dtype=tl.int32)
        level_3 = tl.dot(a_3, b_0, level_3, out_dtype=tl.int32)
        level_4 = tl.dot(a_1, b_3, level_4, out_dtype=tl.int32)
        level_4 = tl.dot(a_2, b_2, level_4, out_dtype=tl.int32)
        level_4 = tl.dot(a_3, b_1, level_4, out_dtype=tl.int32)
    # Carries leave the last four levels one byte each.
    level_3 += level_4 >> 8
    level_2 += level_3 >> 8
    level_1 += level_2 >> 8
    level_0 += level_1 >> 8
    low = (level_4 & 255) | (level_3 & 255) << 8 | (level_2 & 255) << 16
    value = level_0.to(tl.float64) * 256.0 + (level_1 & 255)
    value = value * 16777216.0 + low  # 2**24
    out = gram_ptr + tl.program_id(0).to(tl.int64) * BLOCK_D * BLOCK_D + inside[:, None] * BLOCK_D + inside[None, :]
    if first_row > 0:
        value += tl.load(out)
    tl.store(out, value)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_factor_kernel(
    gram_ptr,  # (groups, pieces, tiles, BLOCK_D, BLOCK_D), float64
    lost_ptr,  # (groups, 2, blocks)
    peaks_ptr,  # (2, G), or None
    partial_ptr,  # (G, tiles, 4), float64
    f_ptr,  # (2, groups, D, f_pitch): [SᵀS; TᵀS] in two float16 terms, or None
    G, D, Ds, first_group, pieces, tiles, blocks, f_pitch, term, scale,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per quarter of a tile of a group's Gram matrix: its share of ||SᵀS||² - 2||SᵀT||² + ||TᵀT||², and the
    gradient's factor: of the scaled rows, times `scale`, which leaves room in float16."""
    HALF: tl.constexpr = BLOCK_D // 2
    tile, part, local = tl.program_id(0) // 4, tl.program_id(0) % 4, tl.program_id(1).to(tl.int64)
    group = first_group + local
    tile_i, tile_j = _of_triangle(tile, tl.cdiv(D, BLOCK_D))
    i, j = part // 2 * HALF + tl.arange(0, HALF), part % 2 * HALF + tl.arange(0, HALF)
    at = i[:, None] * BLOCK_D + j[None, :]
    value = tl.zeros((HALF, HALF), tl.float64)
    for piece in range(pieces):
        value += tl.load(gram_ptr + ((local * pieces + piece) * tiles + tile) * BLOCK_D * BLOCK_D + at)
    lost = 0
    for block in range(0, 2 * blocks, BLOCK):
        x = block + tl.arange(0, BLOCK)
        lost += tl.sum(tl.load(lost_ptr + local * 2 * blocks + x, mask=x < 2 * blocks, other=0))
    value = tl.where(lost > 0, float("nan"), value * LEVELS)

    i, j = tile_i * BLOCK_D + i, tile_j * BLOCK_D + j
    of_s_i, of_s_j = i < Ds, j < Ds
    true = value
    if peaks_ptr is not None:
        c_s = 1.0 / _power_of_two(tl.load(peaks_ptr + group)).to(tl.float64)
        c_t = 1.0 / _power_of_two(tl.load(peaks_ptr + G + group)).to(tl.float64)
        true = value * tl.where(of_s_i, c_s, c_t)[:, None] * tl.where(of_s_j, c_s, c_t)[None, :]
    times = tl.where(i[:, None] < j[None, :], 2.0, tl.where(i[:, None] == j[None, :], 1.0, 0.0))
    times = tl.where(of_s_i[:, None] == of_s_j[None, :], times, -times)
    in_gram = (i < D)[:, None] & (j < D)[None, :]
    tl.store(
        partial_ptr + (group * tiles + tile) * 4 + part,
        tl.sum(tl.where(in_gram, true * true * times.to(tl.float64), 0.0)),
    )

    if f_ptr is not None:
        high, low = _terms(value.to(tl.float32) * scale)
        f = f_ptr + local * D * f_pitch
        rows, columns = i.to(tl.int64), j.to(tl.int64)
        out, mask = f + rows[:, None] * f_pitch + columns[None, :], (i < D)[:, None] & of_s_j[None, :]
        tl.store(out, high, mask=mask)
        tl.store(out + term, low, mask=mask)
        if tile_i < tile_j:
            out, mask = f + columns[:, None] * f_pitch + rows[None, :], (j < D)[:, None] & of_s_i[None, :]
            tl.store(out, tl.trans(high), mask=mask)
            tl.store(out + term, tl.trans(low), mask=mask)


@triton.jit
def _factor_products(rows, mask, c, stride_d, D, f, f_pitch, term, d, Ds, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
                     BLOCK_D: tl.constexpr):  # fmt: skip
    """Σ_k c x_k f_kd of rows at these pointers. float16 holds c x exactly, or in two terms if it is float32; digits
    below 2**-36 of a row are lost."""
    u = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    in_d = (d < Ds)[None, :]
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = _load(rows, mask, k, D, stride_d)
        x_high, x_low = _terms(x.to(tl.float32) * c[:, None])
        at = f + k.to(tl.int64)[:, None] * f_pitch + d[None, :]
        in_f = (k < D)[:, None] & in_d
        high = tl.load(at, mask=in_f, other=0.0)
        u = tl.dot(x_high, tl.load(at + term, mask=in_f, other=0.0), u)
        if x.dtype == tl.float32:
            u = tl.dot(x_low, high, u)
        u = tl.dot(x_high, high, u)
    return u


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _relation_gram_apply_kernel(
    s_ptr,  # (B, N, Ds)
    t_ptr,  # (B, N, Dt)
    norms_ptr,  # (2, G, n)
    peaks_ptr,  # (2, G), or None
    f_ptr,  # (2, groups, D, f_pitch)
    ds_ptr,  # (B, N, Ds)
    s_strides, t_strides, d_strides,
    n, G, run, Ds, Dt, first_group, f_pitch, term, factor,
    NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M rows of a group: dŜ = S(SᵀS) - T(TᵀS), in pieces of BLOCK_D columns. The projection of
    unit rows needs <ŝ, dŜ> first, for which all pieces but the last are formed twice."""
    local = tl.program_id(1).to(tl.int64)
    group = first_group + local
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = i < n
    r_s = tl.load(norms_ptr + group * n + i, mask=mask, other=0.0)
    r_t = tl.load(norms_ptr + (G + group) * n + i, mask=mask, other=0.0)
    c_s, m_s = _scales(r_s, NORMALIZE)
    c_t, m_t = _scales(r_t, NORMALIZE)
    if peaks_ptr is not None:
        e_s = 1.0 / _power_of_two(tl.load(peaks_ptr + group))
        e_t = 1.0 / _power_of_two(tl.load(peaks_ptr + G + group))
        m_s, m_t, factor = m_s * e_s, m_t * e_t, factor * e_s
    s, t = _row_pointers(s_ptr, group, i, run, s_strides), _row_pointers(t_ptr, group, i, run, t_strides)
    out = _row_pointers(ds_ptr, group, i, run, d_strides)
    f = f_ptr + local * (Ds + Dt) * f_pitch
    pieces = tl.cdiv(Ds, BLOCK_D)
    along = tl.zeros((BLOCK_M,), tl.float32)
    first_stored = pieces - 1 if NORMALIZE else 0
    for step in range(first_stored + pieces):
        d = step % pieces * BLOCK_D + tl.arange(0, BLOCK_D)
        u_t = _factor_products(t, mask, c_t, t_strides[3], Dt, f + tl.cast(Ds, tl.int64) * f_pitch, f_pitch, term, d,
                               Ds, BLOCK_M, BLOCK_K, BLOCK_D)  # fmt: skip
        u_s = _factor_products(s, mask, c_s, s_strides[3], Ds, f, f_pitch, term, d, Ds, BLOCK_M, BLOCK_K, BLOCK_D)
        # Equal networks have equal products: the selects keep compilers from contracting one with the difference.
        u_t = tl.where(mask[:, None], u_t * m_t[:, None], 0.0)
        u_s = tl.where(mask[:, None], u_s * m_s[:, None], 0.0)
        u = u_s - u_t
        if NORMALIZE:
            unit = _load(s, mask, d, Ds, s_strides[3]).to(tl.float32) * r_s[:, None]
            if step < pieces:
                along += tl.sum(unit * u, 1)
            u = r_s[:, None] * (u - unit * along[:, None])
        if step >= first_stored:
            tl.store(out[:, None] + d.to(tl.int64)[None, :] * d_strides[3], (u * factor).to(out.dtype.element_ty),
                     mask=mask[:, None] & (d < Ds)[None, :])  # fmt: skip
