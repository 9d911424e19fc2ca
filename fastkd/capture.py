"""What a loss needs from a live model, by forward hooks; the only file that hooks one, and every hook goes when its `with` ends."""

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = ["QKV", "BatchNormInputs", "Captured", "bn_inputs", "qkv", "tokens"]

T = TypeVar("T")
_SDPA = F.scaled_dot_product_attention
_CLASS_TOKENS = ("cls_token", "dist_token", "class_token", "class_embedding")


class QKV(NamedTuple):
    """What enters one attention: softmax(q k^T * scale + bias) v, with q, k, v (B,H,N,d).

    `bias` broadcasts to (B,H,N,N), -inf where a boolean mask forbids, None where there is none. Windows are folded into B.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    is_causal: bool


class Captured(Sequence[T], Generic[T]):
    """What the latest forward pass left, in the order asked for: by position, by module name, by iteration.

    Each forward pass replaces what the one before left; activation checkpointing's recomputation changes nothing.
    Read it inside the `with`: at its end everything is let go. `names` are the modules' names.

    Raises RuntimeError when read before a forward pass, after the `with`, or when a tensor was overwritten in place.
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
            raise RuntimeError(f"{slot.name!r} was read after the `with` ended: captured tensors are let go there; read inside it")
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

    def __init__(self, captured: Captured[Tensor], layers: list[nn.Module]) -> None:
        self._captured = captured
        self._layers: list[Any] = layers
        self.names = captured.names

    @property
    def inputs(self) -> list[Tensor]:
        return list(self._captured)

    @property
    def running_means(self) -> list[Tensor]:
        return [layer.running_mean for layer in self._layers]

    @property
    def running_vars(self) -> list[Tensor]:
        return [layer.running_var for layer in self._layers]

    def clear(self) -> None:
        """Let go of the captured tensors now, for a `with` that spans many steps."""
        self._captured.clear()


@contextmanager
def tokens(
    model: nn.Module,
    blocks: Sequence[int | str],
    prefix: str | int = "drop",
    *,
    layout: str = "auto",
) -> Iterator[Captured[Tensor]]:
    """Collect the outputs of `blocks` as tokens (B,N,D), row-major, while `model` runs; gradients flow through them.

    model: bare, or wrapped by DistributedDataParallel or torch.compile. Enter before the first compiled call and stay
        inside: PyTorch ignores hooks that come later.
    blocks: module names as in `named_modules()`, or integers, which count (negative ones from the end)
        - the children of `model.blocks` (ViT, DeiT, CaiT, EVA, BEiT; EfficientNet's stages),
        - Swin's blocks through all stages (whole stages are the names "layers.0", ...),
        - in other timm models the modules of `feature_info`, as in `forward_intermediates` (a ResNet's stem, layer1, ...),
        - else the model's children.
    prefix: class, distillation and register tokens, the first of the sequence: "drop" (as many as the model's
        `num_prefix_tokens`; none before CaiT's, XCiT's and ConViT's class token joins), "keep", or how many to drop.
    layout: "auto", "NLC", "NCHW" or "NHWC". "auto" takes a 3-D output as NLC; for a 4-D one the model decides: its
        `output_fmt` (Swin: NHWC), its `feature_info`'s channel counts, else NCHW unless attention is inside.

    Returns Captured[Tensor]. Raises ValueError or TypeError at entry for a block that is not there (the message lists
    those that are); ValueError when read, for an output whose layout or prefix the model does not tell, or no token left;
    RuntimeError for a block that never fired, when read or at the end of the `with`.
    """
    if layout not in ("auto", "NLC", "NCHW", "NHWC"):
        raise ValueError(f"layout must be 'auto', 'NLC', 'NCHW' or 'NHWC', got {layout!r}")
    if isinstance(prefix, bool) or prefix not in ("drop", "keep") and not (isinstance(prefix, int) and prefix >= 0):
        raise ValueError(f"prefix must be 'drop', 'keep' or a number of tokens to drop, got {prefix!r}")
    root = _unwrap(model)
    names = _resolve(root, blocks)
    if hasattr(root, "reroll"):
        raise ValueError(f"{type(root).__name__} keeps its tokens in unrolled, not row-major order; call its `reroll` yourself")

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
def bn_inputs(model: nn.Module, *, layers: Sequence[str] | None = None) -> Iterator[BatchNormInputs]:
    """Collect what enters every batch norm of `model` while it runs, beside the running statistics; gradients flow.

    BatchNorm1d, 2d, 3d, SyncBatchNorm, timm's BatchNormAct2d and frozen ones, in the order of `named_modules()`. Put the
    model in eval mode, or its forward pass updates the statistics it is compared with.

    layers: names of the layers to take, None for all.

    Returns BatchNormInputs. Raises ValueError at entry for a model without batch norm, a layer that is not one or keeps
    no running statistics; RuntimeError for a layer that never fired, when read or at the end of the `with`.
    """
    root = _unwrap(model)
    found = {name: module for name, module in root.named_modules() if _is_batch_norm(module)}
    if not found:
        raise ValueError(
            f"{type(root).__name__} has no batch norm layer, so it stores no statistics to compare with; "
            "use a teacher with BatchNorm (a ResNet, say), or another prior"
        )
    if layers is not None:
        wrong = [name for name in layers if name not in found]
        if wrong or not layers or isinstance(layers, str):
            raise ValueError(f"layers must name batch norm layers, got {layers!r}; there are {', '.join(found)}")
        found = {name: module for name, module in found.items() if name in layers}
    bare = [name for name, module in found.items() if not isinstance(module.running_mean, Tensor)]
    if bare:
        raise ValueError(
            f"{', '.join(bare)} keep no running statistics (track_running_stats=False), which are what the inputs are "
            "compared with; build them with track_running_stats=True, or leave them out with `layers=`"
        )

    def attach(slot: _Slot, state: _State) -> list[RemovableHandle]:
        def before(module: nn.Module, args: Any) -> None:
            if not _recomputing():
                slot.put(args[0], state)

        return [slot.module.register_forward_pre_hook(before)]

    slots = [_Slot(name, module, "; take the layers that do with `layers=`") for name, module in found.items()]
    with _hooked(root, slots, attach):
        yield BatchNormInputs(Captured(slots, list(range(len(slots))), lambda slot: slot.value), list(found.values()))


