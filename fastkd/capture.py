"""Context managers that collect what a loss needs from a live model; a hook lives no longer than its `with`."""

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fastkd.ops.moments import normalised_with_moments

__all__ = ["QKV", "BatchNormInputs", "Captured", "FusedBatchNormStat", "bn_inputs", "qkv", "tokens"]

T = TypeVar("T")
Moments = tuple[Tensor, Tensor]  # mean and biased variance per channel
_SDPA = F.scaled_dot_product_attention
_CLASS_TOKENS = ("cls_token", "dist_token", "class_token", "class_embedding")


class QKV(NamedTuple):
    """What one attention is given: it computes softmax(q k^T * scale + bias) v.

    q, k, v are (B,H,N,d), with windows folded into B and grouped heads repeated. bias broadcasts to (B,H,N,N) and is
    -inf where a boolean mask forbids; None: there is none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    is_causal: bool


class Captured(Sequence[T], Generic[T]):
    """What the latest forward pass left, in the order asked for: by position, by module name, by iteration.

    Each forward pass replaces what the one before left (of a module that runs twice in it, the last run stays);
    the recomputation of activation checkpointing replaces nothing. Read it inside the `with`: at its end all is let go.

    names: the modules' names.

    Raises:
        RuntimeError: read before a forward pass, of a module that never fired, after the `with`, or when what was
            captured has been overwritten in place since.
        KeyError, IndexError: nothing captured under that name or position.
    """

    def __init__(self, slots: "list[_Slot]", order: list[int], finish: "Callable[[_Slot], T]") -> None:
        self._slots = slots
        self._order = order
        self._finish = finish
        self.names: tuple[str, ...] = tuple(slots[i].name for i in order)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int | str) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | str | slice) -> "T | list[T]":
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if isinstance(index, str):
            if index not in self.names:
                raise KeyError(f"{index!r} was not asked for; captured are {', '.join(self.names)}")
            index = self.names.index(index)
        return self._read(self._slots[self._order[index]])

    def clear(self) -> None:
        """Let go of the captured tensors now, for a `with` that spans many steps."""
        for slot in self._slots:
            slot.reset()

    def _read(self, slot: "_Slot") -> T:
        if not slot.is_open:
            raise RuntimeError(
                f"{slot.name!r} is read after its `with`, which lets go of what it captured; read inside"
            )
        if slot.value is None:
            raise RuntimeError(_silent([slot.name], slot.hint))
        if slot.result is None:
            if slot.version is not None and slot.version != slot.value._version:
                raise RuntimeError(
                    f"what {slot.name!r} gave was overwritten in place later in the forward pass; "
                    "capture the module that overwrites it, or one before an in-place operation"
                )
            slot.result = self._finish(slot)
        return slot.result


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
        """Per layer (mean, biased var) of its input, for `bn_stat_loss(.., moments=)`; None unless fused=True."""
        found = [moments for _, moments in self._captured]
        return None if None in found else found  # type: ignore[return-value]

    @property
    def running_means(self) -> list[Tensor]:
        return [layer.running_mean for layer in self._layers]

    @property
    def running_vars(self) -> list[Tensor]:
        return [layer.running_var for layer in self._layers]

    def not_finite(self) -> list[str]:
        """Names of the layers whose input holds NaN or infinity, first to last. Waits for the device."""
        return [name for name, x in zip(self.names, self.inputs, strict=True) if not x.isfinite().all()]

    def clear(self) -> None:
        """Let go of the captured tensors now, for a `with` that spans many steps."""
        self._captured.clear()


class FusedBatchNormStat:
    """The forward pass of a batch norm in eval mode that takes the batch moments of its input while it normalises.

    One read and one write, forward and backward (fastkd.batch_norm_moments). Parameters and statistics stay the
    layer's own, and so do the dropout and activation of timm's BatchNormAct2d.

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
        # A frozen one normalises alike in both modes.
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


def _held(table: dict[str, Any], name: str, module: nn.Module) -> Any:
    """module.<name>, from the table that mostly holds it: modules search theirs in Python, which takes a small layer
    longer than its arithmetic."""
    return table[name] if name in table else getattr(module, name)


