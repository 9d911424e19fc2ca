"""Per-channel moments, alone or beside a batch norm: one program per tile of groups and split of their items.

A group is a channel (or a channel of an image), its items the elements averaged: positions, of one image or several.
A block is BLOCK_G groups x BLOCK_N images x BLOCK_P positions, so that no lane divides to find its element. Neighbour
lanes are neighbours in memory: positions in planes, channels in channels-last. Layers are launched one after the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Planes, fold_planes, merge_moments, multiprocessors

# The same on every architecture: the kernel only streams memory. 64 x 64 columns spill.
PLANES = 2048  # elements of a block where lanes lie along positions
COLUMNS = (32, 32)  # (BLOCK_G, BLOCK_P) where they lie along channels
WARPS = 4
DISTANCE_BLOCK = 1024


@triton.jit
def _group_offsets(group, C, stride_b, stride_c, PER_IMAGE: tl.constexpr):
    return group // C * stride_b + group % C * stride_c if PER_IMAGE else group * stride_c


@triton.jit
def _item_offsets(n, p, W, stride_b, stride_h, stride_w, HAS_ROWS: tl.constexpr):
    if HAS_ROWS:
        return n * stride_b + (p // W).to(tl.int64) * stride_h + (p % W).to(tl.int64) * stride_w
    return n * stride_b + p.to(tl.int64) * stride_w


@triton.jit
def _items(tile, N, P, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Images and positions of a block, where there are such, and how many."""
    along = tl.cdiv(P, BLOCK_P)
    n0 = tile // along * BLOCK_N
    p0 = tile % along * BLOCK_P
    i = tl.arange(0, BLOCK_N * BLOCK_P)
    n, p = n0 + i // BLOCK_P, p0 + i % BLOCK_P
    count = tl.minimum(N - n0, BLOCK_N) * tl.minimum(P - p0, BLOCK_P)
    return n.to(tl.int64), p, (n < N) & (p < P), count