@contextmanager
def qkv(model: nn.Module, blocks: Sequence[int | str]) -> Iterator[Captured[QKV]]:
    """Collect q, k, v of the attention in each of `blocks` while `model` runs, its fused attention left on; gradients flow.

    They are what the attention itself multiplies: after q/k norm and rotary embedding, before the scale. No map is formed and
    the model's output keeps its bits. Read from the arguments of `scaled_dot_product_attention`; from the projection in
    Swin, whose windows come folded into B, with the relative position bias and the shifted windows' mask as `bias`.

    model, blocks: as in `tokens`; a block holds one attention, or is the attention itself.

    Returns Captured[QKV]. Raises ValueError or TypeError at entry for a block that is not there (the message lists those
    that are), mixes heads around the softmax (CaiT), or has fused attention switched off; RuntimeError for a block
    with more than one attention, and for one that never fired, when read or at the end of the `with`.
    """
    root = _unwrap(model)
    names = _resolve(root, blocks)
    slots = []
    for name in dict.fromkeys(names):
        slots.append(_Slot(name, _attention(name, root.get_submodule(name)), "; its attention must call scaled_dot_product_attention"))

    def attach(slot: _Slot, state: _State) -> list[RemovableHandle]:
        return _attach_window(slot, state) if _is_window(slot.module) else _attach_sdpa(slot, state)

    with _hooked(root, slots, attach):
        yield Captured(slots, _order(slots, names), lambda slot: slot.value[0](slot.module, *slot.value[1:]))


# Hooks and what they fill


class _State:
    """Whether the model is inside a forward pass that records gradients."""

    def __init__(self) -> None:
        self.grad = False


class _Slot:
    """What one module left in the latest forward pass. Plain attributes: torch.compile replays their assignment."""

    def __init__(self, name: str, module: nn.Module, hint: str = "") -> None:
        self.name = name
        self.module = module
        self.hint = hint
        self.is_trained = any(p.requires_grad for p in module.parameters())
        self.is_open = True
        self.has_fired = False
        self.value: Any = None
        self.version: int | None = None
        self.result: Any = None

    def put(self, value: Any, state: _State) -> None:
        if state.grad and self.is_trained and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.name!r} runs without gradients in a model that is trained, so a loss on what it gives would train nothing: "
                "use non-reentrant activation checkpointing (use_reentrant=False)"
            )
        self.value = value
        self.result = None
        self.has_fired = True
        if not torch.compiler.is_compiling():
            self.version = value._version if isinstance(value, Tensor) and not value.is_inference() else None

    def reset(self) -> None:
        self.value = None
        self.result = None
        self.version = None