@dataclass
class _Replaced:
    """A module whose forward pass is another one until `remove`."""

    module: nn.Module
    forward: Callable[..., Tensor]

    def __post_init__(self) -> None:
        # Not by assignment, for which a module looks through its parameters, buffers and modules first.
        self._before = self.module.__dict__.get("forward")
        self.module.__dict__["forward"] = self.forward

    def remove(self) -> None:
        del self.module.__dict__["forward"]
        if self._before is not None:
            self.module.__dict__["forward"] = self._before


@contextmanager
def tokens(
    model: nn.Module,
    blocks: Sequence[int | str],
    prefix: Literal["drop", "keep"] | int = "drop",
    *,
    layout: Literal["auto", "NLC", "NCHW", "NHWC"] = "auto",
) -> Iterator[Captured[Tensor]]:
    """Collect the outputs of `blocks` as tokens (B,N,D), row-major, while `model` runs. Gradients flow through them.

        with capture.tokens(student, [5, 11]) as s:
            logits = student(images)
            loss = manifold_loss(s[-1], teacher_tokens)

    Args:
        model: bare, or wrapped by DistributedDataParallel or torch.compile. Enter before the first compiled call:
            PyTorch ignores hooks that come later. Activation checkpointing must be the non-reentrant kind; compiled
            with fullgraph=True it needs torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint.
        blocks: module names as in `named_modules()`, or ints (negative: from the end), which count
            the children of `model.blocks` (ViT, DeiT, CaiT, EVA, BEiT; the stages of an EfficientNet);
            Swin's blocks through all stages (a whole stage is the name "layers.0");
            in other timm models the modules of `feature_info`, as `forward_intermediates` (ResNet: stem, layer1, ..);
            the children of any other model.
        prefix: the class, distillation and register tokens that lead the sequence. "drop": as many as the model's
            `num_prefix_tokens`, none before the class token joins (CaiT, XCiT, ConViT); "keep"; or how many to drop.
        layout: of the outputs. "auto": NLC in 3 dimensions; in 4 what the model tells by `output_fmt` (Swin: NHWC) or
            by the channels in `feature_info`, and NCHW where it tells nothing and holds no attention.

    Returns:
        Captured[Tensor], filled by the forward pass.

    Raises:
        TypeError, ValueError: at entry, of the arguments; an unknown block's message lists those there are.
            When read: an output that is no (B,N,D) or map, a layout or class token the model does not tell of.
        RuntimeError: a block that never fired, when read and at the end; one run without gradients by reentrant
            checkpointing in a model that is trained.
    """
    if layout not in ("auto", "NLC", "NCHW", "NHWC"):
        raise ValueError(f"layout must be 'auto', 'NLC', 'NCHW' or 'NHWC', got {layout!r}")
    is_count = isinstance(prefix, int) and not isinstance(prefix, bool) and prefix >= 0
    if not is_count and prefix not in ("drop", "keep"):
        raise ValueError(f"prefix must be 'drop', 'keep' or a number of tokens to drop, got {prefix!r}")
    root = _unwrap(model)
    names = _resolve(root, blocks)
    if hasattr(root, "reroll"):
        raise ValueError(f"{type(root).__name__} keeps its tokens unrolled, not row-major: use its `reroll` instead")

    def attach(slot: _Slot, state: _State) -> list[RemovableHandle]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if not _recomputing():
                slot.put(output, state)

        return [slot.module.register_forward_hook(after)]

    def finish(slot: _Slot) -> Tensor:
        return _as_tokens(root, slot.name, slot.module, slot.value, prefix, layout)

    slots = [_Slot(name, root.get_submodule(name)) for name in dict.fromkeys(names)]
    with _hooked(root, slots, attach):
        yield Captured(slots, _order(slots, names), finish)


