"""Batch moments and the BatchNorm-statistic loss over the batch of all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import functional as F
from fastkd.distributed._autograd import Averaged, Gather, mean_over_ranks
from fastkd.distributed._messages import Group
from fastkd.distributed._ranks import About, Own, Ranks, kind
from fastkd.ops._autograd import refuse_transforms
from fastkd.ops._dispatch import Backend, resolve
from fastkd.ops.moments import Distance, Moments, bn_stat_loss_and_moments, check_bn_stat


def _merged(moments: Moments, channels: Sequence[int], counts: Sequence[int], ranks: Ranks) -> Moments:
    """(mean, var) over all ranks from each one's (count, mean, M2 = count var), gathered for all layers at once.

    mean = Σ_r n_r/n mean_r,   M2 = Σ_r M2_r + n_r (mean_r - mean)²,   in float64
    """
    # float64 represents counts up to 2^53 exactly.
    n = torch.tensor(counts, dtype=torch.float64).to(moments[0].device, non_blocking=True)
    flat = [*(x.double() for x in moments), n]
    table = Gather.apply(torch.cat(flat)[None], ranks, [1] * ranks.world)
    means, variances, n = table.split([len(x) for x in flat], 1)
    share = n / n.sum(0)  # (ranks, layers)
    w = torch.cat([share[:, i, None].expand(-1, C) for i, C in enumerate(channels)], 1)
    mean = (w * means).sum(0)
    var = (w * (variances + (means - mean).square())).sum(0)
    return mean.to(moments[0].dtype), var.to(moments[1].dtype)


@torch.compiler.disable
def batch_moments(x: Tensor, *, backend: Backend = "auto", group: Group = None) -> tuple[Tensor, Tensor]:
    """fastkd.batch_moments of the batch of all ranks, merged from (count, mean, M2): Chan et al. 1979.

        mean_c = 1/M Σ x,  var_c = 1/M Σ (x - mean_c)²,  over all images and positions of all ranks

    Per-image moments (dims="image") span no ranks: fastkd.batch_moments.

    Args:
        x: (B, C, ...), this rank's, float64 | float32 | bfloat16 | float16, any strides; all but C may differ between
            ranks. Differentiable: what the caller makes of the moments must be the same on every rank.
        backend: "auto", "eager", "native" or "triton".
        group: a torch.distributed process group that this rank is in; None: the default one.

    Returns:
        (mean, biased var), each (C,), the same on every rank, float32 (float64 for float64 input).

    Raises:
        ValueError: ranks that disagree on channels or dtype, on every rank; as in fastkd.batch_moments, and then on the
            other ranks too.
        TypeError, RuntimeError: as in fastkd.batch_moments; no process group.
    """
    ranks = Ranks(group)
    local: list[Moments] = []

    def arguments() -> Own:
        local.append(F.batch_moments(x, backend=backend))
        return Own({"function": "batch_moments", "x": f"{x.shape[1]} channels {kind(x)}"})

    if ranks.world == 1:
        return F.batch_moments(x, backend=backend)
    ranks.agree(arguments)
    mean, var = _merged(local[0], [x.shape[1]], [x[:, 0].numel()], ranks)
    return Averaged.apply(mean, ranks.world), Averaged.apply(var, ranks.world)


@torch.compiler.disable
def bn_stat_loss_and_global_moments(
    inputs: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    distance: Distance,
    layer_weights: Sequence[float] | None,
    momentum: float | None,
    ema: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    moments: Sequence[Moments] | None,
    backend: Backend,
    group: Group,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return bn_stat_loss and the compared means and variances of all layers end to end (this rank's for "image")."""
    ranks = Ranks(group)
    options = (distance, layer_weights, momentum, ema, moments)
    if ranks.world == 1:
        return bn_stat_loss_and_moments(inputs, running_means, running_vars, *options, backend)

    def arguments() -> Own:
        check_bn_stat(inputs, running_means, running_vars, *options, spans_ranks=True)
        about: About = {"function": "bn_stat_loss", "layers": len(inputs), "distance": distance, "momentum": momentum}
        about["layer_weights"] = None if layer_weights is None else list(layer_weights)
        for i, x in enumerate(inputs):
            resolve(backend, "moments_fwd", x)
            about[f"inputs[{i}]"] = f"{x.shape[1]} channels {kind(x)}"
            if distance == "image" and len(x) != len(inputs[0]):
                raise ValueError(f"inputs must hold the same images, got {len(inputs[0])} and {len(x)}")
        refuse_transforms("bn_stat_loss")
        return Own(about, len(inputs[0]))

    def merge(own: Moments) -> Moments:
        if distance == "image":
            return own
        return _merged(own, [x.shape[1] for x in inputs], [x[:, 0].numel() for x in inputs], ranks)

    sizes = ranks.agree(arguments).sizes
    loss, mean, var = bn_stat_loss_and_moments(inputs, running_means, running_vars, *options, backend, merge)
    if distance == "image":
        return mean_over_ranks([loss], ranks, sizes)[0], mean, var
    return Averaged.apply(loss, ranks.world), mean, var


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
    group: Group = None,
) -> Tensor:
    """fastkd.bn_stat_loss with the statistics of the batch of all ranks (DeepInversion, arXiv:1912.08795; GDFQ,
    arXiv:2003.03603; ZeroQ, arXiv:2001.00281). One message carries the moments of all layers.

    Args:
        inputs: per layer this rank's BatchNorm input (B, C, ...); all but C may differ between ranks. Differentiable.
        running_means, running_vars, ema: per layer (C,), the same on every rank. Constants.
        distance, layer_weights, momentum: as in fastkd.bn_stat_loss; "image" is the mean over all ranks' images. One
            element per channel on a rank is enough, except for "image".
        moments: per layer (mean, biased var) of this rank's input, as in fastkd.bn_stat_loss. Differentiable.
        backend: "auto", "eager", "native" or "triton".
        group: a torch.distributed process group that this rank is in; None: the default one.

    Returns:
        Scalar, the same on every rank, float32 (float64 for float64 input).

    Raises:
        ValueError: ranks that disagree on layers, channels, dtypes or options, on every rank; as in
            fastkd.bn_stat_loss, and then on the other ranks too.
        TypeError, RuntimeError: as in fastkd.bn_stat_loss; no process group.
    """
    loss, _, _ = bn_stat_loss_and_global_moments(
        inputs, running_means, running_vars, distance, layer_weights, momentum, ema, moments, backend, group
    )
    return loss
