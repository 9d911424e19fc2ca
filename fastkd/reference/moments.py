"""Batch moments and the batch-norm statistic losses."""

from collections.abc import Sequence

import torch
from torch import Tensor


def batch_moments(x: Tensor, *, dims: str = "batch") -> tuple[Tensor, Tensor]:
    """mean_c = 1/M Σ x, var_c = 1/M Σ (x - mean_c)², over batch and space ("batch") or space alone ("image")."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:2], -1)  # (B, C, positions)
    over = [2] if dims == "image" else [0, 2]
    mean = x.mean(over, keepdim=True)
    return mean.squeeze(over), (x - mean).square().mean(over)


def batch_norm_moments(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = weight (x - running_mean) / √(running_var + eps) + bias, and the batch_moments of x."""
    shape = [1, -1, *[1] * (x.ndim - 2)]
    acc = torch.promote_types(x.dtype, torch.float32)
    y = (x.to(acc) - running_mean.view(shape)) / (running_var.to(acc).view(shape) + eps).sqrt()
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype), *batch_moments(x)


def bn_stat_loss(
    inputs: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    *,
    distance: str = "l2",
    layer_weights: Sequence[float] | None = None,
    momentum: float | None = None,
    ema: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> Tensor:
    """Distance of batch statistics to running ones, summed over layers; arguments as in fastkd.bn_stat_loss."""
    total = torch.zeros((), dtype=torch.promote_types(inputs[0].dtype, torch.float32), device=inputs[0].device)
    weights = layer_weights or [1.0] * len(inputs)
    for i, (x, mu, var, w) in enumerate(zip(inputs, running_means, running_vars, weights, strict=True)):
        m, v = batch_moments(x, dims="image" if distance == "image" else "batch")
        mu, var = mu.to(m), var.to(v)
        if momentum is not None and ema is not None:
            m = (1 - momentum) * m + momentum * ema[0][i].to(m)
            v = (1 - momentum) * v + momentum * ema[1][i].to(v)
        if distance == "l2":
            total = total + w * ((var - v).norm() + (mu - m).norm())
        elif distance == "mse":
            total = total + w * ((var - v).square().mean() + (mu - m).square().mean()) / len(inputs)
        else:
            n = x[0, 0].numel()
            sigma, sigma_running = (v * n / (n - 1) + 1e-6).sqrt(), (var + 1e-6).sqrt()
            total = total + w * ((mu - m).square().sum() + (sigma_running - sigma).square().sum()) / len(x)
    return total
