"""Capture the inputs of BatchNorm layers, or collect their moments while the layers normalise."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from fastkd.capture._hooks import (
    Captured,
    Moments,
    ReplacedForward,
    Slot,
    State,
    before_only,
    hooked,
    is_recomputing,
)
from fastkd.capture._modules import unwrap
from fastkd.ops.moments import normalised_with_moments


class BatchNormInputs:
    """`inputs`, `running_means`, `running_vars`: equally long lists in module order, as `bn_stat_loss` takes them.

    The running statistics are the layers' own buffers, not copies. `names` are the layers' names.
    """

    def __init__(self, captured: Captured[tuple[Tensor, Moments | None]], layers: list[nn.Module]) -> None:
        self._captured = captured
        self._layers: list[Any] = layers
        self.names = captured.names

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x, _ in self._captured]

    @property
    def moments(self) -> list[Moments] | None:
        """Return (mean, biased var) of each layer's input, for `bn_stat_loss(.., moments=)`; None unless fused=True."""
        found = [moments for _, moments in self._captured]
        return None if None in found else found  # type: ignore[return-value]

    @property
    def running_means(self) -> list[Tensor]:
        return [layer.running_mean for layer in self._layers]

    @property
    def running_vars(self) -> list[Tensor]:
        return [layer.running_var for layer in self._layers]

    def not_finite(self) -> list[str]:
        """Return the names of the layers whose input has a NaN or an infinity, in order. Waits for the device."""
        return [name for name, x in zip(self.names, self.inputs, strict=True) if not x.isfinite().all()]

    def clear(self) -> None:
        """Let go of the captured tensors now, for a `with` that spans many steps."""
        self._captured.clear()


class FusedBatchNormStat:
    """Forward pass of a batch norm in eval mode that computes the batch moments of its input while it normalises.

    One read and one write, forward and backward (fastkd.batch_norm_moments). Parameters and statistics remain those
    of the layer, as do the dropout and activation of timm's BatchNormAct2d.

    Args:
        layer: BatchNorm1d to 3d, SyncBatchNorm, timm's BatchNormAct2d or a frozen one, with running statistics.
        keep: called with (input, (mean, biased var)) at each forward pass.

    Raises:
        ValueError: a layer of another kind, whose forward pass is not known.
        RuntimeError: called in train mode, where a batch norm normalises with the batch's own statistics.
    """

    def __init__(self, layer: nn.Module, keep: Callable[[Tensor, Moments], None]) -> None:
        kind = type(layer)
        is_plain = (
            kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward) or kind.__name__ == "FrozenBatchNorm2d"
        )
        if not is_plain and kind.__name__ not in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"):
            raise ValueError(f"{kind.__name__} has a forward pass of its own, which cannot be fused; use fused=False")
        self._layer: Any = layer
        self._keep = keep
        self._has_act = not is_plain
        # A frozen batch norm normalises in the same way in both modes.
        self._has_modes = isinstance(layer, _BatchNorm)

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        layer = self._layer
        if self._has_modes and layer.training:
            raise RuntimeError(
                "a batch norm is in train mode, where fused statistics have no meaning: call model.eval()"
            )
        (x,) = args or kwargs.values()
        buffers, parameters = layer._buffers, layer._parameters
        running_mean, running_var = _held(buffers, "running_mean", layer), _held(buffers, "running_var", layer)
        if x.dim() < 2 or x.size(1) != running_mean.size(0):
            raise ValueError(f"input must have shape (B, {len(running_mean)}, ...), got {tuple(x.shape)}")
        weight, bias = _held(parameters, "weight", layer), _held(parameters, "bias", layer)
        y, mean, var = normalised_with_moments(x, running_mean, running_var, weight, bias, layer.eps)
        self._keep(x, (mean, var))
        if self._has_act:
            y = layer.act(layer.drop(y))
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Tensor]:
        """Return the plain forward pass of the copied layer: a copy of a model is not captured."""
        layer = copy.deepcopy(self._layer, memo)
        return MethodType(type(layer).forward, layer)


