"""Per-channel moments, alone or beside a batch norm: one program per tile of groups, split of their items and layer.

A group is a channel (or a channel of an image), its items the elements averaged: positions, of one image or several.
A block is BLOCK_G groups x BLOCK_N images x BLOCK_P positions, so that no lane divides to find its element. Neighbour
lanes are neighbours in memory: positions in planes, channels in channels-last. Where planes are so small and odd that
their rows of memory start anywhere, as 7 x 7 ones do, each position of a channel is a group until the parts are merged.
Layers of one shape share their launches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import PLANS, Planes, alike, fold_planes, merge_moments, multiprocessors, of_layer
from ._moments_distance import DISTANCE_BLOCK, DISTANCE_LAYERS, _bn_distance_kernel

# The same on every architecture: the kernel only streams memory. 64 x 64 columns spill.
PLANES = 2048  # elements of a block where lanes lie along positions
COLUMNS = (32, 32)  # (BLOCK_G, BLOCK_P) where they lie along channels
WARPS = 4
MERGED = 2048  # elements of a block of partial moments
LAYERS = 16  # that share a launch at most: each is an argument of the kernels
UNFOLDED = 64  # bytes of a position's items below which its partial moments would be too much to move


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
def _scale_of(var_ptr, weight_ptr, channel, mask, eps, HAS_WEIGHT: tl.constexpr):
    """weight / sqrt(running_var + eps)"""
    var = tl.load(var_ptr + channel, mask=mask, other=1.0).to(tl.float32)
    scale = tl.div_rn(tl.full(var.shape, 1.0, tl.float32), tl.sqrt_rn(var + eps))
    if HAS_WEIGHT:
        scale *= tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    return scale


@triton.jit
def _moments_partial_kernel(
    x_ptrs,  # per layer (B, C, H, W)
    partial_ptr,  # (layers, splits, 3, groups)
    y_ptr,  # (B, C, H, W); unused without a batch norm, as the next four
    running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr,  # (C,)
    eps,
    stride_b, stride_c, stride_h, stride_w,
    stride_yb, stride_yc, stride_yh, stride_yw,
    C, W, groups, N, P, tiles, split,
    fold,  # groups of a channel
    PER_IMAGE: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1)
    layer = tl.program_id(2)
    x_ptr = of_layer(x_ptrs, layer)
    if VECTOR > 1:  # tells the compiler that it can load several elements at once
        P = P // VECTOR * VECTOR
        stride_b = stride_b // VECTOR * VECTOR
        stride_c = stride_c // VECTOR * VECTOR
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    in_group = group < groups
    x_group_ptr = x_ptr + _group_offsets(group, C, stride_b, stride_c, PER_IMAGE)[:, None]

    n = tl.zeros((BLOCK_G,), tl.float32)
    mean = tl.zeros((BLOCK_G,), tl.float32)
    m2 = tl.zeros((BLOCK_G,), tl.float32)
    if HAS_NORM:
        channel = group // fold
        scale = _scale_of(running_var_ptr, weight_ptr, channel, in_group, eps, HAS_WEIGHT)
        shift = -tl.load(running_mean_ptr + channel, mask=in_group, other=0.0).to(tl.float32) * scale
        if HAS_BIAS:
            shift += tl.load(bias_ptr + channel, mask=in_group, other=0.0).to(tl.float32)
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

    out = partial_ptr + 3 * (layer * tl.num_programs(1) + k).to(tl.int64) * groups + group
    tl.store(out, n, mask=in_group)
    tl.store(out + groups, mean, mask=in_group)
    tl.store(out + 2 * groups, m2, mask=in_group)


@triton.jit
def _moments_merge_kernel(
    partial_ptr,  # (layers, splits, 3, channels, fold)
    mean_ptr, var_ptr,  # of all layers, end to end
    firsts,  # per layer where its channels begin
    channels,
    splits,
    fold,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    f = tl.arange(0, BLOCK_F)
    in_c = c < channels
    mask = in_c[:, None] & (f < fold)[None, :]
    groups = tl.cast(channels, tl.int64) * fold
    part_ptr = partial_ptr + 3 * layer * splits * groups + c[:, None] * fold + f[None, :]
    n = tl.zeros((BLOCK_C,), tl.float32)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for k in range(splits):
        part = part_ptr + 3 * k * groups
        # The groups of a channel have equally many items.
        each = tl.load(part, mask=mask, other=0.0)
        mean_f = tl.load(part + groups, mask=mask, other=0.0)
        mean_k = tl.sum(mean_f, 1) / fold
        d = tl.where(mask, mean_f - mean_k[:, None], 0.0)
        m2_k = tl.sum(tl.load(part + 2 * groups, mask=mask, other=0.0) + each * d * d, 1)
        n, mean, m2 = merge_moments(n, mean, m2, tl.sum(each, 1), mean_k, m2_k)
    out = of_layer(firsts, layer) + c
    tl.store(mean_ptr + out, mean, mask=in_c)
    tl.store(var_ptr + out, m2 / tl.maximum(n, 1.0), mask=in_c)  # lanes past the last channel hold n = 0


@triton.jit
def _moments_bwd_kernel(
    dmean_ptr, dvar_ptr, mean_ptr,  # of all layers, end to end
    firsts,  # per layer where its channels begin
    x_ptrs, dx_ptrs,  # per layer (B, C, H, W)
    dy_ptr,  # (B, C, H, W); unused without a batch norm, as the next two
    running_var_ptr, weight_ptr,  # (C,)
    eps,
    stride_xb, stride_xc, stride_xh, stride_xw,
    stride_db, stride_dc, stride_dh, stride_dw,
    stride_yb, stride_yc, stride_yh, stride_yw,
    C, W, groups, N, P, tiles, split,
    fold,  # groups of a channel
    PER_IMAGE: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1)
    layer = tl.program_id(2)
    x_ptr, dx_ptr = of_layer(x_ptrs, layer), of_layer(dx_ptrs, layer)
    if VECTOR > 1:  # tells the compiler that it can load several elements at once
        P = P // VECTOR * VECTOR
        stride_xb, stride_db = stride_xb // VECTOR * VECTOR, stride_db // VECTOR * VECTOR
        stride_xc, stride_dc = stride_xc // VECTOR * VECTOR, stride_dc // VECTOR * VECTOR
        if HAS_NORM:
            stride_yb, stride_yc = stride_yb // VECTOR * VECTOR, stride_yc // VECTOR * VECTOR
    group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    in_group = group < groups
    x_group_ptr = x_ptr + _group_offsets(group, C, stride_xb, stride_xc, PER_IMAGE)[:, None]
    dx_group_ptr = dx_ptr + _group_offsets(group, C, stride_db, stride_dc, PER_IMAGE)[:, None]
    items = (tl.cast(N, tl.int64) * P * fold).to(tl.float32)
    channel = group // fold
    at = of_layer(firsts, layer) + channel
    a = tl.load(dmean_ptr + at, mask=in_group, other=0.0) / items
    b = tl.load(dvar_ptr + at, mask=in_group, other=0.0) * (2.0 / items)
    mean = tl.load(mean_ptr + at, mask=in_group, other=0.0)
    if HAS_NORM:
        scale = _scale_of(running_var_ptr, weight_ptr, channel, in_group, eps, HAS_WEIGHT)
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


@dataclass(frozen=True)
class _Launch:
    """How a layer is cut, in programs across groups and splits of their items. `numbers` are the strides of each tensor
    and the sizes, as kernels take them; `options` are their constants. merge: programs of it, and its constants."""

    grid: tuple[int, int]
    groups: int
    fold: int
    numbers: tuple[int, ...]
    options: dict[str, Any]
    merge: tuple[int, dict[str, int]]


def _folded(planes: Planes, itemsize: int) -> tuple[Planes, int]:
    """Return the positions of each channel as groups, and how many, if planes start at odd addresses."""
    B, C, P = planes.B, planes.C, planes.H * planes.W
    are_dense = planes.H == 1 and all((c, w) == (P, 1) for _, c, _, w in planes.strides)
    if not are_dense or P == 1 or P * itemsize % 8 == 0 or B * itemsize < UNFOLDED:
        return planes, 1
    return Planes(1, C * P, 1, B, [(0, 1, 0, b) for b, _, _, _ in planes.strides]), P


@lru_cache(PLANS)
def _launch(
    shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], itemsize: int, per_image: bool, multiprocessors: int
) -> _Launch | None:
    """Blocks along what is adjacent in memory, and enough programs to fill the card; None for tensors that need to be
    copied first, as more than two dimensions of their positions are apart."""
    planes = fold_planes(shape, strides)
    if planes is None:
        return None
    fold, vector = 1, 1
    if not per_image:
        planes, fold = _folded(planes, itemsize)
    B, C, P = planes.B, planes.C, planes.H * planes.W
    groups, N = (B * C, 1) if per_image else (C, B)
    has_rows = planes.H > 1
    if not (per_image or has_rows) and all(b == P * w for b, _, _, w in planes.strides):
        N, P = 1, N * P
    if planes.strides[0][1] == 1 and C > 1:
        BLOCK_G, BLOCK_P = COLUMNS
        BLOCK_P = min(BLOCK_P, triton.next_power_of_2(P)) if fold > 1 else BLOCK_P
        BLOCK_N = 1
    else:
        BLOCK_P = min(triton.next_power_of_2(P), PLANES)
        BLOCK_G, BLOCK_N = (
            (PLANES // BLOCK_P, 1) if per_image else (1, min(PLANES // BLOCK_P, triton.next_power_of_2(N)))
        )
        if not has_rows and all(w == 1 for _, _, _, w in planes.strides):
            vector = gcd(16 // itemsize, P, *(s for b, c, _, _ in planes.strides for s in (b, c)))
    tiles = triton.cdiv(N, BLOCK_N) * triton.cdiv(P, BLOCK_P)
    across = triton.cdiv(groups, BLOCK_G)
    wanted = min(max(8 * multiprocessors // across, 1), tiles, 65535)
    split = triton.cdiv(tiles, wanted)
    options = {
        "PER_IMAGE": per_image, "HAS_ROWS": has_rows, "VECTOR": vector, "BLOCK_G": BLOCK_G, "BLOCK_N": BLOCK_N,
        "BLOCK_P": BLOCK_P, "num_warps": WARPS,
    }  # fmt: skip
    numbers = [n for tensor in planes.strides for n in tensor] + [C, planes.W, groups, N, P, tiles, split, fold]
    BLOCK_F = triton.next_power_of_2(fold)
    BLOCK_C = min(max(MERGED // 16 // BLOCK_F, 1), 128)
    merge = triton.cdiv(groups // fold, BLOCK_C), {"BLOCK_C": BLOCK_C, "BLOCK_F": BLOCK_F}
    return _Launch((across, triton.cdiv(tiles, split)), groups, fold, tuple(numbers), options, merge)


@dataclass(frozen=True)
class _Norm:
    """A batch norm: its (C,) parameters, and y, which forward writes, or dy, which backward reads."""

    other: Tensor
    running_mean: Tensor | None
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def _layers_fwd(
    xs: Sequence[Tensor], mean: Tensor, var: Tensor, firsts: Sequence[int], per_image: bool, norm: _Norm | None = None
) -> None:
    """Write the moments of layers of one shape and layout, and y of the batch norm of the only one."""
    x = xs[0]
    if x.numel() == 0:  # moments of nothing
        channels = x.shape[0] * x.shape[1] if per_image else x.shape[1]
        for first in firsts:
            mean[first : first + channels].fill_(float("nan"))
            var[first : first + channels].fill_(float("nan"))
        return
    strides = (x.stride(), (x if norm is None else norm.other).stride())
    launch = _launch(x.shape, strides, x.itemsize, per_image, multiprocessors(x.device))
    if launch is None:
        dense = None if norm is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        over = None if norm is None or dense is None else replace(norm, other=dense)
        _layers_fwd([x.contiguous() for x in xs], mean, var, firsts, per_image, over)
        if norm is not None and dense is not None:
            norm.other.copy_(dense)
        return
    layers, (across, splits) = len(xs), launch.grid
    partial = x.new_empty((layers, splits, 3, launch.groups), dtype=torch.float32)
    y, *parameters = [x] * 5 if norm is None else [
        norm.other, *(x if v is None else v for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    ]  # fmt: skip
    _moments_partial_kernel[across, splits, layers](
        tuple(xs), partial, y, *parameters, 0.0 if norm is None else norm.eps, *launch.numbers,
        HAS_NORM=norm is not None, HAS_WEIGHT=norm is not None and norm.weight is not None,
        HAS_BIAS=norm is not None and norm.bias is not None, **launch.options,
    )  # fmt: skip
    programs, blocks = launch.merge
    _moments_merge_kernel[programs, layers](
        partial, mean, var, tuple(firsts), launch.groups // launch.fold, splits, launch.fold, **blocks
    )


def _firsts(inputs: Sequence[Tensor], per_image: bool) -> list[int]:
    """Return where the moments of each layer begin, and where the last end."""
    firsts = [0]
    for x in inputs:
        firsts.append(firsts[-1] + (x.shape[0] * x.shape[1] if per_image else x.shape[1]))
    return firsts


def moments_fwd(inputs: list[Tensor], per_image: bool) -> tuple[Tensor, Tensor]:
    firsts = _firsts(inputs, per_image)
    mean = inputs[0].new_empty((firsts[-1],), dtype=torch.float32)
    var = torch.empty_like(mean)
    for layers in alike(inputs, most=LAYERS):
        _layers_fwd([inputs[i] for i in layers], mean, var, [firsts[i] for i in layers], per_image)
    return mean, var


def _layers_bwd(
    dmean: Tensor,
    dvar: Tensor,
    mean: Tensor,
    firsts: Sequence[int],
    xs: Sequence[Tensor],
    per_image: bool,
    norm: _Norm | None = None,
) -> list[Tensor]:
    """Return the gradients of layers of one shape and layout, or that of the input of a batch norm."""
    dxs = [torch.empty_like(x) for x in xs]
    x = xs[0]
    if x.numel() == 0:
        return dxs
    strides = (x.stride(), dxs[0].stride(), (x if norm is None else norm.other).stride())
    launch = _launch(x.shape, strides, x.itemsize, per_image, multiprocessors(x.device))
    if launch is None:
        dense = norm if norm is None else replace(norm, other=norm.other.contiguous())
        found = _layers_bwd(dmean, dvar, mean, firsts, [x.contiguous() for x in xs], per_image, dense)
        return [dx.copy_(d) for dx, d in zip(dxs, found, strict=True)]
    dy, *parameters = (
        (x, x, x) if norm is None else (norm.other, norm.running_var, x if norm.weight is None else norm.weight)
    )
    grid = (*launch.grid, len(xs))
    _moments_bwd_kernel[grid](
        dmean, dvar, mean, tuple(firsts), tuple(xs), tuple(dxs), dy, *parameters, 0.0 if norm is None else norm.eps,
        *launch.numbers, HAS_NORM=norm is not None,
        HAS_WEIGHT=norm is not None and norm.weight is not None, **launch.options,
    )  # fmt: skip
    return dxs


def moments_bwd(dmean: Tensor, dvar: Tensor, inputs: list[Tensor], mean: Tensor, per_image: bool) -> list[Tensor]:
    dmean, dvar, mean = dmean.float().contiguous(), dvar.float().contiguous(), mean.contiguous()
    firsts = _firsts(inputs, per_image)
    found: dict[int, Tensor] = {}
    for layers in alike(inputs, most=LAYERS):
        of_layers = [inputs[i] for i in layers]
        dxs = _layers_bwd(dmean, dvar, mean, [firsts[i] for i in layers], of_layers, per_image)
        found |= zip(layers, dxs, strict=True)
    return [found[i] for i in range(len(inputs))]


def batch_norm_fwd(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    M, V = running_mean.contiguous(), running_var.contiguous()
    w, b = (v if v is None else v.contiguous() for v in (weight, bias))
    y, mean = torch.empty_like(x), x.new_empty(x.shape[1], dtype=torch.float32)
    var = torch.empty_like(mean)
    _layers_fwd([x], mean, var, [0], False, _Norm(y, M, V, w, b, eps))
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
    w = weight if weight is None else weight.contiguous()
    (dx,) = _layers_bwd(dmean, dvar, mean, [0], [x], False, _Norm(dy, None, running_var.contiguous(), w, None, eps))
    return dx


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
    layers = len(channels)
    losses, dmean, dvar = mean.new_empty(layers), torch.empty_like(mean), torch.empty_like(var)
    of_moments, of_targets, sizes, factors = [0], [0], [], []
    for C, B, w in zip(channels, rows, weights, strict=True):
        sizes.append(C * B)
        of_moments.append(of_moments[-1] + C * B)
        of_targets.append(of_targets[-1] + C)
        factors.append({"l2": w, "mse": w / (layers * C), "image": w / B}[distance])
    unbiased = [count / max(count - 1, 1) for count in counts]
    for i in range(0, layers, DISTANCE_LAYERS):
        k = slice(i, min(i + DISTANCE_LAYERS, layers))
        _bn_distance_kernel[(k.stop - i,)](
            mean, var, M, V, losses[k], dmean, dvar, tuple(of_moments[k]), tuple(of_targets[k]), tuple(sizes[k]),
            tuple(channels[k]), tuple(factors[k]), tuple(unbiased[k]), DISTANCE=distance, BLOCK=DISTANCE_BLOCK,
        )  # fmt: skip
    return losses.sum(), dmean, dvar
