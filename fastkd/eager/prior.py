"""Image priors, a few images at a time: the differences of one chunk are all that is ever held."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd._precision import accumulator
from fastkd.eager._common import chunks

_FIRST, _LAST, _ALL = slice(None, -1), slice(1, None), slice(None)
# Per direction the two (rows, columns) whose difference is taken: along a row, a column and both diagonals.
_PAIRS = (
    ((_ALL, _LAST), (_ALL, _FIRST)),
    ((_LAST, _ALL), (_FIRST, _ALL)),
    ((_LAST, _LAST), (_FIRST, _FIRST)),
    ((_LAST, _FIRST), (_FIRST, _LAST)),
)


def _counts(images: Tensor) -> list[int]:
    """Differences per direction; at least 1, so that a direction without any is 0."""
    B, C, H, W = images.shape
    return [max(1, B * C * n) for n in (H * (W - 1), (H - 1) * W, (H - 1) * (W - 1), (H - 1) * (W - 1))]


def _pieces(images: Tensor) -> Iterator[tuple[slice, slice]]:
    """(images, channels) that fit in a chunk; a single plane is never cut."""
    B, C, H, W = images.shape
    for b in (several := chunks(B, C * H * W)):
        for c in (planes := chunks(C, min(several.step, B - b) * H * W)):
            yield slice(b, b + several.step), slice(c, c + planes.step)


def prior_fwd(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(images)
    absolute, squares = [], []
    norms = images.new_zeros(len(images), dtype=acc)
    for b, c in _pieces(images):
        x = images[b, c].to(acc)
        for (i, j), (k, m) in _PAIRS:
            d = x[..., i, j] - x[..., k, m]
            absolute.append(d.abs_().sum())
            squares.append(d.square_().sum())
        norms[b] += x.square().sum((1, 2, 3))
    sums = torch.stack(absolute).view(-1, 4).sum(0).unbind()
    tv_l1 = torch.stack([total / n for total, n in zip(sums, _counts(images), strict=True)])
    return tv_l1, torch.stack(squares).view(-1, 4).sum(0).sqrt_(), norms.sqrt_()


def prior_bwd(dtv_l1: Tensor, dtv_l2: Tensor, dnorms: Tensor, images: Tensor, tv_l2: Tensor, norms: Tensor) -> Tensor:
    """dx = Σ_k ±( dtv_l1/n_k sign(d_k) + dtv_l2/‖d_k‖ d_k ) + dnorms/‖x_b‖ x; a zero norm has gradient 0."""
    acc = accumulator(images)

    def ratio(gradient: Tensor, norm: Tensor) -> Tensor:
        return (gradient.to(acc) / norm).masked_fill_(norm == 0, 0)

    of_sign = [g / n for g, n in zip(dtv_l1.to(acc).unbind(), _counts(images), strict=True)]
    of_difference, of_image = ratio(dtv_l2, tv_l2).unbind(), ratio(dnorms, norms)[:, None, None, None]
    dimages = torch.empty_like(images)
    for b, c in _pieces(images):
        x = images[b, c].to(acc)
        dx = of_image[b] * x
        for ((i, j), (k, m)), a, e in zip(_PAIRS, of_sign, of_difference, strict=True):
            d = x[..., i, j] - x[..., k, m]
            d = torch.addcmul(d.sign().mul_(a), d, e)
            dx[..., i, j] += d
            dx[..., k, m] -= d
        dimages[b, c] = dx.to(images.dtype)
    return dimages