@contextmanager
def _hooked(
    root: nn.Module, slots: list[_Slot], attach: Callable[[_Slot, _State], list[RemovableHandle]]
) -> Iterator[None]:
    state = _State()

    def before(module: nn.Module, args: Any) -> None:
        if not _recomputing():
            state.grad = torch.is_grad_enabled()
            for slot in slots:
                slot.reset()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not _recomputing():
            state.grad = False

    handles = []
    try:
        handles.append(root.register_forward_pre_hook(before))
        handles.append(root.register_forward_hook(after, always_call=True))
        for slot in slots:
            handles += attach(slot, state)
        yield
        silent = [slot for slot in slots if not slot.has_fired]
        if silent:
            raise RuntimeError(_silent([slot.name for slot in silent], silent[0].hint))
    finally:
        for handle in handles:
            handle.remove()
        for slot in slots:
            slot.reset()
            slot.is_open = False


def _recomputing() -> bool:
    # Checkpointing runs modules again from within backward, where the autograd engine has a task id.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _silent(names: list[str], hint: str) -> str:
    return (
        f"{', '.join(names)} never fired: no forward pass went through inside the `with`, or the model was compiled and called "
        f"before it (PyTorch ignores hooks added after that: enter before the first compiled call), or it is not used{hint}"
    )


# Finding modules


def _unwrap(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError("model is a DataParallel, whose replicas are not the modules hooked; use DistributedDataParallel")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def _resolve(root: nn.Module, blocks: Sequence[int | str]) -> list[str]:
    if isinstance(blocks, str) or not isinstance(blocks, Sequence):
        raise TypeError(f"blocks must be a list of block indices or module names, got {blocks!r}")
    if not blocks:
        raise ValueError("blocks is empty: name at least one")
    modules = dict(root.named_modules())
    numbered = _block_names(root, modules)
    names = []
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, (int, str)):
            raise TypeError(f"blocks must hold ints or strings, got {block!r}")
        if isinstance(block, int):
            if not -len(numbered) <= block < len(numbered):
                raise ValueError(f"block {block} is not in {type(root).__name__}: it has {len(numbered)}: {', '.join(numbered)}")
            block = numbered[block]
        elif block not in modules or not block:
            close = difflib.get_close_matches(block, modules, n=8, cutoff=0.5)
            other = [name for name, _ in root.named_children() if name not in numbered]
            raise ValueError(
                f"block {block!r} is not in {type(root).__name__}. Blocks: {', '.join(numbered)}. "
                f"Other modules: {', '.join(other)}" + (f". Did you mean {', '.join(close)}?" if close else "")
            )
        names.append(block)
    return names


