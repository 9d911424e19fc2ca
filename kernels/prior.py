"""Total variation in four directions and the norms of images: one program per plane and band of rows.

Forward sums the differences that end in a row, so that each is taken once. Backward forms the eight around a pixel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import multiprocessors

# (BLOCK_H, BLOCK_W, num_warps), the same on every architecture: the kernels only stream memory.
BLOCKS = (4, 256, 4)


@triton.jit
def _pixels(x_ptr, h, w, H, W, stride_h, stride_w):
    """x[h, w] in float32 and where there is such a pixel; 0 elsewhere."""
    mask = (h >= 0) & (h < H) & (w >= 0) & (w < W)
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
            x, _ = _pixels(base, h, w, H, W, stride_h, stride_w)
            x = tl.where(here, x, 0.0)
            squares += x * x
            left, is_left = _pixels(base, h, w - 1, H, W, stride_h, stride_w)
            d = tl.where(here & is_left, x - left, 0.0)
            a_0 += tl.abs(d)
            s_0 += d * d
            above, is_above = _pixels(base, h - 1, w, H, W, stride_h, stride_w)
            d = tl.where(here & is_above, x - above, 0.0)
            a_1 += tl.abs(d)
            s_1 += d * d
            left, is_left = _pixels(base, h - 1, w - 1, H, W, stride_h, stride_w)
            d = tl.where(here & is_left, x - left, 0.0)
            a_2 += tl.abs(d)
            s_2 += d * d
            right, is_right = _pixels(base, h - 1, w + 1, H, W, stride_h, stride_w)
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
def _slope(d, exists, a, e):
    """a sign(d) + e d where there is such a difference."""
    return tl.where(exists, tl.where(d > 0, a, tl.where(d < 0, -a, 0.0)) + e * d, 0.0)


@triton.jit
def _prior_bwd_kernel(
    x_ptr,  # (B, C, H, W)
    slopes_ptr,  # (2, 4): of sign(d_k), of d_k
    of_image_ptr,  # (B,)
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
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    plane = tl.program_id(0).to(tl.int64)
    b, c = plane // C, plane % C
    base = x_ptr + b * stride_b + c * stride_c
    begin = tl.program_id(1) * band
    end = tl.minimum(begin + band, H)
    of_image = tl.load(of_image_ptr + b)
    for h0 in range(begin, end, BLOCK_H):
        h = (h0 + tl.arange(0, BLOCK_H))[:, None]
        for w0 in range(0, W, BLOCK_W):
            w = (w0 + tl.arange(0, BLOCK_W))[None, :]
            x, here = _pixels(base, h, w, H, W, stride_h, stride_w)
            dx = of_image * x
            for k in tl.static_range(4):
                a = tl.load(slopes_ptr + k)
                e = tl.load(slopes_ptr + 4 + k)
                # Where a difference of direction k that ends here begins.
                up = 0 if k == 0 else 1
                left = 1 if k == 0 or k == 2 else (0 if k == 1 else -1)
                other, exists = _pixels(base, h - up, w - left, H, W, stride_h, stride_w)
                dx += _slope(x - other, exists, a, e)
                other, exists = _pixels(base, h + up, w + left, H, W, stride_h, stride_w)
                dx -= _slope(other - x, exists, a, e)
            out = dx_ptr + b * stride_db + c * stride_dc + h.to(tl.int64) * stride_dh + w.to(tl.int64) * stride_dw
            tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=here & (h < end))


def _grid(images: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """(grid, rows of a band, configuration): enough programs to fill the card."""
    B, C, H, _ = images.shape
    BLOCK_H, BLOCK_W, num_warps = BLOCKS
    wanted = min(max(8 * multiprocessors(images.device) // (B * C), 1), triton.cdiv(H, BLOCK_H))
    band = triton.cdiv(triton.cdiv(H, wanted), BLOCK_H) * BLOCK_H
    return (B * C, triton.cdiv(H, band)), band, {"BLOCK_H": BLOCK_H, "BLOCK_W": BLOCK_W, "num_warps": num_warps}


def _counts(images: Tensor) -> list[int]:
    """Differences per direction; at least 1, so that a direction without any is 0."""
    B, C, H, W = images.shape
    return [max(1, B * C * n) for n in (H * (W - 1), (H - 1) * W, (H - 1) * (W - 1), (H - 1) * (W - 1))]


def prior_fwd(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, C, H, W = images.shape
    grid, band, config = _grid(images)
    partial = images.new_empty((*grid, 9), dtype=torch.float32)
    _prior_fwd_kernel[grid](images, partial, *images.stride(), C=C, H=H, W=W, band=band, **config)
    # Few numbers: one per band. In float64 their order does not show.
    sums = partial.view(B, -1, 9).double().sum(1)
    total = sums.sum(0)
    tv_l1 = torch.stack([t / n for t, n in zip(total[:4].unbind(), _counts(images), strict=True)])
    return tv_l1.float(), total[4:8].sqrt().float(), sums[:, 8].sqrt().float()


def prior_bwd(dtv_l1: Tensor, dtv_l2: Tensor, dnorms: Tensor, images: Tensor, tv_l2: Tensor, norms: Tensor) -> Tensor:
    _, C, H, W = images.shape
    dimages = torch.empty_like(images)
    of_sign = [g / n for g, n in zip(dtv_l1.float().unbind(), _counts(images), strict=True)]
    of_difference = (dtv_l2.float() / tv_l2).masked_fill_(tv_l2 == 0, 0)
    slopes = torch.cat([torch.stack(of_sign), of_difference])
    of_image = (dnorms.float() / norms).masked_fill_(norms == 0, 0)
    grid, band, config = _grid(images)
    _prior_bwd_kernel[grid](
        images, slopes, of_image, dimages, *images.stride(), *dimages.stride(), C=C, H=H, W=W, band=band, **config
    )
    return dimages
