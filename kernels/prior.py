"""Total variation in four directions, the norms of images, and the prior made of them.

One program per plane and band of rows reads the images; few numbers are left to add up, in float64, so that their order
does not show.

Forward sums the differences that end in a row, so that each is taken once. Backward forms the eight around a pixel.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import PLANS, multiprocessors

# The same on every architecture: the kernels only stream memory.
BLOCKS = {"BLOCK_H": 4, "BLOCK_W": 256, "num_warps": 4}
SUMS_BLOCK = 256  # bands that are added up at a time
LOSS_BLOCK = 1024  # norms


@triton.jit
def _pixels(x_ptr, h, w, wanted, H, W, stride_h, stride_w):
    """x[h, w] in float32 and where it is wanted and there is such a pixel; 0 elsewhere."""
    mask = wanted & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    offsets = h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    return tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32), mask


@triton.jit
def _prior_fwd_kernel(
    x_ptr,  # (B, C, H, W)
    partial_ptr,  # (planes, bands, 9): Σ |d_k|, Σ d_k², Σ x²
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C,
    H,
    W,
    band,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    plane = tl.program_id(0).to(tl.int64)
    base = x_ptr + plane // C * stride_b + plane % C * stride_c
    begin = tl.program_id(1) * band
    end = tl.minimum(begin + band, H)
    a_0 = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    a_1 = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    a_2 = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    a_3 = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    s_0 = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    s_1 = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    s_2 = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    s_3 = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    squares = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
    for h0 in range(begin, end, BLOCK_H):
        h = (h0 + tl.arange(0, BLOCK_H))[:, None]
        for w0 in range(0, W, BLOCK_W):
            w = (w0 + tl.arange(0, BLOCK_W))[None, :]
            here = (h < end) & (w < W)
            x, _ = _pixels(base, h, w, here, H, W, stride_h, stride_w)
            squares += x * x
            left, is_left = _pixels(base, h, w - 1, here, H, W, stride_h, stride_w)
            d = tl.where(here & is_left, x - left, 0.0)
            a_0 += tl.abs(d)
            s_0 += d * d
            above, is_above = _pixels(base, h - 1, w, here, H, W, stride_h, stride_w)
            d = tl.where(here & is_above, x - above, 0.0)
            a_1 += tl.abs(d)
            s_1 += d * d
            left, is_left = _pixels(base, h - 1, w - 1, here, H, W, stride_h, stride_w)
            d = tl.where(here & is_left, x - left, 0.0)
            a_2 += tl.abs(d)
            s_2 += d * d
            right, is_right = _pixels(base, h - 1, w + 1, here, H, W, stride_h, stride_w)
            d = tl.where(here & is_right, x - right, 0.0)
            a_3 += tl.abs(d)
            s_3 += d * d
    out = partial_ptr + (plane * tl.num_programs(1) + tl.program_id(1)) * 9
    tl.store(out, tl.sum(tl.sum(a_0, 1), 0))
    tl.store(out + 1, tl.sum(tl.sum(a_1, 1), 0))
    tl.store(out + 2, tl.sum(tl.sum(a_2, 1), 0))
    tl.store(out + 3, tl.sum(tl.sum(a_3, 1), 0))
    tl.store(out + 4, tl.sum(tl.sum(s_0, 1), 0))
    tl.store(out + 5, tl.sum(tl.sum(s_1, 1), 0))
    tl.store(out + 6, tl.sum(tl.sum(s_2, 1), 0))
    tl.store(out + 7, tl.sum(tl.sum(s_3, 1), 0))
    tl.store(out + 8, tl.sum(tl.sum(squares, 1), 0))


@triton.jit
def _count(k, along_rows, along_columns, along_diagonals):
    """Differences of direction k."""
    return tl.where(k == 0, along_rows, tl.where(k == 1, along_columns, along_diagonals))


@triton.jit
def _prior_sums_kernel(
    partial_ptr,  # (B, bands of an image, 9)
    tv_l1_ptr, tv_l2_ptr,  # (4,)
    norms_ptr,  # (B,)
    B, bands,
    along_rows, along_columns, along_diagonals,  # numbers of differences
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per image for its norm, and one for the variations of all."""
    b = tl.program_id(0)
    first = tl.where(b < B, b, 0).to(tl.int64) * bands
    last = tl.where(b < B, first + bands, tl.cast(B, tl.int64) * bands)
    k = tl.arange(0, 16)
    total = tl.zeros((16,), tl.float64)
    for i0 in range(first, last, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        mask = (i < last)[:, None] & (k < 9)[None, :]
        total += tl.sum(tl.load(partial_ptr + i[:, None] * 9 + k[None, :], mask=mask, other=0.0).to(tl.float64), 0)
    root = tl.sqrt(total).to(tl.float32)
    if b < B:
        tl.store(norms_ptr + b + 0 * k, root, mask=k == 8)
    else:
        mean = total / _count(k, along_rows, along_columns, along_diagonals).to(tl.float64)
        tl.store(tv_l1_ptr + k, mean.to(tl.float32), mask=k < 4)
        tl.store(tv_l2_ptr + k - 4, root, mask=(k >= 4) & (k < 8))


@triton.jit
def _prior_loss_kernel(
    tv_l1_ptr, tv_l2_ptr,  # (4,)
    norms_ptr,  # (B,)
    loss_ptr,  # ()
    slopes_ptr,  # (8 + B,)
    B,
    of_tv_l1, of_tv_l2, of_norm,  # weights
    least,  # a norm below it is 0 where all images have one norm
    PER_IMAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, 4)
    absolute = tl.sum(tl.load(tv_l1_ptr + k), 0)
    squared = tl.sum(tl.load(tv_l2_ptr + k), 0)
    total = tl.zeros((BLOCK,), tl.float64)
    for b0 in range(0, B, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        norms = tl.load(norms_ptr + b, mask=b < B, other=0.0)
        if not PER_IMAGE:
            norms = tl.where(norms < least, 0.0, norms)
        wide = norms.to(tl.float64)
        total += wide if PER_IMAGE else wide * wide
    norm = tl.sum(total, 0)
    norm = norm / B if PER_IMAGE else tl.sqrt(norm)
    # A term of weight 0 does not count, even if it is infinite; without any term, such norms make NaN.
    is_nothing = (of_tv_l1 == 0) & (of_tv_l2 == 0) & (of_norm == 0)
    loss = tl.where(is_nothing, 0 * norm.to(tl.float32), 0.0)
    loss += tl.where(of_tv_l1 == 0, 0.0, of_tv_l1 * absolute)
    loss += tl.where(of_tv_l2 == 0, 0.0, of_tv_l2 * squared)
    loss += tl.where(of_norm == 0, 0.0, of_norm * norm.to(tl.float32))
    tl.store(loss_ptr, loss)
    tl.store(slopes_ptr + k, tl.full((4,), 0.0, tl.float32) + of_tv_l1)
    tl.store(slopes_ptr + 4 + k, tl.full((4,), 0.0, tl.float32) + of_tv_l2)
    for b0 in range(0, B, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        if PER_IMAGE:
            slope = tl.full((BLOCK,), 1.0, tl.float32) / B
        else:
            norms = tl.load(norms_ptr + b, mask=b < B, other=0.0)
            norms = tl.where(norms < least, 0.0, norms)
            slope = tl.where(norm == 0, 0.0, norms.to(tl.float64) / norm).to(tl.float32)
        tl.store(slopes_ptr + 8 + b, tl.where(of_norm == 0, 0.0, of_norm * slope), mask=b < B)


@triton.jit
def _ratio(gradient, norm):
    """gradient / norm; a zero norm has gradient 0."""
    return tl.where(norm == 0, 0.0, gradient / norm)


@triton.jit
def _slope(d, exists, a, e):
    """a sign(d) + e d where there is such a difference."""
    return tl.where(exists, tl.where(d > 0, a, tl.where(d < 0, -a, 0.0)) + e * d, 0.0)


@triton.jit
def _prior_bwd_kernel(
    x_ptr,  # (B, C, H, W)
    dtv_l1_ptr, dtv_l2_ptr, tv_l2_ptr,  # (4,)
    dnorms_ptr, norms_ptr,  # (B,)
    dx_ptr,  # (B, C, H, W)
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    stride_db,
    stride_dc,
    stride_dh,
    stride_dw,
    C,
    H,
    W,
    band,
    along_rows, along_columns, along_diagonals,  # numbers of differences
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    b, c = plane // C, plane % C
    base = x_ptr + b * stride_b + c * stride_c
    begin = tl.program_id(1) * band
    end = tl.minimum(begin + band, H)
    of_image = _ratio(tl.load(dnorms_ptr + b), tl.load(norms_ptr + b))
    for h0 in range(begin, end, BLOCK_H):
        h = (h0 + tl.arange(0, BLOCK_H))[:, None]
        for w0 in range(0, W, BLOCK_W):
            w = (w0 + tl.arange(0, BLOCK_W))[None, :]
            x, here = _pixels(base, h, w, h < end, H, W, stride_h, stride_w)
            dx = of_image * x
            for k in tl.static_range(4):
                a = tl.load(dtv_l1_ptr + k) / _count(k, along_rows, along_columns, along_diagonals).to(tl.float32)
                e = _ratio(tl.load(dtv_l2_ptr + k), tl.load(tv_l2_ptr + k))
                # Where a difference of direction k that ends here begins.
                up = 0 if k == 0 else 1
                left = 1 if k == 0 or k == 2 else (0 if k == 1 else -1)
                other, exists = _pixels(base, h - up, w - left, here, H, W, stride_h, stride_w)
                dx += _slope(x - other, exists, a, e)
                other, exists = _pixels(base, h + up, w + left, here, H, W, stride_h, stride_w)
                dx -= _slope(other - x, exists, a, e)
            out = dx_ptr + b * stride_db + c * stride_dc + h.to(tl.int64) * stride_dh + w.to(tl.int64) * stride_dw
            tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=here)


@lru_cache(PLANS)
def _cut(shape: tuple[int, ...], multiprocessors: int) -> tuple[tuple[int, int], int, tuple[int, int, int]]:
    """(grid, rows of a band, counts): enough programs to fill the card; differences along rows, columns and diagonals,
    at least 1, so that a direction without any is 0."""
    B, C, H, W = shape
    BLOCK_H = BLOCKS["BLOCK_H"]
    wanted = min(max(8 * multiprocessors // (B * C), 1), triton.cdiv(H, BLOCK_H))
    band = triton.cdiv(triton.cdiv(H, wanted), BLOCK_H) * BLOCK_H
    along_rows, along_columns, along_diagonals = (
        max(1, B * C * n) for n in (H * (W - 1), (H - 1) * W, (H - 1) * (W - 1))
    )
    return (B * C, triton.cdiv(H, band)), band, (along_rows, along_columns, along_diagonals)


def prior_fwd(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, C, H, W = images.shape
    grid, band, counts = _cut(images.shape, multiprocessors(images.device))
    partial = images.new_empty((*grid, 9), dtype=torch.float32)
    _prior_fwd_kernel[grid](images, partial, *images.stride(), C, H, W, band, **BLOCKS)
    tv_l1, tv_l2, norms = (images.new_empty(n, dtype=torch.float32) for n in (4, 4, B))
    _prior_sums_kernel[(B + 1,)](partial, tv_l1, tv_l2, norms, B, C * grid[1], *counts, BLOCK=SUMS_BLOCK)
    return tv_l1, tv_l2, norms


def prior_loss(
    tv_l1: Tensor, tv_l2: Tensor, norms: Tensor, of_tv_l1: float, of_tv_l2: float, of_norm: float, per_image: bool
) -> tuple[Tensor, Tensor]:
    B = len(norms)
    tv_l1, tv_l2, norms = tv_l1.contiguous(), tv_l2.contiguous(), norms.contiguous()
    loss, slopes = norms.new_empty(()), norms.new_empty(8 + B)
    _prior_loss_kernel[(1,)](
        tv_l1, tv_l2, norms, loss, slopes, B, of_tv_l1, of_tv_l2, of_norm, torch.finfo(torch.float32).tiny,
        PER_IMAGE=per_image, BLOCK=LOSS_BLOCK,
    )  # fmt: skip
    return loss, slopes


def prior_bwd(dtv_l1: Tensor, dtv_l2: Tensor, dnorms: Tensor, images: Tensor, tv_l2: Tensor, norms: Tensor) -> Tensor:
    _, C, H, W = images.shape
    dimages = torch.empty_like(images)
    of_loss = [x.float().contiguous() for x in (dtv_l1, dtv_l2, tv_l2, dnorms, norms)]
    grid, band, counts = _cut(images.shape, multiprocessors(images.device))
    _prior_bwd_kernel[grid](
        images, *of_loss, dimages, *images.stride(), *dimages.stride(), C, H, W, band, *counts, **BLOCKS
    )
    return dimages
