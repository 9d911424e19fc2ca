"""Image priors of inversion: total variation in four directions and the image norm, in one read."""

from typing import Any, Literal

import torch
from torch import Tensor

from fastkd.ops import _checks as check
from fastkd.ops._autograd import refuse_double_backward, refuse_transforms
from fastkd.ops._dispatch import Backend, call, resolve, why_not

Weights = tuple[float, float, float]  # of Σ_k mean |d_k|, of Σ_k ‖d_k‖, of the norms


def _of_few(impl: Backend, device: str, dtype: torch.dtype) -> Backend:
    """Return the backend for the few numbers that one has made of the images: compiled code has none for a GPU."""
    others: tuple[Backend, ...] = ("triton",) if impl == "native" else ()
    return next((name for name in (impl, *others) if why_not("prior_loss", name, device, dtype) is None), "eager")


class _Prior(torch.autograd.Function):
    """The priors' sum, with the slopes by each term: (mean |d_k| (4,), ‖d_k‖ (4,), ‖x_b‖ (B,))."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, function: str, impl: Backend, weights: Weights, per_image: bool) -> Tensor:
        tv_l1, tv_l2, norms = call(impl, "prior_fwd", images)
        few = _of_few(impl, images.device.type, norms.dtype)
        loss, slopes = call(few, "prior_loss", tv_l1, tv_l2, norms, *weights, per_image)
        ctx.save_for_backward(images, tv_l2, norms, slopes)
        ctx.function, ctx.impl = function, impl
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward(ctx.function)
        images, tv_l2, norms, slopes = ctx.saved_tensors
        by_term = (slopes * dloss).split([4, 4, len(norms)])
        return call(ctx.impl, "prior_bwd", *by_term, images, tv_l2, norms), None, None, None, None


def _prior(images: Tensor, function: str, backend: Backend, weights: Weights, per_image: bool) -> Tensor:
    check.tensor("images", images, 4, "(B, C, H, W)")
    check.not_empty("images", images)
    if weights[:2] != (0, 0) and min(images.shape[2:]) < 2:
        raise ValueError(f"images need at least 2 rows and 2 columns to have a variation, got {tuple(images.shape)}")
    refuse_transforms(function)
    impl = resolve(backend, "prior_fwd", images)
    loss: Tensor = _Prior.apply(images, function, impl, weights, per_image)
    return loss


def total_variation(images: Tensor, *, p: Literal[1, 2], backend: Backend = "auto") -> Tensor:
    """Total variation in four directions, as the code of DeepInversion has it (Yin et al. 2020, arXiv:1912.08795).

        p = 1:  Σ_k mean |d_k|,    p = 2:  Σ_k ‖d_k‖  (one unsquared norm per direction over the whole batch)

    with d_k the differences of neighbours along rows, columns and both diagonals. Equal neighbours have gradient 0.

    Args:
        images: (B, C, H, W), H, W >= 2, float64 | float32 | bfloat16 | float16, any strides. Differentiable.
        p: 1 or 2.
        backend: "auto", "eager", "native" or "triton".

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        TypeError: images is not a floating-point tensor.
        ValueError: not 4 dimensions, an empty tensor, fewer than 2 rows or columns, p other than 1 and 2.
        RuntimeError: the named backend cannot run here; differentiated twice; under vmap or torch.func.
    """
    if isinstance(p, bool | Tensor) or p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p!r}")
    weights = (1.0, 0.0, 0.0) if p == 1 else (0.0, 1.0, 0.0)
    return _prior(images, "total_variation", backend, weights, per_image=True)


def image_prior(
    images: Tensor,
    *,
    tv_l1: float = 0.0,
    tv_l2: float = 0.0,
    l2: float = 0.0,
    l2_per_image: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """The image priors of DeepInversion (Yin et al. 2020, arXiv:1912.08795) in one read.

        L = tv_l1 TV₁ + tv_l2 TV₂ + l2 mean_b ‖x_b‖    (l2 ‖x‖ over the whole batch unless l2_per_image)

    with TV_p the total_variation of that p. A constant image has TV gradient 0, a zero image gradient 0.

    Args:
        images: (B, C, H, W), float64 | float32 | bfloat16 | float16, any strides. Differentiable.
        tv_l1, tv_l2, l2: weights >= 0.
        l2_per_image: mean of the images' norms (DeepInversion's ImageNet script) or one norm (its CIFAR script).
        backend: "auto", "eager", "native" or "triton".

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        TypeError: images is not a floating-point tensor, or a weight not a Python number.
        ValueError: not 4 dimensions, an empty tensor, fewer than 2 rows or columns with a variation asked for, a
            weight < 0.
        RuntimeError: the named backend cannot run here; differentiated twice; under vmap or torch.func.
    """
    for name, weight in (("tv_l1", tv_l1), ("tv_l2", tv_l2), ("l2", l2)):
        check.number(name, weight, low=0)
    check.flag("l2_per_image", l2_per_image)
    return _prior(images, "image_prior", backend, (float(tv_l1), float(tv_l2), float(l2)), l2_per_image)
