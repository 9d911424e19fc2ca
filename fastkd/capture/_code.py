"""Detection of attention in the code of forward passes."""

import dis
import inspect
import types
from functools import cache
from typing import Any

from torch import nn

_FUSED = {"scaled_dot_product_attention", "multi_head_attention_forward"}
_PRODUCTS = {"@", "matmul", "bmm", "einsum", "baddbmm"}

# Why a known attention layer has no queries and keys that make its maps, by the name of its class.
_CHANNELS = "attends over channels: its maps are of channels, not of tokens"
_LINEAR = "is linear attention: it forms no map of tokens"
NO_QUERIES = {
    "XCA": _CHANNELS,
    "CrossCovarianceAttn": _CHANNELS,
    "ChannelAttention": _CHANNELS,
    "ChannelAttentionV2": _CHANNELS,
    "Florence2VisionChannelAttention": _CHANNELS,
    "FactorAttnConvRelPosEnc": _LINEAR,
    "LambdaLayer": _LINEAR,
    "OutlookAttention": "predicts its map from each token, without queries and keys",
    "GPSA": "mixes its map with one of positions after the softmax, so q and k alone do not make it",
    "SpatialTransformerBlock": "attends over the images of a batch, not over tokens",
}
# A softmax of one logit a pixel, for the weights of a mean; a state space layer.
_NO_ATTENTION = ("GlobalContext", "HSMSSD")


def attending(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the innermost modules that form attention maps, by name, in module order."""
    found = [(name, module) for name, module in model.named_modules() if attends(kind_of(module))]
    outer = {name[:i] for name, _ in found for i, letter in enumerate(name) if letter == "."}
    outer |= {""} if any(name for name, _ in found) else set()
    return [(name, module) for name, module in found if name not in outer]


def kind_of(module: nn.Module) -> Any:
    """Return a module's class; for mypy a class of modules cannot be the key of a cache."""
    return type(module)


@cache
def attends(kind: Any) -> bool:
    """Return whether the forward pass of a class calls fused attention, or a softmax and a matrix product."""
    words = vocabulary(kind)
    return kind.__name__ not in _NO_ATTENTION and bool(
        words & _FUSED or ("softmax" in words and words & _PRODUCTS) or kind.__name__ in NO_QUERIES
    )


@cache
def vocabulary(kind: Any) -> frozenset[str]:
    """Return the names that the forward pass of a class uses, and those of its methods and helpers that it calls."""
    if kind.__module__.startswith("torch.") and kind is not nn.MultiheadAttention:
        return frozenset()
    words: set[str] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [vars(base)["forward"] for base in kind.__mro__[:-2] if "forward" in vars(base)][:2]
    while waiting:
        function = inspect.unwrap(waiting.pop())
        if not isinstance(function, types.FunctionType) or function in seen or len(seen) > 30:
            continue
        seen.add(function)
        names = _names(function.__code__)
        words |= names
        for name in names:
            helper = getattr(kind, name, None) or function.__globals__.get(name)
            if isinstance(helper, types.FunctionType) and not helper.__module__.startswith("torch."):
                waiting.append(helper)
    return frozenset(words)


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    if any(step.argrepr in ("@", "@=") or "MATRIX_MULTIPLY" in step.opname for step in dis.get_instructions(code)):
        names.add("@")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names
