"""Capture queries, keys and values with their scale and bias, of fused and of unfused attention."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastkd.capture import _replay
from fastkd.capture._hooks import Captured, Slot, State, after_only, before_only, hooked
from fastkd.capture._layers import resolve_attention
from fastkd.capture._modules import module_order, unwrap
from fastkd.capture._watch import Watch, several


class _Operands(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    is_causal: bool


class QKV(_Operands):
    """Inputs of an attention, which computes softmax(q k^T * scale + bias) v.

    q, k, v are (B',H,N,d), with windows folded into B' and grouped heads repeated. bias broadcasts to (B',H,N,N) and is
    -inf where a boolean mask is False; None if there is no bias. With is_causal, the keys after a query are hidden too.

    batch_shape: the dimensions that were folded into B', in the model's order: x.unflatten(0, record.batch_shape).
    """

    batch_shape: tuple[int, ...]

    def __new__(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        bias: Tensor | None,
        is_causal: bool,
        batch_shape: tuple[int, ...] | None = None,
    ) -> "QKV":
        record = super().__new__(cls, q, k, v, scale, bias, is_causal)
        record.batch_shape = (q.shape[0],) if batch_shape is None else batch_shape
        return record


@contextmanager
def qkv(model: nn.Module, blocks: Sequence[int | str]) -> Iterator[Captured[QKV]]:
    """Collect q, k and v of the attention in each of `blocks` while `model` runs. Gradients flow through them.

    They are the operands of the attention, after q/k norm and rotary embedding and before the scale, and the same
    whether attention is fused or not; the output keeps its bits. Fused attention is read at
    scaled_dot_product_attention; unfused attention is recognised as a product of queries and keys that is scaled,
    biased or masked, put through a softmax and multiplied by values. Nothing is copied while the model runs. When a
    record is read, a scale that is a tensor (SwinV2's) is multiplied into q, operations on the scores are repeated on
    the bias alone, and windows that lie between heads and tokens (Hiera's) are copied into the batch.

    Args:
        model: as in tokens.
        blocks: as in tokens, but integers count the attention layers in the order in which they run (the pooling of a
            classifier is not one); a named module holds one attention layer or is one.

    Returns:
        Captured[QKV], filled by the forward pass.

    Raises:
        TypeError, ValueError: at entry, as tokens; a model without softmax attention; a module with several attention
            layers; a layer whose maps queries and keys do not make: channel, linear and outlook attention, and heads
            mixed around the softmax (CaiT).
        RuntimeError: as tokens; a layer that runs several attentions, or changes scores or map by other operations.
    """
    root = unwrap(model)
    layers = resolve_attention(root, blocks)
    slots = [Slot(name, module) for name, module in dict(layers).items()]

    def attach(slot: Slot, state: State) -> list[RemovableHandle]:
        watch = Watch(slot, state, _heads(slot.module))
        state.watches.append(watch)

        def before(module: nn.Module, args: Any) -> None:
            watch.start(tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ())

        def after(module: nn.Module, args: Any, output: Any) -> None:
            watch.finish()

        return [
            slot.module.register_forward_pre_hook(before_only(slot.module, before)),
            slot.module.register_forward_hook(after_only(slot.module, after), prepend=True),
        ]

    with hooked(model, root, slots, attach):
        yield Captured(slots, module_order(slots, [name for name, _ in layers]), _record)


def _record(slot: Slot) -> QKV:
    found, shape, grad = slot.value
    with torch.set_grad_enabled(grad):
        if len(found) == 1:
            return _one(slot.module, found[0], shape, _heads(slot.module))
        # EfficientViT runs its heads in turn, each on the output of the one before.
        records = [_one(slot.module, attention, shape, None) for attention in found]
        biases = [record.bias for record in records if record.bias is not None]
        if any(record.q.shape[1] != 1 for record in records) or len(biases) not in (0, len(records)):
            raise RuntimeError(several(slot.name, len(records)))
        q, k, v = (torch.cat(x, dim=1) for x in zip(*(record[:3] for record in records), strict=True))
        bias = torch.cat(biases, dim=1) if biases else None
        return QKV(q, k, v, records[0].scale, bias, False, records[0].batch_shape)


def _one(module: nn.Module, attention: tuple[Any, ...], shape: tuple[int, ...], heads: int | None) -> QKV:
    kind, *found = attention
    is_causal = False
    if kind == "sdpa":
        q, k, v, bias, is_causal, scale = found
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        bias = None if bias is None else _replay.as_bias(bias, q)
    elif kind == "mha":
        q, k, v, bias = _replay.projected(*found)
        scale = q.shape[-1] ** -0.5
    else:
        q, k, v, scale, bias = _replay.from_map(*found)
    if heads and _is_over_channels(q, k, heads, shape):
        raise RuntimeError(
            f"{type(module).__name__} attends over channels: its maps are of the {q.shape[-2]} channels of a head, "
            "not of tokens"
        )
    if not q.dtype == k.dtype == v.dtype:  # autocast rounds them to the type of v
        q, k = q.to(v.dtype), k.to(v.dtype)
    q, k, v, bias, batch_shape = _replay.fold(q, k, v, bias, heads)
    return QKV(q, k, v, scale, bias, is_causal, batch_shape)


def _heads(module: Any) -> int | None:
    """Return the number of heads that an attention module tells, by the names that models use."""
    for owner in (module, getattr(module, "config", None)):
        for name in ("num_heads", "num_attention_heads", "heads", "n_heads", "nhead"):
            heads = getattr(owner, name, None)
            if isinstance(heads, int):
                return heads
    return None


def _is_over_channels(q: Tensor, k: Tensor, heads: int, shape: tuple[int, ...]) -> bool:
    """Return whether the rows of q are the channels of a head of the (B, N, C) input, and not its tokens."""
    return len(shape) == 3 and q.shape[-2] == k.shape[-2] != shape[1] and q.shape[-2] * heads == shape[2]
