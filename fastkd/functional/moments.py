"""Losses of batch statistics: signatures, formulas, and who runs a call, this process or the ranks of a group."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastkd.ops._dispatch import Backend
from fastkd.ops.moments import (
    BnStatCall,
    Dims,
    Distance,
    Moments,
    check_bn_stat,
    checked_batch_moments,
    run_bn_stat,
)

if TYPE_CHECKING:
    from fastkd.distributed import Group


def batch_moments(x: Tensor, *, dims: Dims = "batch", backend: Backend = "auto", group: "Group" = None) -> Moments:
    """Mean and biased variance per channel in one read: the statistic of DeepInversion (Yin et al. 2020,
    arXiv:1912.08795) and of ZeroQ per image (Cai et al. 2020, arXiv:2001.00281).

        mean_c = 1/M Σ x,  var_c = 1/M Σ (x - mean_c)²,  dx = dmean_c/M + 2 dvar_c (x - mean_c)/M

    Args:
        x: (B, C, ...), float64 | float32 | bfloat16 | float16, any strides (tokens: pass x.transpose(1, 2)).
            Differentiable.
        dims: "batch" over images and positions (M = B h w), "image" over the positions of each image (M = h w).
        backend: "auto", "eager", "native" or "triton".
        group: take the images of all ranks of this process group (fastkd.distributed), merged from (count, mean, M2):
            Chan et al. 1979; None, those of this process. What the caller makes of the moments must then be the same on
            every rank. Per-image moments stay those of this process's images.

    Returns:
        (mean, var), each (C,) or, per image, (B, C); float32 (float64 for float64 input).

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: fewer than 2 dimensions, an empty tensor, or unknown dims.
        RuntimeError: the named backend cannot run here; differentiated twice; under vmap or torch.func.
    """
    if group is not None:
        from fastkd.distributed.moments import batch_moments_over_ranks

        return batch_moments_over_ranks(x, dims, backend, group)
    return checked_batch_moments(x, dims, backend)


def bn_stat_loss(
    inputs: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    *,
    distance: Distance = "l2",
    layer_weights: Sequence[float] | None = None,
    momentum: float | None = None,
    ema: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    moments: Sequence[Moments] | None = None,
    backend: Backend = "auto",
    group: "Group" = None,
) -> Tensor:
    """Distance of the batch statistics of BatchNorm inputs to the running ones, over all layers of a network.

        "l2"     Σ_l w_l ( ||V_l - var_l|| + ||M_l - mean_l|| )             DeepInversion, arXiv:1912.08795
        "mse"    1/L Σ_l w_l ( mean_c (V_l - var_l)² + mean_c (M_l - mean_l)² )       GDFQ, arXiv:2003.03603
        "image"  1/B Σ_l w_l Σ_bc ( (M_l - mean_bl)² + (√(V_l + 1e-6) - √(var_bl + 1e-6))² )  ZeroQ, arXiv:2001.00281

    with M, V running and mean, var batch statistics (var unbiased and per image in "image", biased elsewhere).
    With momentum m and averages ema, (1 - m) batch + m ema is compared (Fast-Datafree, arXiv:2112.06253). A zero
    distance has gradient 0.

    Args:
        inputs: per layer the BatchNorm input (B, C, ...), float64 | float32 | bfloat16 | float16. Differentiable.
        running_means, running_vars: per layer (C,). Constants.
        distance: "l2", "mse" or "image".
        layer_weights: per layer a weight; None is 1 each (DeepInversion's first-layer multiplier: [10, 1, 1, ...]).
        momentum: m in [0, 1), together with ema.
        ema: (means, vars), each per layer (C,). Constants.
        moments: per layer (mean, biased var) of its input, where they are known (capture.bn_inputs(model, fused=True));
            inputs then give shapes alone. Differentiable.
        backend: "auto", "eager", "native" or "triton".
        group: take the statistics of the images of all ranks of this process group (fastkd.distributed), which one
            message carries for all layers; None, those of this process. "image" is the mean over all ranks' images. One
            element per channel on a rank is then enough, except for "image".

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        TypeError: inputs or statistics that are not floating-point tensors.
        ValueError: no layer, lists of unequal length, channels or devices that differ, unknown distance, one element
            per channel (the variance of "image" has no value there), momentum without ema or outside [0, 1), a
            statistic that requires a gradient, moments with "image".
    """
    call = BnStatCall(inputs, running_means, running_vars, distance, layer_weights, momentum, ema, moments, backend)
    return bn_stat_loss_and_moments(call, group)[0]


def bn_stat_loss_and_moments(call: BnStatCall, group: "Group") -> tuple[Tensor, Tensor, Tensor]:
    """Return bn_stat_loss, and the compared means and variances of all layers end to end."""
    if group is not None:
        from fastkd.distributed.moments import bn_stat_over_ranks

        return bn_stat_over_ranks(call, group)
    check_bn_stat(call)
    return run_bn_stat(call)