def _held(table: dict[str, Any], name: str, module: nn.Module) -> Any:
    """Return module.<name> from the table that usually has it. A module's own search, in Python, takes longer than the
    arithmetic of a small layer."""
    return table[name] if name in table else getattr(module, name)


@contextmanager
def bn_inputs(
    model: nn.Module, *, layers: Sequence[str] | None = None, fused: bool = False
) -> Iterator[BatchNormInputs]:
    """Collect the inputs and running statistics of each batch norm of `model` while it runs. Gradients flow.

        with capture.bn_inputs(teacher, fused=True) as bn:
            logits = teacher(images)
            loss = bn_stat_loss(bn.inputs, bn.running_means, bn.running_vars, moments=bn.moments)

    Put the model in eval mode: in train mode its forward pass moves the statistics towards what they are compared with,
    and a warning says so.

    Args:
        model: as in tokens. BatchNorm1d to 3d, SyncBatchNorm, timm's BatchNormAct2d and frozen ones are found.
        layers: names of the layers to take; None for all. Their order is that of `named_modules()`.
        fused: let the layers take their moments while they normalise (FusedBatchNormStat), until the `with` ends. A
            compiled model is compiled anew at each entry: enter once, around the loop.

    Returns:
        BatchNormInputs, filled by the forward pass.

    Raises:
        ValueError: at entry: no batch norm in the model, a name that is none, a layer without running statistics; if
            fused, one in train mode or of a kind that cannot be fused.
        RuntimeError: as tokens; if fused, a forward pass in train mode.
    """
    root = unwrap(model)
    found = _batch_norms(root, layers, fused)

    def attach(slot: Slot, state: State) -> list[RemovableHandle | ReplacedForward]:
        def before(module: nn.Module, args: Any) -> None:
            if args:
                slot.put(args[0], state)
            else:
                slot.refuse(f"{slot.name!r} is called with its input as a keyword, which only fused=True can read")

        def keep(x: Tensor, moments: Moments) -> None:
            if not is_recomputing():
                slot.put((x, moments), state)

        if fused:
            return [ReplacedForward(slot.module, FusedBatchNormStat(slot.module, keep))]
        return [slot.module.register_forward_pre_hook(before_only(slot.module, before))]

    def finish(slot: Slot) -> tuple[Tensor, Moments | None]:
        return slot.value if fused else (slot.value, None)

    slots = [Slot(name, module, "; name the layers that are with layers=") for name, module in found.items()]
    with hooked(model, root, slots, attach):
        yield BatchNormInputs(Captured(slots, list(range(len(slots))), finish), list(found.values()))


def _batch_norms(root: nn.Module, layers: Sequence[str] | None, fused: bool) -> dict[str, Any]:
    """Return the requested batch norms by name, in module order."""
    found = {name: module for name, module in root.named_modules() if _is_batch_norm(module)}
    if not found:
        raise ValueError(
            f"{type(root).__name__} has no batch norm, so no statistics to compare with; use one that has (a ResNet)"
        )
    if layers is not None:
        if isinstance(layers, str) or not layers or not found.keys() >= set(layers):
            raise ValueError(f"layers must name batch norm layers, got {layers!r}; there are {', '.join(found)}")
        found = {name: module for name, module in found.items() if name in layers}
    bare = [name for name, module in found.items() if not isinstance(module.running_mean, Tensor)]
    if bare:
        raise ValueError(
            f"{', '.join(bare)} keep no running statistics to compare with (track_running_stats=False); "
            "name the layers that do with layers="
        )

    training = [name for name, module in found.items() if isinstance(module, _BatchNorm) and module.training]
    if training and not fused:
        warnings.warn(
            f"{len(training)} batch norms are in train mode, such as {training[0]}: the forward pass moves the "
            "statistics that its inputs are compared with; call model.eval()",
            stacklevel=4,
        )
    if fused and training:
        raise ValueError(f"{', '.join(training)} are in train mode, and fused=True needs eval mode: call model.eval()")
    return found


def _is_batch_norm(module: nn.Module) -> bool:
    # Frozen batch norms of timm and torchvision are plain modules.
    return isinstance(module, _BatchNorm) or type(module).__name__.startswith("FrozenBatchNorm")