@contextmanager
def bn_inputs(
    model: nn.Module, *, layers: Sequence[str] | None = None, fused: bool = False
) -> Iterator[BatchNormInputs]:
    """Collect what enters each batch norm of `model` while it runs, beside its running statistics. Gradients flow.

        with capture.bn_inputs(teacher, fused=True) as bn:
            logits = teacher(images)
            loss = bn_stat_loss(bn.inputs, bn.running_means, bn.running_vars, moments=bn.moments)

    Put the model in eval mode: in train mode its forward pass moves the statistics towards what they are compared with.

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
    root = _unwrap(model)
    found = _batch_norms(root, layers, fused)

    def attach(slot: _Slot, state: _State) -> list[RemovableHandle | _Replaced]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not _recomputing():
                slot.put(args[0] if args else kwargs["input"], state)

        def keep(x: Tensor, moments: Moments) -> None:
            if not _recomputing():
                slot.put((x, moments), state)

        if fused:
            return [_Replaced(slot.module, FusedBatchNormStat(slot.module, keep))]
        return [slot.module.register_forward_pre_hook(before, with_kwargs=True)]

    def finish(slot: _Slot) -> tuple[Tensor, Moments | None]:
        return slot.value if fused else (slot.value, None)

    slots = [_Slot(name, module, "; name the layers that are with layers=") for name, module in found.items()]
    with _hooked(root, slots, attach):
        yield BatchNormInputs(Captured(slots, list(range(len(slots))), finish), list(found.values()))


@contextmanager
def qkv(model: nn.Module, blocks: Sequence[int | str]) -> Iterator[Captured[QKV]]:
    """Collect q, k and v of the attention in each of `blocks` while `model` runs. Gradients flow through them.

    They are what the attention multiplies, after q/k norm and rotary embedding and before the scale. Fused attention
    stays on, the output keeps its bits, and no map is formed. They are the arguments of
    `scaled_dot_product_attention`; Swin's come from its projection, fused or not, with its windows folded into B (the
    windows of an image adjacent) and relative position bias and shifted window mask as `bias`.

    Args:
        model: as in tokens.
        blocks: as in tokens; each holds one attention or is one.

    Returns:
        Captured[QKV], filled by the forward pass.

    Raises:
        TypeError, ValueError: at entry, as tokens; a block that mixes heads around the softmax (CaiT), or has fused
            attention switched off.
        RuntimeError: as tokens; a block that runs more than one attention.
    """
    root = _unwrap(model)
    names = _resolve(root, blocks)
    hint = ", or its attention does not call scaled_dot_product_attention"
    slots = [_Slot(name, _attention(name, root.get_submodule(name)), hint) for name in dict.fromkeys(names)]

    def attach(slot: _Slot, state: _State) -> list[RemovableHandle]:
        return _attach_window(slot, state) if _is_window(slot.module) else _attach_sdpa(slot, state)

    with _hooked(root, slots, attach):
        yield Captured(slots, _order(slots, names), lambda slot: slot.value[0](slot.module, *slot.value[1:]))


# Hooks and what they fill


class _State:
    """What the hooks of one `with` share."""

    def __init__(self) -> None:
        self.grad = False  # inside a forward pass of the model that records gradients ..
        self.input_grad = False  # .. and whose input wants one
        self.watches: list[_Watch] = []

    def leave(self) -> None:
        self.grad = False
        for watch in self.watches:
            watch.stop()  # still on after an exception


class _Slot:
    """What one module left in the latest forward pass. Plain attributes: torch.compile replays their assignment."""

    def __init__(self, name: str, module: nn.Module, hint: str = "") -> None:
        self.name = name
        self.module = module
        self.hint = hint
        self.is_open = True
        self.has_fired = False
        self.value: Any = None
        self.version: int | None = None
        self.result: Any = None

    def put(self, value: Any, state: _State) -> None:
        if state.grad and not torch.is_grad_enabled() and (state.input_grad or _is_trained(self.module)):
            raise RuntimeError(
                f"{self.name!r} runs without gradients inside a pass that records them, so a loss on it would train "
                "nothing; use non-reentrant activation checkpointing (use_reentrant=False)"
            )
        self.value = value
        self.result = self.version = None
        self.has_fired = True
        if isinstance(value, Tensor) and not torch.compiler.is_compiling() and not value.is_inference():
            self.version = value._version

    def reset(self) -> None:
        self.value = None
        self.result = None
        self.version = None


@contextmanager
def _hooked(
    root: nn.Module, slots: list[_Slot], attach: Callable[[_Slot, _State], Sequence[RemovableHandle | _Replaced]]
) -> Iterator[None]:
    state = _State()

    def before(module: nn.Module, args: Any) -> None:
        if not _recomputing():
            state.leave()
            state.grad = torch.is_grad_enabled()
            state.input_grad = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
            for slot in slots:
                slot.reset()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not _recomputing():
            state.leave()

    # No always_call: torch.compile would recompile for the hooks' ids, that is each time the `with` is entered.
    handles: list[RemovableHandle | _Replaced] = [
        root.register_forward_pre_hook(before),
        root.register_forward_hook(after),
    ]
    try:
        for slot in slots:
            handles += attach(slot, state)
        yield
        silent = [slot for slot in slots if not slot.has_fired]
        if silent:
            raise RuntimeError(_silent([slot.name for slot in silent], silent[0].hint))
    finally:
        state.leave()
        for handle in handles:
            handle.remove()
        for slot in slots:
            slot.reset()
            slot.is_open = False


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _recomputing() -> bool:
    # Checkpointing runs modules again from within backward, where the autograd engine has a task id.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _silent(names: list[str], hint: str) -> str:
    return (
        f"{', '.join(names)} never fired: no forward pass inside the `with`, or the model was compiled and called "
        f"before it (PyTorch ignores later hooks: enter before the first compiled call), or it is not used{hint}"
    )


# Finding modules


def _unwrap(model: nn.Module) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    inner: Any = model
    while True:
        if isinstance(inner, nn.DataParallel):
            raise ValueError("model is a DataParallel, which runs copies of its modules; use DistributedDataParallel")
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        else:
            return inner


def _resolve(root: Any, blocks: Sequence[int | str]) -> list[str]:
    if isinstance(blocks, str) or not isinstance(blocks, Sequence):
        raise TypeError(f"blocks must be a list of block indices or module names, got {blocks!r}")
    if not blocks:
        raise ValueError("blocks is empty: name at least one")
    modules = dict(root.named_modules())
    numbered = block_names(root)
    kind = type(root).__name__
    names = []
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, (int, str)):
            raise TypeError(f"blocks must hold ints or strings, got {block!r}")
        if isinstance(block, int):
            if not -len(numbered) <= block < len(numbered):
                raise ValueError(f"block {block} is not among the {len(numbered)} of {kind}: {', '.join(numbered)}")
            block = numbered[block]
        elif block not in modules or not block:
            close = difflib.get_close_matches(block, modules, n=8, cutoff=0.5)
            other = [name for name, _ in root.named_children() if name not in numbered]
            raise ValueError(
                f"block {block!r} is not in {kind}. Blocks: {', '.join(numbered)}. Other modules: {', '.join(other)}"
                + (f". Did you mean {', '.join(close)}?" if close else "")
            )
        names.append(block)
    return names


def block_names(model: nn.Module) -> list[str]:
    """Module names of the model's blocks, in the order that integers count them in tokens and qkv."""
    root: Any = model
    modules = dict(root.named_modules())

    def inside(prefix: str) -> list[str]:
        children = [f"{prefix}.{name}" for name, _ in modules[prefix].named_children()]
        # A ModuleList never fires: its members do.
        return [n for c in children for n in (inside(c) if isinstance(modules[c], nn.ModuleList) else [c])]

    if isinstance(modules.get("blocks"), (nn.ModuleList, nn.Sequential)):
        return inside("blocks")
    if "layers" in modules:
        stages = [f"layers.{name}.blocks" for name, _ in modules["layers"].named_children()]
        names = [name for stage in stages if stage in modules for name in inside(stage)]
        if names and all(_has_heads(modules[name]) for name in names):
            return names
    names = [name for name in _feature_channels(root) if name in modules]
    return names or [name for name, _ in root.named_children()]


