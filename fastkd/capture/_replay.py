"""Turn what was watched in an attention into q, k, v, scale and bias: the operations on its scores, replayed on them.

    scores = factor * (q k^T) + bias

Every operation that a chain can hold (`_watch.py`) changes the factor and the bias, or the layout of both. The bias
keeps its dimensions of 1 for as long as it can.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.capture._watch import Node

Shape = tuple[int, ...]


class _Scores:
    """Scores at one point of a chain: their shape, and the affine map from q k^T."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.shape: Shape = (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2])
        self.scale = 1.0
        self.factor: Tensor | None = None
        self.bias: Tensor | None = None
        self.is_part = False

    def times(self, x: Any, invert: bool = False) -> None:
        if isinstance(x, Tensor):
            x = x.reciprocal() if invert else x
            x = x.reshape((1,) * (len(self.shape) - x.dim()) + tuple(x.shape))
            self.factor = x if self.factor is None else self.factor * x
        else:
            x = 1 / x if invert else x
            self.scale *= x
        self.bias = None if self.bias is None else self.bias * x

    def plus(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            if not self.is_part:
                return  # the same for all keys
            x = torch.tensor(x)
        x = x.reshape((1,) * (len(self.shape) - x.dim()) + tuple(x.shape))
        self.bias = x if self.bias is None else self.bias + x

    def reshape(self, shape: Shape) -> None:
        self.bias = None if self.bias is None else _reshaped(self.bias, self.shape, shape)
        self.factor = None if self.factor is None else _reshaped(self.factor, self.shape, shape)
        self.shape = shape

    def whole(self, like: Tensor) -> Tensor:
        return like.new_zeros(()).expand(self.shape) if self.bias is None else self.bias.expand(self.shape)


def from_map(chain: Node, values: Tensor) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
    """Return q, k, v (.., N, d), scale and bias of an attention whose map is the softmax of a chain."""
    root = chain
    while root[0] != "scores":
        root = root[1]
    (q, q_scale), (k, k_scale) = _operand(root[1]), _operand(root[2])
    k = k.transpose(-2, -1)
    scores = _replay(chain, q, k)
    lead = scores.shape[:-2]
    scale = scores.scale * q_scale * k_scale
    # A chain may unfold the heads that q and k have in their batch.
    shaped = tuple(torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]))
    if lead != shaped:
        q = q.expand(*shaped, *q.shape[-2:]).reshape(*lead, *q.shape[-2:])
        k = k.expand(*shaped, *k.shape[-2:]).reshape(*lead, *k.shape[-2:])
    if scores.factor is not None:
        q = q * scores.factor.to(q.dtype)
    if values.shape[:-2] != lead and values.shape[:-2].numel() == torch.Size(lead).numel():
        values = values.reshape(*lead, *values.shape[-2:])
    return q, k, values, scale, scores.bias


def _operand(node: Node) -> tuple[Tensor, float]:
    """Return the tensor of a chain that only scaled it and changed its layout, and its scale."""
    if node[0] == "leaf":
        return node[1], 1.0
    x, scale = _operand(node[1])
    if node[0] == "times":
        return x, scale * node[2]
    if node[0] == "over":
        return x, scale / node[2]
    _, _, name, args, kwargs = node
    return getattr(x, name if name != "view" else "reshape")(*args, **kwargs), scale


def _replay(chain: Node, q: Tensor, k: Tensor) -> _Scores:
    if chain[0] == "scores":
        return _Scores(q, k)
    scores = _replay(chain[1], q, k)
    kind, _, *rest = chain
    if kind in ("times", "over"):
        scores.times(rest[0], invert=kind == "over")
    elif kind in ("plus", "minus"):
        scores.plus(rest[0] if kind == "plus" else -rest[0])
    elif kind == "fill":
        mask, value = rest
        scores.plus(torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, value))
    elif kind == "keep":
        mask, value = rest
        scores.plus(torch.where(mask, 0.0, value))
    elif kind == "view":
        name, args, kwargs = rest
        stand_in = torch.empty((), device="meta").expand(scores.shape)
        scores.reshape(tuple(getattr(stand_in, name if name != "view" else "reshape")(*args, **kwargs).shape))
    elif kind == "part":
        scores.bias = scores.whole(q)[rest[0]]
        scores.shape = tuple(scores.bias.shape)
        scores.is_part = True
    elif kind == "put":
        index, part = rest
        changed = _replay(part, q, k)
        scores.bias = scores.whole(q).clone()
        scores.bias[index] = changed.whole(q).to(scores.bias.dtype)
    return scores