def _block_names(root: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
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


def _feature_channels(root: nn.Module) -> dict[str, int]:
    info = getattr(root, "feature_info", None)
    entries = [entry for entry in info if isinstance(entry, dict)] if isinstance(info, list) else []
    return {entry["module"]: entry["num_chs"] for entry in entries if entry.get("module") and "num_chs" in entry}


def _order(slots: list[_Slot], names: list[str]) -> list[int]:
    position = {slot.name: i for i, slot in enumerate(slots)}
    return [position[name] for name in names]


def _nearest(root: nn.Module, name: str, attribute: str) -> Any:
    """`attribute` of the module called `name`, else of the closest module around it that has it, else None."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        value = getattr(root.get_submodule(".".join(parts[:end])), attribute, None)
        if value is not None:
            return value
    return None


def _has_heads(module: nn.Module) -> bool:
    return any(hasattr(m, "num_heads") for m in module.modules())


def _is_batch_norm(module: nn.Module) -> bool:
    # Frozen batch norms of timm and torchvision are plain modules.
    return isinstance(module, _BatchNorm) or type(module).__name__.startswith("FrozenBatchNorm")


# Tokens


def _as_tokens(root: nn.Module, name: str, module: nn.Module, output: Any, prefix: str | int, layout: str) -> Tensor:
    x = output
    if isinstance(output, (tuple, list)):
        tensors = [item for item in output if isinstance(item, Tensor)]
        x = tensors[0] if len(tensors) == 1 and len(output[0:1]) and output[0] is tensors[0] else None
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(output).__name__
        raise ValueError(f"{name!r} gives {got}; tokens need one tensor, (B,N,D), (B,D,H,W) or (B,H,W,D)")
    if layout == "auto":
        layout = "NLC" if x.dim() == 3 else _grid_layout(root, name, module, x)
    if (layout == "NLC") != (x.dim() == 3):
        raise ValueError(f"{name!r} gives shape {tuple(x.shape)}, which is not {layout}")
    if layout == "NCHW":
        return x.flatten(2).transpose(1, 2)
    if layout == "NHWC":
        return x.flatten(1, 2)
    count = _prefix_tokens(root, name) if prefix == "drop" else 0 if prefix == "keep" else prefix
    if x.shape[1] <= count and count:
        raise ValueError(f"{name!r} gives {x.shape[1]} tokens, all of them among the {count} prefix tokens to drop; keep them")
    return x[:, count:] if count else x


def _grid_layout(root: nn.Module, name: str, module: nn.Module, x: Tensor) -> str:
    if isinstance(module, (nn.Conv2d, _BatchNorm)):
        return "NCHW"
    told = _nearest(root, name, "output_fmt")
    told = getattr(told, "value", told)
    if told in ("NCHW", "NHWC"):
        return told
    channels = _feature_channels(root).get(name)
    if channels in (x.shape[1], x.shape[3]) and x.shape[1] != x.shape[3]:
        return "NCHW" if channels == x.shape[1] else "NHWC"
    if _has_heads(module):
        raise ValueError(f"{name!r} gives shape {tuple(x.shape)} and its model does not say where the channels are; pass layout=")
    return "NCHW"


def _prefix_tokens(root: nn.Module, name: str) -> int:
    parts = name.split(".")
    if "patch_embed" in parts:
        return 0
    # The class token joins after these blocks, whatever num_prefix_tokens says.
    kind = type(root).__name__
    if parts[0] == "blocks" and (kind in ("Cait", "Xcit") or kind == "ConVit" and int(parts[1]) < root.local_up_to_layer):
        return 0
    count = _nearest(root, name, "num_prefix_tokens")
    if count is None and any(n.rsplit(".", 1)[-1].startswith(_CLASS_TOKENS) for n, _ in root.named_parameters()):
        raise ValueError(
            f"{type(root).__name__} has a class token but no num_prefix_tokens: "
            "pass prefix='keep', or as a number how many tokens to drop"
        )
    return int(count or 0)


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
                f"{name!r} mixes heads around the softmax ({type(module).__name__}): its maps are not softmax(q k^T * scale + bias), "
                "so q and k do not tell them"
            )
        if _is_window(module) or hasattr(module, "fused_attn"):
            found.append(module)
    if found and not any(_is_window(m) or m.fused_attn for m in found):
        raise ValueError(
            f"{name!r} has fused attention switched off, so q and k cannot be read; set `fused_attn = True` on "
            f"{type(found[0]).__name__}, or call timm.layers.set_fused_attn(True) before the model is built"
        )
    return next((m for m in found if _is_window(m)), block)


class _Watch(TorchFunctionMode):
    """Keeps what the first scaled_dot_product_attention of a module's run is given."""

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


def _attach_sdpa(slot: _Slot, state: _State) -> list[RemovableHandle]:
    watch = _Watch(slot, state)

    def before(module: nn.Module, args: Any) -> None:
        if not _recomputing():
            watch.has_seen = False
            watch.is_on = True
            watch.__enter__()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        # Also called after an exception, perhaps one raised before the mode was entered.
        if watch.is_on and not _recomputing():
            watch.is_on = False
            watch.__exit__(None, None, None)

    module = slot.module
    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, prepend=True, always_call=True),
    ]


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
        slot.module.qkv.register_forward_hook(projected),
    ]


def _from_window(module: Any, projection: Tensor, mask: Tensor | None, grad: bool) -> QKV:
    windows, n, _ = projection.shape
    q, k, v = projection.reshape(windows, n, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    with torch.set_grad_enabled(grad):
        bias = module._get_rel_pos_bias()  # (1,H,n,n)
    if mask is not None:  # (windows of one image,n,n); images are the slower index
        bias = (bias + mask.unsqueeze(1)).repeat(windows // mask.shape[0], 1, 1, 1)
    return QKV(q, k, v, module.scale, bias, False)