def _feature_channels(root: Any) -> dict[str, int]:
    info = getattr(root, "feature_info", None)
    entries = [entry for entry in info if isinstance(entry, dict)] if isinstance(info, list) else []
    return {entry["module"]: entry["num_chs"] for entry in entries if entry.get("module") and "num_chs" in entry}


def _order(slots: list[_Slot], names: list[str]) -> list[int]:
    position = {slot.name: i for i, slot in enumerate(slots)}
    return [position[name] for name in names]


def _nearest(root: Any, name: str, attribute: str) -> Any:
    """`attribute` of the module called `name`, else of the closest module around it that has it, else None."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        value = getattr(root.get_submodule(".".join(parts[:end])), attribute, None)
        if value is not None:
            return value
    return None


def _has_heads(module: nn.Module) -> bool:
    return any(hasattr(m, "num_heads") for m in module.modules())


def _batch_norms(root: nn.Module, layers: Sequence[str] | None, fused: bool) -> dict[str, Any]:
    """The batch norms asked for, by name, in module order."""
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
    if fused and training:
        raise ValueError(f"{', '.join(training)} are in train mode, and fused=True needs eval mode: call model.eval()")
    return found


def _is_batch_norm(module: nn.Module) -> bool:
    # Frozen batch norms of timm and torchvision are plain modules.
    return isinstance(module, _BatchNorm) or type(module).__name__.startswith("FrozenBatchNorm")


# Tokens


def _as_tokens(root: Any, name: str, module: nn.Module, output: Any, prefix: str | int, layout: str) -> Tensor:
    x = output
    if isinstance(output, (tuple, list)):
        tensors = [item for item in output if isinstance(item, Tensor)]
        x = tensors[0] if len(tensors) == 1 else None
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(output).__name__
        raise ValueError(f"{name!r} gives {got}; tokens need one tensor: (B,N,D), (B,D,H,W) or (B,H,W,D)")
    if layout == "auto":
        layout = "NLC" if x.dim() == 3 else _grid_layout(root, name, module, x)
    if (layout == "NLC") != (x.dim() == 3):
        raise ValueError(f"{name!r} gives shape {tuple(x.shape)}, which is not {layout}")
    if layout == "NCHW":
        return x.flatten(2).transpose(1, 2)
    if layout == "NHWC":
        return x.flatten(1, 2)
    count = prefix if isinstance(prefix, int) else _prefix_tokens(root, name) if prefix == "drop" else 0
    if 0 < x.shape[1] <= count:
        raise ValueError(f"{name!r} gives {x.shape[1]} tokens and {count} are to be dropped; pass prefix='keep'")
    return x[:, count:] if count else x


def _grid_layout(root: Any, name: str, module: nn.Module, x: Tensor) -> str:
    if isinstance(module, (nn.Conv2d, _BatchNorm)):
        return "NCHW"
    told = _nearest(root, name, "output_fmt")
    told = getattr(told, "value", told)  # timm's enum or a string
    if told in ("NCHW", "NHWC"):
        return str(told)
    channels = _feature_channels(root).get(name)
    if x.shape[1] != x.shape[3] and channels in (x.shape[1], x.shape[3]):
        return "NCHW" if channels == x.shape[1] else "NHWC"
    if _has_heads(module):
        raise ValueError(
            f"{name!r} gives shape {tuple(x.shape)} and nothing tells which are its channels; pass layout="
        )
    return "NCHW"


def _prefix_tokens(root: Any, name: str) -> int:
    if "patch_embed" in name.split(".") or _is_before_class_token(root, name):
        return 0
    count = _nearest(root, name, "num_prefix_tokens")
    if count is None and any(n.rsplit(".", 1)[-1].startswith(_CLASS_TOKENS) for n, _ in root.named_parameters()):
        raise ValueError(
            f"{type(root).__name__} has a class token but does not tell num_prefix_tokens; "
            "pass prefix='keep' or the number to drop"
        )
    return int(count or 0)


def _is_before_class_token(root: Any, name: str) -> bool:
    """Whether a block runs without the class token, whatever num_prefix_tokens says."""
    kind = type(root).__name__
    stem, _, rest = name.partition(".")
    if stem != "blocks" or kind not in ("Cait", "Xcit", "ConVit"):
        return False
    last = int(rest.split(".")[0]) if rest else len(root.blocks) - 1
    return kind != "ConVit" or last < root.local_up_to_layer


# Attention


def _is_window(module: nn.Module) -> bool:
    swin = sys.modules.get("timm.models.swin_transformer")
    return swin is not None and isinstance(module, swin.WindowAttention)


def _attention(name: str, block: nn.Module) -> nn.Module:
    """The module in `block` whose run is watched: its attention where that is known, else the block."""
    found = []
    for module in block.modules():
        if hasattr(module, "proj_l") and hasattr(module, "proj_w"):
            raise ValueError(
                f"{name!r} mixes heads around the softmax ({type(module).__name__}), so q and k do not make its maps; "
                "use capture.tokens, or a model with plain attention"
            )
        if _is_window(module) or hasattr(module, "fused_attn"):
            found.append(module)
    if found and not any(_is_window(m) or m.fused_attn for m in found):
        raise ValueError(
            f"{name!r} has fused attention switched off, where q and k are read; set fused_attn = True on its "
            f"{type(found[0]).__name__}, or timm.layers.set_fused_attn(True) before the model is built"
        )
    return next((m for m in found if _is_window(m)), block)


class _Watch(TorchFunctionMode):
    """Keeps what the first scaled_dot_product_attention of a block's run is given."""

    def __init__(self, slot: _Slot, state: _State) -> None:
        self.slot = slot
        self.state = state
        self.is_on = False
        self.has_seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:
            if self.has_seen:
                raise RuntimeError(f"{self.slot.name!r} runs more than one attention; name the attention module itself")
            self.has_seen = True
            self.slot.put((_from_sdpa, *_sdpa_arguments(*args, **kwargs)), self.state)
        return func(*args, **kwargs)

    def start(self) -> None:
        self.has_seen = False
        if not self.is_on:
            self.is_on = True
            self.__enter__()

    def stop(self) -> None:
        if self.is_on:
            self.is_on = False
            self.__exit__(None, None, None)


