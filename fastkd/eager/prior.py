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


def prior_loss(
    tv_l1: Tensor, tv_l2: Tensor, norms: Tensor, of_tv_l1: float, of_tv_l2: float, of_norm: float, per_image: bool
) -> tuple[Tensor, Tensor]:
    """The weighted sum of what prior_fwd gives, and its slopes by each of those numbers."""
    if per_image:
        norm, slope = norms.mean(), torch.full_like(norms, 1 / len(norms))
    else:
        # The slope at a norm of 0 is 0; at subnormal ones it would be infinite.
        held = norms.masked_fill(norms < torch.finfo(norms.dtype).tiny, 0).double()
        wide = torch.linalg.vector_norm(held)
        norm, slope = wide.to(norms.dtype), (held / wide).masked_fill_(wide == 0, 0).to(norms.dtype)
    terms = ((of_tv_l1, tv_l1.sum()), (of_tv_l2, tv_l2.sum()), (of_norm, norm))
    loss = torch.stack([w * term for w, term in terms if w != 0] or [0 * norms.sum()]).sum()  # infinite ones times 0
    of_image = torch.zeros_like(slope) if of_norm == 0 else of_norm * slope
    return loss, torch.cat([torch.full_like(tv_l1, of_tv_l1), torch.full_like(tv_l2, of_tv_l2), of_image])


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
