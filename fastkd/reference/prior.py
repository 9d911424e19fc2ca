"""Image priors: total variation in four directions, and the norm of an image."""

import torch
from torch import Tensor


def _differences(x: Tensor) -> tuple[Tensor, ...]:
    """Neighbours along a row, along a column and along both diagonals."""
    return (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )


def total_variation(images: Tensor, *, p: int) -> Tensor:
    """p = 1: Σ_k mean |d_k|. p = 2: Σ_k ‖d_k‖, one norm over the batch. d_k: differences in four directions."""
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    return torch.stack([d.abs().mean() if p == 1 else d.norm() for d in _differences(x)]).sum()


def image_prior(
    images: Tensor, *, tv_l1: float = 0.0, tv_l2: float = 0.0, l2: float = 0.0, l2_per_image: bool = True
) -> Tensor:
    """tv_l1 TV₁ + tv_l2 TV₂ + l2 (mean_b ‖x_b‖ or ‖x‖); arguments as in fastkd.image_prior."""
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    norm = x.flatten(1).norm(dim=1).mean() if l2_per_image else x.norm()
    return tv_l1 * total_variation(images, p=1) + tv_l2 * total_variation(images, p=2) + l2 * norm
