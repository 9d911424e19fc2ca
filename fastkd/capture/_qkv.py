"""Capture queries, keys and values with their scale and bias, with fused attention left on."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fastkd.capture._hooks import Captured, Slot, State, hooked, only_of
from fastkd.capture._modules import module_order, resolve, unwrap

_SDPA = F.scaled_dot_product_attention


class QKV(NamedTuple):
    """Inputs of an attention, which computes softmax(q k^T * scale + bias) v.

    q, k, v are (B,H,N,d), with windows folded into B and grouped heads repeated. bias broadcasts to (B,H,N,N) and is
    -inf where a boolean mask is False; None if there is no bias.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    is_causal: bool


@contextmanager
def qkv(model: nn.Module, blocks: Sequence[int | str]) -> Iterator[Captured[QKV]]:
    """Collect q, k and v of the attention in each of `blocks` while `model` runs. Gradients flow through them.

    They are the operands of the attention, after q/k norm and rotary embedding and before the scale. Fused attention
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
    root = unwrap(model)
    names = resolve(root, blocks)
    hint = ", or its attention does not call scaled_dot_product_attention"
    slots = [Slot(name, _attention(name, root.get_submodule(name)), hint) for name in dict.fromkeys(names)]

    def attach(slot: Slot, state: State) -> list[RemovableHandle]:
        return _attach_window(slot, state) if _is_window(slot.module) else _attach_sdpa(slot, state)

    with hooked(root, slots, attach):
        yield Captured(slots, module_order(slots, names), lambda slot: slot.value[0](slot.module, *slot.value[1:]))


def _is_window(module: nn.Module) -> bool:
    swin = sys.modules.get("timm.models.swin_transformer")
    return swin is not None and isinstance(module, swin.WindowAttention)


def _attention(name: str, block: nn.Module) -> nn.Module:
    """Return the module in `block` to watch: its attention if it is known, otherwise the block."""
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
    """Recorder of the arguments of the first scaled_dot_product_attention in a block's run."""

    def __init__(self, slot: Slot, state: State) -> None:
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


def _attach_sdpa(slot: Slot, state: State) -> list[RemovableHandle]:
    watch = _Watch(slot, state)
    state.watches.append(watch)

    def before(module: nn.Module, args: Any) -> None:
        watch.start()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        watch.stop()

    return [
        slot.module.register_forward_pre_hook(only_of(slot.module, before)),
        slot.module.register_forward_hook(only_of(slot.module, after), prepend=True),
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


def _attach_window(slot: Slot, state: State) -> list[RemovableHandle]:
    masks: list[Tensor | None] = [None]

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        masks[0] = kwargs["mask"] if "mask" in kwargs else args[1] if len(args) > 1 else None

    def projected(module: nn.Module, args: Any, output: Tensor) -> None:
        slot.put((_from_window, output, masks[0], torch.is_grad_enabled()), state)

    projection = slot.module.get_submodule("qkv")
    return [
        slot.module.register_forward_pre_hook(only_of(slot.module, before), with_kwargs=True),
        projection.register_forward_hook(only_of(projection, projected)),
    ]


def _from_window(module: Any, projection: Tensor, mask: Tensor | None, grad: bool) -> QKV:
    windows, n, _ = projection.shape
    q, k, v = projection.reshape(windows, n, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    with torch.set_grad_enabled(grad):
        bias = module._get_rel_pos_bias()  # (1,H,n,n)
    if mask is not None:  # (windows of one image,n,n); images are the slower index
        bias = (bias + mask.unsqueeze(1)).repeat(windows // mask.shape[0], 1, 1, 1)
    return QKV(q, k, v, module.scale, bias, False)
