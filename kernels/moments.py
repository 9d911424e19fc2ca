"""Per-channel moments: one program per tile of groups and split of their items.

A group is a channel (or a channel of an image), its items the elements averaged. BLOCK_G > 1 lays neighbouring lanes
over channels (channels-last), BLOCK_G = 1 over positions (planes).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Planes, fold_planes, merge_moments, multiprocessors

# (BLOCK_G, BLOCK_I, num_warps), the same on every architecture: the kernel only streams memory.
PLANES = (1, 2048, 4)
COLUMNS = (64, 64, 4)


@triton.jit
def _offsets(group, item, C, HW, W, stride_b, stride_c, stride_h, stride_w, PER_IMAGE: tl.constexpr):
    if PER_IMAGE:
        n, c, position = group // C, group % C, item
    else:
        n, c, position = item // HW, group, item % HW
    return n * stride_b + c * stride_c + position // W * stride_h + position % W * stride_w


@triton.jit
def _moments_partial_kernel(
    x_ptr,  # (B, C, H, W)
    partial_ptr,  # (splits, 3, groups)
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C,
    HW,
    W,
    groups,
    items,
    split,
    PER_IMAGE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    k = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    in_group = group < groups
    begin = k * split
    end = tl.minimum(begin + split, items)

    n = tl.zeros((BLOCK_G,), tl.float32)
    mean = tl.zeros((BLOCK_G,), tl.float32)
    m2 = tl.zeros((BLOCK_G,), tl.float32)
    for i0 in range(begin, end, BLOCK_I):
        item = i0 + tl.arange(0, BLOCK_I)
        offs = _offsets(group[:, None], item[None, :], C, HW, W, stride_b, stride_c, stride_h, stride_w, PER_IMAGE)
        mask = in_group[:, None] & (item < end)[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        n_i = tl.minimum(end - i0, BLOCK_I).to(tl.float32)
        mean_i = tl.sum(x, 1) / n_i
        d = tl.where(mask, x - mean_i[:, None], 0.0)
        n, mean, m2 = merge_moments(n, mean, m2, n_i, mean_i, tl.sum(d * d, 1))

    out = partial_ptr + 3 * k * groups + group
    tl.store(out, n, mask=in_group)
    tl.store(out + groups, mean, mask=in_group)
    tl.store(out + 2 * groups, m2, mask=in_group)


@triton.jit
def _moments_merge_kernel(
    partial_ptr,  # (splits, 3, groups)
    mean_ptr,  # (groups,)
    var_ptr,  # (groups,)
    groups,
    splits,
    BLOCK_G: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    mask = group < groups
    n = tl.zeros((BLOCK_G,), tl.float32)
    mean = tl.zeros((BLOCK_G,), tl.float32)
    m2 = tl.zeros((BLOCK_G,), tl.float32)
    for k in range(splits):
        part = partial_ptr + 3 * k * groups + group
        n_k = tl.load(part, mask=mask, other=0.0)
        mean_k = tl.load(part + groups, mask=mask, other=0.0)
        m2_k = tl.load(part + 2 * groups, mask=mask, other=0.0)
        n, mean, m2 = merge_moments(n, mean, m2, n_k, mean_k, m2_k)
    tl.store(mean_ptr + group, mean, mask=mask)
    tl.store(var_ptr + group, m2 / tl.maximum(n, 1.0), mask=mask)  # lanes past the last group hold n = 0


@triton.jit
def _moments_bwd_kernel(
    dmean_ptr,  # (groups,)
    dvar_ptr,  # (groups,)
    x_ptr,  # (B, C, H, W)
    mean_ptr,  # (groups,)
    dx_ptr,  # (B, C, H, W)
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_db,
    stride_dc,
    stride_dh,
    stride_dw,
    C,
    HW,
    W,
    groups,
    items,
    split,
    PER_IMAGE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    in_group = group < groups
    begin = tl.program_id(1).to(tl.int64) * split
    end = tl.minimum(begin + split, items)
    a = tl.load(dmean_ptr + group, mask=in_group, other=0.0) / items
    b = tl.load(dvar_ptr + group, mask=in_group, other=0.0) * (2.0 / items)
    mean = tl.load(mean_ptr + group, mask=in_group, other=0.0)
    for i0 in range(begin, end, BLOCK_I):
        item = i0 + tl.arange(0, BLOCK_I)
        mask = in_group[:, None] & (item < end)[None, :]
        g, i = group[:, None], item[None, :]
        offs = _offsets(g, i, C, HW, W, stride_xb, stride_xc, stride_xh, stride_xw, PER_IMAGE)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dx = a[:, None] + b[:, None] * (x - mean[:, None])
        offs = _offsets(g, i, C, HW, W, stride_db, stride_dc, stride_dh, stride_dw, PER_IMAGE)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _grid(
    planes: Planes, per_image: bool, device: torch.device
) -> tuple[tuple[int, int], int, int, int, dict[str, int]]:
    """(grid, groups, items, items per split, configuration): enough programs to fill the card."""
    BLOCK_G, BLOCK_I, num_warps = COLUMNS if planes.strides[0][1] == 1 and planes.C > 1 else PLANES
    HW = planes.H * planes.W
    groups, items = (planes.B * planes.C, HW) if per_image else (planes.C, planes.B * HW)
    tiles, most = triton.cdiv(groups, BLOCK_G), min(triton.cdiv(items, BLOCK_I), 65535)
    wanted = min(max(8 * multiprocessors(device) // tiles, 1), most)
    split = triton.cdiv(triton.cdiv(items, wanted), BLOCK_I) * BLOCK_I
    config = {"BLOCK_G": BLOCK_G, "BLOCK_I": BLOCK_I, "num_warps": num_warps}
    return (tiles, triton.cdiv(items, split)), groups, items, split, config


def moments_fwd(x: Tensor, per_image: bool) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2] if per_image else x.shape[1:2], dtype=torch.float32)
    var = torch.empty_like(mean)
    if x.numel() == 0:
        return mean, var
    planes = fold_planes(x)
    if planes is None:
        return moments_fwd(x.contiguous(), per_image)
    grid, groups, items, split, config = _grid(planes, per_image, x.device)
    partial = x.new_empty((grid[1], 3, groups), dtype=torch.float32)
    _moments_partial_kernel[grid](
        x, partial, *planes.strides[0], planes.C, planes.H * planes.W, planes.W, groups, items, split,
        PER_IMAGE=per_image, **config,
    )  # fmt: skip
    _moments_merge_kernel[(triton.cdiv(groups, 128),)](partial, mean, var, groups, grid[1], BLOCK_G=128)
    return mean, var


def moments_bwd(dmean: Tensor, dvar: Tensor, x: Tensor, mean: Tensor, per_image: bool) -> Tensor:
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx
    planes = fold_planes(x, dx)
    if planes is None:
        return dx.copy_(moments_bwd(dmean, dvar, x.contiguous(), mean, per_image))
    grid, groups, items, split, config = _grid(planes, per_image, x.device)
    _moments_bwd_kernel[grid](
        dmean.float().contiguous(), dvar.float().contiguous(), x, mean, dx, *planes.strides[0], *planes.strides[1],
        planes.C, planes.H * planes.W, planes.W, groups, items, split,
        PER_IMAGE=per_image, **config,
    )  # fmt: skip
    return dx