def _attach_sdpa(slot: _Slot, state: _State) -> list[RemovableHandle]:
    watch = _Watch(slot, state)
    state.watches.append(watch)

    def before(module: nn.Module, args: Any) -> None:
        if not _recomputing():
            watch.start()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not _recomputing():
            watch.stop()

    return [slot.module.register_forward_pre_hook(before), slot.module.register_forward_hook(after, prepend=True)]


def _sdpa_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Any, ...]:
    return query, key, value, attn_mask, is_causal, scale


def _from_sdpa(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> QKV:
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    return QKV(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, mask, is_causal)


def _attach_window(slot: _Slot, state: _State) -> list[RemovableHandle]:
    masks: list[Tensor | None] = [None]

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not _recomputing():
            masks[0] = kwargs["mask"] if "mask" in kwargs else args[1] if len(args) > 1 else None

    def projected(module: nn.Module, args: Any, output: Tensor) -> None:
        if not _recomputing():
            slot.put((_from_window, output, masks[0], torch.is_grad_enabled()), state)

    return [
        slot.module.register_forward_pre_hook(before, with_kwargs=True),
        slot.module.get_submodule("qkv").register_forward_hook(projected),
    ]


def _from_window(module: Any, projection: Tensor, mask: Tensor | None, grad: bool) -> QKV:
    windows, n, _ = projection.shape
    q, k, v = projection.reshape(windows, n, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    with torch.set_grad_enabled(grad):
        bias = module._get_rel_pos_bias()  # (1,H,n,n)
    if mask is not None:  # (windows of one image,n,n); images are the slower index
        bias = (bias + mask.unsqueeze(1)).repeat(windows // mask.shape[0], 1, 1, 1)
    return QKV(q, k, v, module.scale, bias, False)
