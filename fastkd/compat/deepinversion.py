"""The batch-norm hook of DeepInversion (deepinversion.py)."""

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastkd.capture import BatchNormInputs, bn_inputs
from fastkd.capture._hooks import before_only
from fastkd.losses import BatchNormStatLoss

if TYPE_CHECKING:
    from fastkd.distributed import Group


class DeepInversionFeatureHook:
    """DeepInversion's batch-norm hook under the name and signature of its code (deepinversion.py).

        r_feature = ‖running_var - var‖ + ‖running_mean - mean‖,  moments of what enters the layer, var biased

    A deep copy of a hooked model is not hooked, unless its hooks are copied along with it (`model.hooks = [..]`).

    Args:
        module: a batch norm layer with running statistics, in eval mode.
        process_group: take the statistics of the images of all its ranks (fastkd.distributed); None, of this
            process's. Not in the original. One message per layer: losses.BatchNormStatLoss needs one for all.

    Raises:
        ValueError: a module that is no batch norm layer, or keeps no running statistics.
    """

    def __init__(self, module: nn.Module, process_group: "Group" = None) -> None:
        self._module, self._group = module, process_group
        self._capture = bn_inputs(module)
        self._layer: BatchNormInputs | None = self._capture.__enter__()
        self._loss = BatchNormStatLoss(process_group=process_group)
        self._value: Tensor | None = None
        self._next_pass = module.register_forward_pre_hook(before_only(module, self._forget))

    def _forget(self, module: nn.Module, args: Any) -> None:
        self._value = None

    @property
    def r_feature(self) -> Tensor:
        """The distance for the latest forward pass, computed when first read; gradients flow to the layer's input.

        Raises:
            RuntimeError: before a forward pass, or after close.
        """
        layer = self._layer
        if layer is None:
            raise RuntimeError("r_feature is read after close(), which let go of the layer's input: read it before")
        (x,) = layer.inputs
        # What was read under no_grad would train nothing.
        wants_grad = x.requires_grad and torch.is_grad_enabled()
        if self._value is None or (wants_grad and not self._value.requires_grad):
            self._value = self._loss([x], layer.running_means, layer.running_vars)
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeepInversionFeatureHook":
        return type(self)(copy.deepcopy(self._module, memo), self._group)

    @property
    def hook(self) -> "DeepInversionFeatureHook":
        """The handle that `hook.hook.remove()` takes off the module."""
        return self

    def remove(self) -> None:
        self.close()

    def close(self) -> None:
        """Take the hook off the module and let go of its input. The original's r_feature stays; here read it before."""
        self._layer = self._value = None
        self._next_pass.remove()
        # A layer that never ran is an error at the end of a `with`, not here.
        with contextlib.suppress(RuntimeError):
            self._capture.__exit__(None, None, None)
