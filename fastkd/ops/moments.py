"""Batch moments in one read, and the batch-norm statistic losses made of them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastkd.ops import _checks as check
from fastkd.ops._autograd import refuse_double_backward, refuse_transforms
from fastkd.ops._dispatch import Backend, call, resolve

Dims = Literal["batch", "image"]
Distance = Literal["l2", "mse", "image"]
Moments = list[tuple[Tensor, Tensor]]  # per layer (mean, var)
Merge = Callable[[Moments], Moments]


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, per_image: bool, impl: Backend) -> tuple[Tensor, Tensor]:
        mean, var = call(impl, "moments_fwd", x, per_image)
        ctx.save_for_backward(x, mean)
        ctx.per_image, ctx.impl = per_image, impl
        return mean, var

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("batch_moments")
        x, mean = ctx.saved_tensors
        return call(ctx.impl, "moments_bwd", dmean, dvar, x, mean, ctx.per_image), None, None


def batch_moments(x: Tensor, *, dims: Dims = "batch", backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel in one read: the statistic of DeepInversion (Yin et al. 2020,
    arXiv:1912.08795) and of ZeroQ per image (Cai et al. 2020, arXiv:2001.00281).

        mean_c = 1/M Σ x,  var_c = 1/M Σ (x - mean_c)²,  dx = dmean_c/M + 2 dvar_c (x - mean_c)/M

    Args:
        x: (B, C, ...), float64 | float32 | bfloat16 | float16, any strides (tokens: pass x.transpose(1, 2)).
            Differentiable.
        dims: "batch" over images and positions (M = B h w), "image" over the positions of each image (M = h w).
        backend: "auto", "eager", "native" or "triton".

    Returns:
        (mean, var), each (C,) or, per image, (B, C); float32 (float64 for float64 input).

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: fewer than 2 dimensions, an empty tensor, or unknown dims.
        RuntimeError: the named backend cannot run here; differentiated twice; under vmap or torch.func.
    """
    check.tensor("x", x, range(2, 16), "(B, C, ...)")
    check.not_empty("x", x)
    check.one_of("dims", dims, ("batch", "image"))
    refuse_transforms("batch_moments")
    return _Moments.apply(x, dims == "image", resolve(backend, "moments_fwd", x))


def _check_layers(name: str, layers: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    if len(layers) != len(inputs):
        raise ValueError(f"{name} must have one tensor per layer, got {len(layers)} for {len(inputs)} inputs")
    for i, (v, x) in enumerate(zip(layers, inputs, strict=True)):
        check.tensor(f"{name}[{i}]", v, 1, "(C,)")
        if len(v) != x.shape[1]:
            raise ValueError(f"{name}[{i}] must have the {x.shape[1]} channels of inputs[{i}], got {len(v)}")
        check.same_device(**{f"inputs[{i}]": x, f"{name}[{i}]": v})
        check.constant(f"{name}[{i}]", v)


def check_bn_stat(
    inputs: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    distance: Distance,
    layer_weights: Sequence[float] | None,
    momentum: float | None,
    ema: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    spans_ranks: bool,
) -> None:
    """What bn_stat_loss raises about its arguments, before anything runs."""
    check.one_of("distance", distance, ("l2", "mse", "image"))
    if len(inputs) == 0:
        raise ValueError("inputs must hold at least one layer, got none")
    for i, x in enumerate(inputs):
        check.tensor(f"inputs[{i}]", x, range(2, 16), "(B, C, ...)")
        check.not_empty(f"inputs[{i}]", x)
        elements = x[0, 0].numel() if distance == "image" else x[:, 0].numel()
        if elements < (1 if spans_ranks and distance != "image" else 2):
            raise ValueError(
                f"inputs[{i}] must hold at least 2 elements per channel{' and image' if distance == 'image' else ''} "
                f"to have a variance, got {tuple(x.shape)}"
            )
    _check_layers("running_means", running_means, inputs)
    _check_layers("running_vars", running_vars, inputs)
    if (momentum is None) != (ema is None):
        raise ValueError("momentum and ema go together: give both or neither")
    if momentum is not None and ema is not None:
        check.number("momentum", momentum, low=0)
        if momentum >= 1:
            raise ValueError(f"momentum must be below 1, got {momentum}")
        _check_layers("ema[0]", ema[0], inputs)
        _check_layers("ema[1]", ema[1], inputs)
    if layer_weights is not None:
        if len(layer_weights) != len(inputs):
            raise ValueError(
                f"layer_weights must have one number per layer, got {len(layer_weights)} for {len(inputs)} inputs"
            )
        for i, w in enumerate(layer_weights):
            check.number(f"layer_weights[{i}]", w, low=0)


def bn_stat_loss_and_moments(
    inputs: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    distance: Distance,
    layer_weights: Sequence[float] | None,
    momentum: float | None,
    ema: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    backend: Backend,
    merge: Merge | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """bn_stat_loss, and the means and variances that it compared: per layer (C,), or (B, C) in "image".

    merge turns the moments of this rank's images into those of all ranks' images.
    """
    check_bn_stat(
        inputs, running_means, running_vars, distance, layer_weights, momentum, ema, spans_ranks=merge is not None
    )
    weights = [1.0] * len(inputs) if layer_weights is None else layer_weights
    dims: Dims = "image" if distance == "image" else "batch"
    moments = [batch_moments(x, dims=dims, backend=backend) for x in inputs]
    if merge is not None:
        moments = merge(moments)
    terms, means, variances = [], [], []
    for i, (x, mean_running, var_running, w) in enumerate(
        zip(inputs, running_means, running_vars, weights, strict=True)
    ):
        mean, var = moments[i]
        if momentum is not None and ema is not None:
            mean, var = mean.lerp(ema[0][i].to(mean), momentum), var.lerp(ema[1][i].to(var), momentum)
        means.append(mean)
        variances.append(var)
        mean_running, var_running = mean_running.to(mean), var_running.to(var)
        if distance == "l2":
            # vector_norm's gradient at 0 is 0, which a sqrt of a sum would not give.
            norm = torch.linalg.vector_norm
            terms.append(w * (norm(var_running - var) + norm(mean_running - mean)))
        elif distance == "mse":
            squares = (var_running - var).square().mean() + (mean_running - mean).square().mean()
            terms.append(w / len(inputs) * squares)
        else:
            n = x[0, 0].numel()
            sigma, sigma_running = (var * (n / (n - 1)) + 1e-6).sqrt(), (var_running + 1e-6).sqrt()
            squares = (mean_running - mean).square().sum() + (sigma_running - sigma).square().sum()
            terms.append(w / x.shape[0] * squares)
    return torch.stack(terms).sum(), means, variances


def bn_stat_loss(
    inputs: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    *,
    distance: Distance = "l2",
    layer_weights: Sequence[float] | None = None,
    momentum: float | None = None,
    ema: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    backend: Backend = "auto",
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
        backend: "auto", "eager", "native" or "triton".

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        TypeError: inputs or statistics that are not floating-point tensors.
        ValueError: no layer, lists of unequal length, channels that differ, unknown distance, one element per channel
            (the variance of "image" has no value there), momentum without ema or outside [0, 1), a statistic that
            requires a gradient.
    """
    loss, _, _ = bn_stat_loss_and_moments(
        inputs, running_means, running_vars, distance, layer_weights, momentum, ema, backend
    )
    return loss
