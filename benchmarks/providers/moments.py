"""Providers of the batch moments: the official hook's copy, var_mean, fastkd, and a floor (one read and write)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from benchmarks.case import Provider, Result
from fastkd import capture

Moments = tuple[Tensor, Tensor]


def hook_moments(x: Tensor) -> Moments:
    """Return the moments as DeepInversion's hook computes them, with the variance of a channels-first copy."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.mean([0, 2, 3]), x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)


def var_mean(x: Tensor) -> Moments:
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), [0, 2, 3], correction=0)
    return mean, var


def read(x: Tensor) -> None:
    x.sum()


def read_and_copy(x: Tensor) -> None:
    x.sum()
    x.clone()


def moments(backward: bool) -> dict[str, Provider]:
    return {
        "eager": Provider(hook_moments),
        "compile": Provider(hook_moments, compiled=True),
        "var_mean": Provider(var_mean),
        "var_mean compile": Provider(var_mean, compiled=True),
        "fastkd": Provider(fastkd.batch_moments),
        "floor": Provider(read_and_copy if backward else read, gated=False),
    }


def _layers(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Split a flat sequence into inputs, running means and running variances."""
    n = len(tensors) // 3
    return tensors[:n], tensors[n : 2 * n], tensors[2 * n :]


def _distances(moments_of: Callable[[Tensor], Moments], *tensors: Tensor) -> Tensor:
    """Σ_l ‖V_l - var_l‖ + ‖M_l - mean_l‖."""
    terms = []
    for x, M, V in zip(*_layers(tensors), strict=True):
        mean, var = moments_of(x)
        terms.append((V - var).norm() + (M - mean).norm())
    return torch.stack(terms).sum()


def _distances_fastkd(*tensors: Tensor) -> Tensor:
    return fastkd.bn_stat_loss(*_layers(tensors))


def layers() -> dict[str, Provider]:
    return {
        "eager": Provider(partial(_distances, hook_moments)),
        "compile": Provider(partial(_distances, hook_moments), compiled=True),
        "var_mean": Provider(partial(_distances, var_mean)),
        "fastkd": Provider(_distances_fastkd),
    }


def batch_norm_and_moments(x: Tensor, M: Tensor, V: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Return an evaluating batch norm and, as DeepInversion's hook computes them, the moments of its input."""
    return F.batch_norm(x, M, V, weight, bias), *hook_moments(x)


def batch_norm() -> dict[str, Provider]:
    return {"eager": Provider(batch_norm_and_moments), "fastkd": Provider(fastkd.batch_norm_moments)}


@cache
def resnet50(dtype: torch.dtype) -> nn.Module:
    """Return a teacher in eval mode with running statistics that are not the initial ones."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet50", pretrained=False, num_classes=100)
    with torch.no_grad():
        model(torch.randn(16, 3, 64, 64))
    return model.eval().requires_grad_(False).to(dtype)


@contextmanager
def _hooks(model: nn.Module, terms: list[Tensor], moments_of: Callable[[Tensor], Moments]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        terms.append(_distances(moments_of, args[0], module.running_mean, module.running_var))  # type: ignore[arg-type]

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_statistics(images: Tensor, labels: Tensor) -> Tensor:
    """Return the other terms of an inversion step: cross-entropy and the image prior."""
    logits = resnet50(images.dtype)(images)
    return F.cross_entropy(logits, labels) + fastkd.image_prior(images, tv_l2=2.5e-5, l2=3e-8)


def with_hooks(moments_of: Callable[[Tensor], Moments], images: Tensor, labels: Tensor) -> Tensor:
    terms: list[Tensor] = []
    with _hooks(resnet50(images.dtype), terms, moments_of):
        loss = without_statistics(images, labels)
    return loss + 0.01 * torch.stack(terms).sum()


def with_capture(fused: bool, images: Tensor, labels: Tensor) -> Tensor:
    with capture.bn_inputs(resnet50(images.dtype), fused=fused) as bn:
        loss = without_statistics(images, labels)
        return loss + 0.01 * fastkd.bn_stat_loss(bn.inputs, bn.running_means, bn.running_vars, moments=bn.moments)


def inversion_step() -> dict[str, Provider]:
    return {
        "eager": Provider(partial(with_hooks, hook_moments)),
        "var_mean": Provider(partial(with_hooks, var_mean)),
        "fastkd": Provider(partial(with_capture, True)),
        "fastkd, not fused": Provider(partial(with_capture, False)),
        "without": Provider(without_statistics, gated=False),
    }


def _differences(x: Tensor) -> tuple[Tensor, ...]:
    """Return the differences of neighbours along rows, columns and both diagonals."""
    diagonal, antidiagonal = x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:]
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :], diagonal, antidiagonal


def total_variations(x: Tensor) -> Result:
    """DeepInversion's TV: L1 (element means) + L2 (norms), in four directions."""
    differences = _differences(x)
    return torch.stack([d.abs().mean() for d in differences] + [d.norm() for d in differences]).sum()


def _prior_fastkd(x: Tensor) -> Tensor:
    return fastkd.image_prior(x, tv_l1=1.0, tv_l2=1.0)


def prior() -> dict[str, Provider]:
    return {
        "eager": Provider(total_variations),
        "compile": Provider(total_variations, compiled=True),
        "fastkd": Provider(_prior_fastkd),
    }
