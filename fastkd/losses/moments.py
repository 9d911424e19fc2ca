"""The module over BatchNorm statistics."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastkd.functional.moments import bn_stat_loss_and_moments
from fastkd.ops import _checks as check
from fastkd.ops._dispatch import Backend
from fastkd.ops.moments import BnStatCall, Distance, Moments

if TYPE_CHECKING:
    from fastkd.distributed import Group


def _channels(inputs: Sequence[Tensor]) -> list[int]:
    """Return the layers' channels; none if they are not tensors (B, C, ...), which bn_stat_loss refuses."""
    are_layers = isinstance(inputs, Sequence) and all(isinstance(x, Tensor) and x.ndim > 1 for x in inputs)
    return [x.shape[1] for x in inputs] if are_layers else []


class BatchNormStatLoss(nn.Module):
    """fastkd.bn_stat_loss with its options fixed, and with the moving average of Fast-Datafree kept for it.

    With momentum m the first call compares the batch's own statistics, later ones (1 - m) batch + m average; what was
    compared is then the new average (Fast-Datafree, arXiv:2112.06253), from the same moments, as buffers.

    Args:
        distance: "l2" (DeepInversion), "mse" (GDFQ) or "image" (ZeroQ).
        layer_weights: per layer a weight; None is 1 each. [10, 1, 1, ...] is DeepInversion's first-layer multiplier.
        momentum: m in [0, 1); not with "image", whose statistics belong to single images.
        backend: "auto", "eager", "native" or "triton".
        process_group: take the statistics of the images of all its ranks (fastkd.distributed); None, of this process's.

    Raises:
        TypeError: momentum is not a Python number.
        ValueError: an unknown distance, momentum outside [0, 1) or together with "image".
    """

    ema_mean: Tensor | None
    ema_var: Tensor | None

    def __init__(
        self,
        *,
        distance: Distance = "l2",
        layer_weights: Sequence[float] | None = None,
        momentum: float | None = None,
        backend: Backend = "auto",
        process_group: "Group" = None,
    ) -> None:
        super().__init__()
        check.one_of("distance", distance, ("l2", "mse", "image"))
        if momentum is not None:
            check.number("momentum", momentum, low=0)
            if momentum >= 1:
                raise ValueError(f"momentum must be below 1, got {momentum}")
            if distance == "image":
                raise ValueError('momentum averages batch statistics: use distance "l2" or "mse", got "image"')
        self.distance, self.layer_weights = distance, layer_weights
        self.momentum, self.backend, self.process_group = momentum, backend, process_group
        # All layers' channels end to end, once there has been a call to average.
        self.register_buffer("ema_mean", None)
        self.register_buffer("ema_var", None)

    def extra_repr(self) -> str:
        return f"distance={self.distance!r}, layer_weights={self.layer_weights}, momentum={self.momentum}"

    def forward(
        self,
        inputs: Sequence[Tensor],
        running_means: Sequence[Tensor],
        running_vars: Sequence[Tensor],
        *,
        moments: Sequence[Moments] | None = None,
        update: bool = True,
    ) -> Tensor:
        """fastkd.bn_stat_loss of these layers; the same ones at every call if there is a momentum.

        Args:
            inputs: per layer the BatchNorm input (B, C, ...). Differentiable.
            running_means, running_vars: per layer (C,). Constants.
            moments: per layer (mean, biased var) of its input, where they are known
                (capture.bn_inputs(model, fused=True)). Differentiable.
            update: False leaves the average as it is (Fast-Datafree: several steps, then one update).

        Raises:
            TypeError, ValueError, RuntimeError: as fastkd.bn_stat_loss; channels that are not those of the average.
        """
        check.flag("update", update)
        momentum, ema = None, None
        if self.momentum and self.ema_mean is not None and self.ema_var is not None:
            channels = _channels(inputs)
            fits = sum(channels) == len(self.ema_mean)
            if channels and not fits and self.process_group is None:
                raise ValueError(
                    f"inputs must have the {len(self.ema_mean)} channels of the moving average, got {sum(channels)}"
                )
            # One that does not fit is refused below, where the other ranks learn of it.
            average = (self.ema_mean, self.ema_var)
            mean_ema, var_ema = (x.split(channels) if fits else (x,) for x in average)
            momentum, ema = self.momentum, (mean_ema, var_ema)
        call = BnStatCall(
            inputs,
            running_means,
            running_vars,
            distance=self.distance,
            layer_weights=self.layer_weights,
            momentum=momentum,
            ema=ema,
            moments=moments,
            backend=self.backend,
        )
        loss, mean, var = bn_stat_loss_and_moments(call, self.process_group)
        if self.momentum and update:
            with torch.no_grad():
                if self.ema_mean is None or self.ema_var is None:
                    self.ema_mean, self.ema_var = mean.clone(), var.clone()
                else:
                    self.ema_mean.copy_(mean)
                    self.ema_var.copy_(var)
        return loss

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("ema_mean", "ema_var"):
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and (own is None or own.shape != stored.shape):
                setattr(self, name, torch.empty_like(stored))
        super()._load_from_state_dict(state_dict, prefix, *args)
