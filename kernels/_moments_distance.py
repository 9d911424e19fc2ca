"""The kernel of the distance to running statistics: one program per layer."""

import triton
import triton.language as tl

from ._common import of_layer

DISTANCE_BLOCK = 1024
DISTANCE_LAYERS = 16  # of a launch at most: each is an argument of the kernel


@triton.jit
def _bn_distance_kernel(
    mean_ptr, var_ptr,  # of all layers, end to end: of each C channels, several times in "image"
    running_mean_ptr, running_var_ptr,  # of all layers, end to end
    loss_ptr,  # (layers,)
    dmean_ptr, dvar_ptr,  # as mean
    firsts, firsts_of_running,  # per layer where its moments and its running statistics begin
    sizes, channels,  # per layer the number of moments, and C
    weights,  # per layer, of a norm ("l2") or of a squared difference
    unbiased,  # per layer the factor of an unbiased variance
    DISTANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    first, first_of_running = of_layer(firsts, layer), of_layer(firsts_of_running, layer)
    n, C = of_layer(sizes, layer), of_layer(channels, layer)
    weight, unbias = of_layer(weights, layer), of_layer(unbiased, layer)
    mean_ptr, var_ptr, dmean_ptr, dvar_ptr = mean_ptr + first, var_ptr + first, dmean_ptr + first, dvar_ptr + first
    running_mean_ptr, running_var_ptr = running_mean_ptr + first_of_running, running_var_ptr + first_of_running
    loss_ptr += layer
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