def _reshaped(x: Tensor, old: Shape, new: Shape) -> Tensor:
    """Reshape x, which broadcasts to `old`, into what broadcasts to `new`, and keep its dimensions of 1 where possible.

    Both shapes fall into groups of dimensions with the same product. Where x has only ones in a group, it keeps them.
    """
    sizes: list[int] = []
    expanded = list(x.shape)
    i = j = 0
    while i < len(old) or j < len(new):
        start, begin = i, j
        a = b = 1
        while True:
            if i < len(old) and (a < b or i == start):
                a, i = a * old[i], i + 1
            elif j < len(new) and (b < a or j == begin):
                b, j = b * new[j], j + 1
            if a == b and (i > start or i == len(old)) and (j > begin or j == len(new)):
                break
        group = tuple(x.shape[start:i])
        if all(n == 1 for n in group):
            sizes += [1] * (j - begin)
        else:
            expanded[start:i] = old[start:i]
            sizes += new[begin:j]
    return x.expand(expanded).reshape(sizes)


def fold(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Shape]:
    """Return q, k, v (B',H,N,d) and a bias that broadcasts, from (.., N, d), and the shape that B' had.

    Args:
        heads: number of heads of the module, None if it does not tell.
    """
    if k.dim() == q.dim() > 3 and 1 < k.shape[-3] < q.shape[-3]:  # grouped queries
        groups = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(groups, dim=-3), v.repeat_interleave(groups, dim=-3)
    lead = tuple(torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2]))
    strides = q.expand(*lead, *q.shape[-2:]).stride()
    # Heads that the model folded into the batch, images being the slower index (SAM, HaloNet).
    split = heads if heads and heads not in lead[1:] and lead[0] % heads == 0 else None
    batch = lead if split is None else (lead[0] // split, split, *lead[1:])
    axis = 1 if split else _head_axis(lead, strides, heads)

    def unfolded(x: Tensor) -> Tensor:
        """Return (.., H, N, d), all dimensions of the batch in their order."""
        x = x.reshape((1,) * (len(lead) + 2 - x.dim()) + tuple(x.shape))
        if split:
            x = x.unflatten(0, (1, 1) if x.shape[0] == 1 else (-1, split))
        return x.unsqueeze(-3) if axis is None else x.movedim(axis, -3)

    batch_shape = tuple(n for i, n in enumerate(batch) if i != axis)
    q, k, v = (unfolded(x.expand(*lead, *x.shape[-2:])) for x in (q, k, v))
    q, k, v = (x if x.dim() == 4 else x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    if bias is not None:
        bias = unfolded(bias)
        if all(n == 1 for n in bias.shape[:-3]):
            bias = bias.reshape(1, *bias.shape[-3:])
        else:
            bias = bias.expand(*batch_shape, *bias.shape[-3:]).reshape(-1, *bias.shape[-3:])
    return q, k, v, bias, batch_shape


def _head_axis(lead: Shape, strides: Shape, heads: int | None) -> int | None:
    """Return which of the leading dimensions holds the heads, None if none does."""
    if len(lead) < 3:
        return 1 if len(lead) == 2 else None
    fitting = [i for i in range(1, len(lead)) if lead[i] == heads]
    # Heads lie inside a token, windows around it: twins has both, in either order.
    inside = [i for i in fitting if strides[i] < strides[-2]]
    return (inside or fitting or [len(lead) - 1])[0]


def projected(args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return q, k, v (B,H,N,d) and the mask of an nn.MultiheadAttention, projected from its inputs once more."""
    names = (
        "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k",
        "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask",
        "need_weights", "attn_mask",
    )  # fmt: skip
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key, value, heads = given["query"], given["key"], given["value"], given["num_heads"]
    if given.get("bias_k") is not None or given.get("add_zero_attn"):
        raise RuntimeError("nn.MultiheadAttention appends keys (add_bias_kv, add_zero_attn), which capture cannot read")
    if given.get("use_separate_proj_weight"):
        weights = [given[f"{x}_proj_weight"] for x in "qkv"]
    else:
        weights = given["in_proj_weight"].chunk(3)
    bias = given["in_proj_bias"]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    # (N, B, D) -> (B, H, N, d)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    mask = given.get("attn_mask")
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, heads))
    hidden = given.get("key_padding_mask")
    if mask is not None:
        mask = as_bias(mask.logical_not() if mask.dtype == torch.bool else mask, q)
    if hidden is not None:
        hidden = as_bias(hidden.logical_not() if hidden.dtype == torch.bool else hidden, q)[:, None, None]
        mask = hidden if mask is None else mask + hidden
    return q, k, v, mask


def as_bias(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask to be added: -inf where a boolean one is False."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, float("-inf"))
