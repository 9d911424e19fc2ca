"""Per-channel moments, a few channels at a time: two passes over a chunk that fits in cache."""

import torch
from torch import Tensor

from fastkd._precision import accumulator
from fastkd.eager._common import chunks


def _over(x: Tensor, per_image: bool) -> list[int]:
    """The dimensions a moment is taken over; never none of them, which torch reads as all."""
    return [*([] if per_image else [0]), *range(2, x.ndim)]


def _layer_moments(x: Tensor, per_image: bool) -> tuple[Tensor, Tensor]:
    x = x.unsqueeze(-1)
    acc, over = accumulator(x), _over(x, per_image)
    means, variances = [], []
    for c in (channels := chunks(x.shape[1], x[:, 0].numel())):
        # var_mean subtracts the mean before it squares, so a far-off mean costs no digits.
        chunk = x[:, c : c + channels.step].to(acc)
        var, mean = torch.var_mean(chunk, over, correction=0)
        means.append(torch.where(mean.isnan(), chunk.mean(over), mean))  # its updates turn an infinity into NaN
        variances.append(var)
    return torch.cat(means, -1).flatten(), torch.cat(variances, -1).flatten()


def moments_fwd(inputs: list[Tensor], per_image: bool) -> tuple[Tensor, Tensor]:
    means, variances = zip(*(_layer_moments(x, per_image) for x in inputs), strict=True)
    return torch.cat(means), torch.cat(variances)


def _layer_backward(
    dmean: Tensor,
    dvar: Tensor,
    x: Tensor,
    mean: Tensor,
    per_image: bool,
    norm: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """dx = dmean/M + 2/M dvar (x - mean) + dy scale, with (dy, scale) of a batch norm."""
    acc, over = accumulator(x), _over(x, per_image)
    M = x[0, 0].numel() if per_image else x[:, 0].numel()
    shape = [1 if d in over else n for d, n in enumerate(x.shape)]
    a, b, mean = (v.to(acc).view(shape) for v in (dmean / M, dvar * (2 / M), mean))
    dx = torch.empty_like(x)
    for c in (channels := chunks(x.shape[1], x[:, 0].numel())):
        k = slice(c, c + channels.step)
        d = torch.addcmul(a[:, k], b[:, k], x[:, k].to(acc) - mean[:, k])
        if norm is not None:
            dy, scale = norm
            d = d.addcmul_(dy[:, k].to(acc), scale.view(shape)[:, k])
        dx[:, k] = d.to(x.dtype)
    return dx


def moments_bwd(dmean: Tensor, dvar: Tensor, inputs: list[Tensor], mean: Tensor, per_image: bool) -> list[Tensor]:
    sizes = [x.shape[0] * x.shape[1] if per_image else x.shape[1] for x in inputs]
    layers = zip(inputs, *(v.split(sizes) for v in (dmean, dvar, mean)), strict=True)
    return [_layer_backward(dm, dv, x, m, per_image) for x, dm, dv, m in layers]


def _scale(running_var: Tensor, weight: Tensor | None, eps: float, acc: torch.dtype) -> Tensor:
    scale = (running_var.to(acc) + eps).rsqrt()
    return scale if weight is None else scale * weight.to(acc)


def batch_norm_fwd(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(x)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    scale = _scale(running_var, weight, eps, acc)
    shift = -running_mean.to(acc) * scale if bias is None else bias.to(acc) - running_mean.to(acc) * scale
    scale, shift = scale.view(shape), shift.view(shape)
    y = torch.empty_like(x)
    for c in (channels := chunks(x.shape[1], x[:, 0].numel())):
        k = slice(c, c + channels.step)
        y[:, k] = torch.addcmul(shift[:, k], x[:, k].to(acc), scale[:, k]).to(x.dtype)
    return y, *_layer_moments(x, False)


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
    return _layer_backward(dmean, dvar, x, mean, False, (dy, _scale(running_var, weight, eps, accumulator(x))))


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
    sizes = [C * n for C, n in zip(channels, rows, strict=True)]
    moments = zip(*(v.split(sizes) for v in (mean, var)), strict=True)
    targets = zip(*(v.to(mean.dtype).split(channels) for v in (running_mean, running_var)), strict=True)
    terms, dmeans, dvars = [], [], []
    for (m, v), (M, V), C, n, count, w in zip(moments, targets, channels, rows, counts, weights, strict=True):
        if distance == "image":
            unbias = count / (count - 1)
            sigma = (v * unbias + 1e-6).sqrt_()
            d, e = m - M.repeat(n), sigma - (V + 1e-6).sqrt_().repeat(n)
            terms.append((d.square().sum() + e.square().sum()) * (w / n))
            dmeans.append(d * (2 * w / n))
            dvars.append(e.div_(sigma) * (w * unbias / n))
            continue
        for x, target, gradients in ((m, M, dmeans), (v, V, dvars)):
            d = x - target
            if distance == "l2":
                norm = torch.linalg.vector_norm(d)
                terms.append(w * norm)
                gradients.append((d * w / norm).masked_fill_(norm == 0, 0))
            else:
                terms.append(d.square().sum() * (w / (len(channels) * C)))
                gradients.append(d * (2 * w / (len(channels) * C)))
    return torch.stack(terms).sum(), torch.cat(dmeans), torch.cat(dvars)
