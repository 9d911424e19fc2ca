"""Per-channel moments, a few channels at a time: two passes over a chunk that fits in cache."""

import torch
from torch import Tensor

from fastkd._precision import accumulator
from fastkd.eager._common import chunks


def _over(x: Tensor, per_image: bool) -> list[int]:
    """The dimensions a moment is taken over; never none of them, which torch reads as all."""
    return [*([] if per_image else [0]), *range(2, x.ndim)]


def moments_fwd(x: Tensor, per_image: bool) -> tuple[Tensor, Tensor]:
    x = x.unsqueeze(-1)
    acc, over = accumulator(x), _over(x, per_image)
    means, variances = [], []
    for c in (channels := chunks(x.shape[1], x[:, 0].numel())):
        # var_mean subtracts the mean before it squares, so a far-off mean costs no digits.
        var, mean = torch.var_mean(x[:, c : c + channels.step].to(acc), over, correction=0)
        means.append(mean)
        variances.append(var)
    return torch.cat(means, -1), torch.cat(variances, -1)


def moments_bwd(dmean: Tensor, dvar: Tensor, x: Tensor, mean: Tensor, per_image: bool) -> Tensor:
    """dx = dmean/M + 2/M dvar (x - mean)."""
    acc, over = accumulator(x), _over(x, per_image)
    M = x[0, 0].numel() if per_image else x[:, 0].numel()
    shape = [1 if d in over else n for d, n in enumerate(x.shape)]
    a, b, mean = (v.to(acc).view(shape) for v in (dmean / M, dvar * (2 / M), mean))
    dx = torch.empty_like(x)
    for c in (channels := chunks(x.shape[1], x[:, 0].numel())):
        k = slice(c, c + channels.step)
        dx[:, k] = torch.addcmul(a[:, k], b[:, k], x[:, k].to(acc) - mean[:, k]).to(x.dtype)
    return dx
