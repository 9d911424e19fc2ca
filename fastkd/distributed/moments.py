"""Batch moments and the BatchNorm-statistic loss over the batch of all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.distributed._autograd import Averaged, Gather, mean_over_ranks
from fastkd.distributed._messages import Group
from fastkd.distributed._ranks import About, Own, Ranks, kind
from fastkd.ops._dispatch import Backend, resolve
from fastkd.ops.moments import BnStatCall, Dims, Moments, check_bn_stat, checked_batch_moments, run_bn_stat


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
def batch_moments_over_ranks(x: Tensor, dims: Dims, backend: Backend, group: Group) -> Moments:
    """Return batch_moments of the batch of all ranks; those of images span no ranks."""
    ranks = Ranks(group)
    local: list[Moments] = []

    def arguments() -> Own:
        local.append(checked_batch_moments(x, dims, backend))
        return Own({"function": "batch_moments", "x": f"{x.shape[1]} channels {kind(x)}", "dims": dims})

    if ranks.world == 1:
        return checked_batch_moments(x, dims, backend)
    ranks.agree(arguments)
    if dims == "image":
        return local[0]
    mean, var = _merged(local[0], [x.shape[1]], [x[:, 0].numel()], ranks)
    return Averaged.apply(mean, ranks.world), Averaged.apply(var, ranks.world)


@torch.compiler.disable
def bn_stat_over_ranks(call: BnStatCall, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Return bn_stat_loss of the batch of all ranks, and the compared means and variances of all layers end to end
    (this rank's for "image")."""
    ranks = Ranks(group)
    if ranks.world == 1:
        check_bn_stat(call)
        return run_bn_stat(call)
    inputs, distance, layer_weights = call.inputs, call.distance, call.layer_weights

    def arguments() -> Own:
        check_bn_stat(call, spans_ranks=True)
        about: About = {"function": "bn_stat_loss", "layers": len(inputs), "distance": distance}
        about["momentum"] = call.momentum
        about["layer_weights"] = None if layer_weights is None else list(layer_weights)
        for i, x in enumerate(inputs):
            resolve(call.backend, "moments_fwd", x)
            about[f"inputs[{i}]"] = f"{x.shape[1]} channels {kind(x)}"
            if distance == "image" and len(x) != len(inputs[0]):
                raise ValueError(f"inputs must hold the same images, got {len(inputs[0])} and {len(x)}")
        return Own(about, len(inputs[0]))

    def merge(own: Moments) -> Moments:
        if distance == "image":
            return own
        return _merged(own, [x.shape[1] for x in inputs], [x[:, 0].numel() for x in inputs], ranks)

    sizes = ranks.agree(arguments).sizes
    loss, mean, var = run_bn_stat(call, merge)
    if distance == "image":
        return mean_over_ranks([loss], ranks, sizes)[0], mean, var
    return Averaged.apply(loss, ranks.world), mean, var