@triton.jit
def _moments_partial_kernel(
    x_ptr,  # (B, C, H, W)
    partial_ptr,  # (splits, 3, groups)
    y_ptr,  # (B, C, H, W); x without a batch norm, as the next two
    scale_ptr,  # (C,)
    shift_ptr,  # (C,)
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    stride_yb,
    stride_yc,
    stride_yh,
    stride_yw,
    C,
    W,
    groups,
    N,
    P,
    tiles,
    split,
    PER_IMAGE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    k = tl.program_id(1)
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    in_group = group < groups
    x_group_ptr = x_ptr + _group_offsets(group, C, stride_b, stride_c, PER_IMAGE)[:, None]

    n = tl.zeros((BLOCK_G,), tl.float32)
    mean = tl.zeros((BLOCK_G,), tl.float32)
    m2 = tl.zeros((BLOCK_G,), tl.float32)
    if HAS_NORM:
        scale = tl.load(scale_ptr + group, mask=in_group, other=0.0)
        shift = tl.load(shift_ptr + group, mask=in_group, other=0.0)
        y_group_ptr = y_ptr + _group_offsets(group, C, stride_yb, stride_yc, False)[:, None]
    for tile in range(k * split, tl.minimum((k + 1) * split, tiles)):
        image, p, in_items, count = _items(tile, N, P, BLOCK_N, BLOCK_P)
        mask = in_group[:, None] & in_items[None, :]
        offs = _item_offsets(image, p, W, stride_b, stride_h, stride_w, HAS_ROWS)[None, :]
        x = tl.load(x_group_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        n_i = count.to(tl.float32)
        mean_i = tl.sum(x, 1) / n_i
        d = tl.where(mask, x - mean_i[:, None], 0.0)
        n, mean, m2 = merge_moments(n, mean, m2, n_i, mean_i, tl.sum(d * d, 1))
        if HAS_NORM:
            offs = _item_offsets(image, p, W, stride_yb, stride_yh, stride_yw, HAS_ROWS)[None, :]
            y = scale[:, None] * x + shift[:, None]
            tl.store(y_group_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)

    out = partial_ptr + 3 * k.to(tl.int64) * groups + group
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
    dy_ptr,  # (B, C, H, W); x without a batch norm, as the next one
    scale_ptr,  # (C,)
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_db,
    stride_dc,
    stride_dh,
    stride_dw,
    stride_yb,
    stride_yc,
    stride_yh,
    stride_yw,
    C,
    W,
    groups,
    N,
    P,
    tiles,
    split,
    PER_IMAGE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    k = tl.program_id(1)
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    in_group = group < groups
    x_group_ptr = x_ptr + _group_offsets(group, C, stride_xb, stride_xc, PER_IMAGE)[:, None]
    dx_group_ptr = dx_ptr + _group_offsets(group, C, stride_db, stride_dc, PER_IMAGE)[:, None]
    items = (tl.cast(N, tl.int64) * P).to(tl.float32)
    a = tl.load(dmean_ptr + group, mask=in_group, other=0.0) / items
    b = tl.load(dvar_ptr + group, mask=in_group, other=0.0) * (2.0 / items)
    mean = tl.load(mean_ptr + group, mask=in_group, other=0.0)
    if HAS_NORM:
        scale = tl.load(scale_ptr + group, mask=in_group, other=0.0)
        dy_group_ptr = dy_ptr + _group_offsets(group, C, stride_yb, stride_yc, False)[:, None]
    for tile in range(k * split, tl.minimum((k + 1) * split, tiles)):
        image, p, in_items, _ = _items(tile, N, P, BLOCK_N, BLOCK_P)
        mask = in_group[:, None] & in_items[None, :]
        offs = _item_offsets(image, p, W, stride_xb, stride_xh, stride_xw, HAS_ROWS)[None, :]
        x = tl.load(x_group_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dx = a[:, None] + b[:, None] * (x - mean[:, None])
        if HAS_NORM:
            offs = _item_offsets(image, p, W, stride_yb, stride_yh, stride_yw, HAS_ROWS)[None, :]
            dx += scale[:, None] * tl.load(dy_group_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        offs = _item_offsets(image, p, W, stride_db, stride_dh, stride_dw, HAS_ROWS)[None, :]
        tl.store(dx_group_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bn_distance_kernel(
    mean_ptr,  # (n,), of one layer: C channels, several times in "image"
    var_ptr,  # (n,)
    running_mean_ptr,  # (C,)
    running_var_ptr,  # (C,)
    loss_ptr,  # ()
    dmean_ptr,  # (n,)
    dvar_ptr,  # (n,)
    n,
    C,
    weight,  # of a norm ("l2") or of a squared difference
    unbias,
    DISTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    of_mean = tl.zeros((BLOCK,), tl.float32)
    of_var = tl.zeros((BLOCK,), tl.float32)
    for i0 in range(0, n, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        mask = i < n
        var = tl.load(var_ptr + i, mask=mask, other=0.0)
        d = tl.load(mean_ptr + i, mask=mask, other=0.0) - tl.load(running_mean_ptr + i % C, mask=mask, other=0.0)
        V = tl.load(running_var_ptr + i % C, mask=mask, other=0.0)
        if DISTANCE == "image":
            sigma = tl.sqrt_rn(var * unbias + 1e-6)
            e = sigma - tl.sqrt_rn(V + 1e-6)
            tl.store(dvar_ptr + i, weight * unbias * e / sigma, mask=mask)
        else:
            e = var - V
        if DISTANCE == "mse":
            tl.store(dvar_ptr + i, 2 * weight * e, mask=mask)
        if DISTANCE != "l2":
            tl.store(dmean_ptr + i, 2 * weight * d, mask=mask)
        of_mean += d * d
        of_var += tl.where(mask, e * e, 0.0)
    if DISTANCE == "l2":
        norm_mean = tl.sqrt_rn(tl.sum(of_mean, 0))
        norm_var = tl.sqrt_rn(tl.sum(of_var, 0))
        tl.store(loss_ptr, weight * (norm_mean + norm_var))
        w_mean = tl.where(norm_mean == 0, 0.0, weight / norm_mean)
        w_var = tl.where(norm_var == 0, 0.0, weight / norm_var)
        for i0 in range(0, n, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            mask = i < n
            d = tl.load(mean_ptr + i, mask=mask, other=0.0) - tl.load(running_mean_ptr + i, mask=mask, other=0.0)
            e = tl.load(var_ptr + i, mask=mask, other=0.0) - tl.load(running_var_ptr + i, mask=mask, other=0.0)
            tl.store(dmean_ptr + i, w_mean * d, mask=mask)
            tl.store(dvar_ptr + i, w_var * e, mask=mask)
    else:
        tl.store(loss_ptr, weight * (tl.sum(of_mean, 0) + tl.sum(of_var, 0)))


@dataclass(frozen=True)
class _Launch:
    """How a layer is cut: `sizes` are numbers that the kernels take by name, `options` their constants."""

    grid: tuple[int, int]
    sizes: dict[str, int]
    options: dict[str, Any]


def _launch(planes: Planes, per_image: bool, device: torch.device) -> _Launch:
    """Blocks along what is adjacent in memory, and enough programs to fill the card."""
    B, C, P = planes.B, planes.C, planes.H * planes.W
    groups, N = (B * C, 1) if per_image else (C, B)
    has_rows = planes.H > 1
    if not (per_image or has_rows) and all(b == P * w for b, _, _, w in planes.strides):
        N, P = 1, N * P
    if planes.strides[0][1] == 1 and C > 1:
        BLOCK_G, BLOCK_P = COLUMNS
        BLOCK_N = 1
    else:
        BLOCK_P = min(triton.next_power_of_2(P), PLANES)
        BLOCK_G, BLOCK_N = (
            (PLANES // BLOCK_P, 1) if per_image else (1, min(PLANES // BLOCK_P, triton.next_power_of_2(N)))
        )
    tiles = triton.cdiv(N, BLOCK_N) * triton.cdiv(P, BLOCK_P)
    across = triton.cdiv(groups, BLOCK_G)
    wanted = min(max(8 * multiprocessors(device) // across, 1), tiles, 65535)
    split = triton.cdiv(tiles, wanted)
    options = {
        "PER_IMAGE": per_image, "HAS_ROWS": has_rows, "BLOCK_G": BLOCK_G, "BLOCK_N": BLOCK_N, "BLOCK_P": BLOCK_P,
        "num_warps": WARPS,
    }  # fmt: skip
    sizes = {"C": C, "W": planes.W, "groups": groups, "N": N, "P": P, "tiles": tiles, "split": split}
    return _Launch((across, triton.cdiv(tiles, split)), sizes, options)


def _layer_fwd(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    per_image: bool,
    y: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> None:
    """Write the moments of one layer, and y of its batch norm if there is one."""
    if x.numel() == 0:  # moments of nothing
        mean.fill_(float("nan"))
        var.fill_(float("nan"))
        return
    planes = fold_planes(x, x if y is None else y)
    if planes is None:
        dense = None if y is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        _layer_fwd(x.contiguous(), mean, var, per_image, dense, scale, shift)
        if y is not None and dense is not None:
            y.copy_(dense)
        return
    launch = _launch(planes, per_image, x.device)
    splits, groups = launch.grid[1], launch.sizes["groups"]
    partial = x.new_empty((splits, 3, groups), dtype=torch.float32)
    norm = (x, x, x) if y is None else (y, scale, shift)
    _moments_partial_kernel[launch.grid](
        x,
        partial,
        *norm,
        *planes.strides[0],
        *planes.strides[1],
        **launch.sizes,
        HAS_NORM=y is not None,
        **launch.options,
    )
    _moments_merge_kernel[(triton.cdiv(groups, 128),)](partial, mean, var, groups=groups, splits=splits, BLOCK_G=128)


def _layers(inputs: list[Tensor], per_image: bool) -> Iterator[tuple[Tensor, slice]]:
    """Each layer and where its moments stand."""
    first = 0
    for x in inputs:
        last = first + (x.shape[0] * x.shape[1] if per_image else x.shape[1])
        yield x, slice(first, last)
        first = last


def moments_fwd(inputs: list[Tensor], per_image: bool) -> tuple[Tensor, Tensor]:
    layers = list(_layers(inputs, per_image))
    mean = inputs[0].new_empty((layers[-1][1].stop,), dtype=torch.float32)
    var = torch.empty_like(mean)
    for x, k in layers:
        _layer_fwd(x, mean[k], var[k], per_image)
    return mean, var


def _layer_bwd(
    dmean: Tensor,
    dvar: Tensor,
    x: Tensor,
    mean: Tensor,
    per_image: bool,
    dy: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx
    planes = fold_planes(x, dx, x if dy is None else dy)
    if planes is None:
        dense = None if dy is None else dy.contiguous()
        return dx.copy_(_layer_bwd(dmean, dvar, x.contiguous(), mean, per_image, dense, scale))
    launch = _launch(planes, per_image, x.device)
    norm = (x, x) if dy is None else (dy, scale)
    _moments_bwd_kernel[launch.grid](
        dmean, dvar, x, mean, dx, *norm, *planes.strides[0], *planes.strides[1], *planes.strides[2],
        **launch.sizes, HAS_NORM=dy is not None, **launch.options,
    )  # fmt: skip
    return dx


def moments_bwd(dmean: Tensor, dvar: Tensor, inputs: list[Tensor], mean: Tensor, per_image: bool) -> list[Tensor]:
    dmean, dvar, mean = dmean.float().contiguous(), dvar.float().contiguous(), mean.contiguous()
    return [_layer_bwd(dmean[k], dvar[k], x, mean[k], per_image) for x, k in _layers(inputs, per_image)]


def _scale(running_var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    scale = (running_var.float() + eps).rsqrt()
    return scale if weight is None else scale * weight.float()


def batch_norm_fwd(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    scale = _scale(running_var, weight, eps)
    shift = -running_mean.float() * scale if bias is None else bias.float() - running_mean.float() * scale
    y, mean = torch.empty_like(x), torch.empty_like(scale)
    var = torch.empty_like(mean)
    _layer_fwd(x, mean, var, False, y, scale, shift)
    return y, mean, var


def batch_norm_bwd(
    dy: Tensor,
    dmean: Tensor,
    dvar: Tensor,
    x: Tensor,
    mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    eps: float,
) -> Tensor:
    dmean, dvar, mean = dmean.float().contiguous(), dvar.float().contiguous(), mean.contiguous()
    return _layer_bwd(dmean, dvar, x, mean, False, dy, _scale(running_var, weight, eps))


def bn_distance(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    channels: list[int],
    rows: list[int],
    counts: list[int],
    weights: list[float],
    distance: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var, M, V = (v.float().contiguous() for v in (mean, var, running_mean, running_var))
    losses, dmean, dvar = mean.new_empty(len(channels)), torch.empty_like(mean), torch.empty_like(var)
    moment = target = 0
    for i, (C, B, count, w) in enumerate(zip(channels, rows, counts, weights, strict=True)):
        n, own, running = C * B, slice(moment, moment + C * B), slice(target, target + C)
        weight = {"l2": w, "mse": w / (len(channels) * C), "image": w / B}[distance]
        _bn_distance_kernel[(1,)](
            mean[own], var[own], M[running], V[running], losses[i:], dmean[own], dvar[own],
            n=n, C=C, weight=weight, unbias=count / max(count - 1, 1), DISTANCE=distance, BLOCK=DISTANCE_BLOCK,
        )  # fmt: skip
        moment, target = moment + n, target + C
    return losses.sum(), dmean, dvar
