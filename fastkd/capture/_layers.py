"""Which modules of a model are attention layers, of what kind: read from the code of their forward passes."""

import dis
import inspect
import types
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import nn

from fastkd.capture._modules import block_names, check_blocks, unknown_block

_FUSED = {"scaled_dot_product_attention", "multi_head_attention_forward"}
_PRODUCTS = {"@", "matmul", "bmm", "einsum", "baddbmm"}
_KERNELS = {"flash_attn_func", "flash_attn_varlen_func", "flex_attention", "memory_efficient_attention"}

# Why a known attention layer has no queries and keys that make its maps, by the name of its class.
_CHANNELS = "attends over channels: its maps are of channels, not of tokens"
_LINEAR = "is linear attention: it forms no map of tokens"
REFUSED = {
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
_MIXES_HEADS = "mixes heads around the softmax, so q and k do not make its maps"
_MIXERS = ("proj_l", "talking_head1")  # their layers, in CaiT and EfficientFormerV2
# A softmax of one logit a pixel, for the weights of a mean; a state space layer.
_NO_ATTENTION = ("GlobalContext", "HSMSSD")


class Layer:
    """An attention layer: its module, the module's name, and the name of its block where it is the only one in it."""

    def __init__(self, module: nn.Module, name: str, alias: str) -> None:
        self.module = module
        self.name = name
        self.alias = alias
        self.kind = type(module).__name__

    @property
    def reason(self) -> str | None:
        return _MIXES_HEADS if any(hasattr(self.module, name) for name in _MIXERS) else REFUSED.get(self.kind)


def attention_layers(model: nn.Module) -> list[Layer]:
    """Return the attention layers of a model, in module order, which is the order in which they run.

    A layer is a module whose own code calls scaled_dot_product_attention, or a softmax and a matrix product. The
    pooling of a classifier (`attn_pool`, SigLIP's head) is not counted.
    """
    found = [(name, module) for name, module in _attending(model) if not _is_pooling(model, name)]
    blocks = [f"{name}." for name in block_names(model)]
    homes = [next((b[:-1] for b in blocks if name.startswith(b)), name) for name, _ in found]
    counts = Counter(homes)
    return [
        Layer(module, name, home if counts[home] == 1 else name)
        for (name, module), home in zip(found, homes, strict=True)
    ]


def resolve_attention(root: nn.Module, blocks: Sequence[int | str]) -> list[tuple[str, nn.Module]]:
    """Return (name, module to watch) of each requested block: integers count the attention layers.

    Raises:
        TypeError, ValueError: as `qkv`.
    """
    check_blocks(blocks)
    layers = attention_layers(root)
    modules = dict(root.named_modules())
    everywhere = _attending(root)
    if not everywhere:
        raise ValueError(_none(root, modules))
    found = []
    for block in blocks:
        if isinstance(block, int):
            if not -len(layers) <= block < len(layers):
                raise ValueError(
                    f"block {block} is not among the {len(layers)} attention layers of {type(root).__name__} "
                    f"({_kinds(layers)}): {_listed([layer.alias for layer in layers])}"
                )
            layer = layers[block]
            _check(root, layer.alias, layer, layers)
            found.append((layer.alias, layer.module))
            continue
        if block not in modules or not block:
            raise unknown_block(root, block, [layer.alias for layer in layers])
        inside = [Layer(m, n, n) for n, m in everywhere if n == block or n.startswith(f"{block}.")]
        if len(inside) > 1:
            raise ValueError(
                f"{block!r} holds {len(inside)} attention layers; name one of {_listed([x.name for x in inside])}"
            )
        if inside:
            _check(root, block, inside[0], layers)
        found.append((block, inside[0].module if inside else modules[block]))
    return found


def _check(root: nn.Module, name: str, layer: Layer, layers: list[Layer]) -> None:
    if layer.reason is None:
        return
    usable = [other.alias for other in layers if other.reason is None]
    raise ValueError(
        f"{name!r} {layer.reason} ({layer.kind})"
        + (
            f"; layers of {type(root).__name__} with queries and keys: {_listed(usable)}"
            if usable
            else f", like all attention of {type(root).__name__}; capture.tokens captures its features"
        )
    )


def _none(root: nn.Module, modules: dict[str, nn.Module]) -> str:
    kind = type(root).__name__
    if any(_words(type(module)) & _KERNELS for module in modules.values()):
        return (
            f"{kind} runs its attention in a kernel of its own (flash or flex attention, xformers), whose operands "
            "capture does not see; capture.tokens of its projections gives q, k and v as (B, N, D)"
        )
    return (
        f"{kind} has no softmax attention over tokens (no module takes a softmax of a product), so there are no "
        "queries and keys to capture; capture.tokens captures its features"
    )


def _kinds(layers: list[Layer]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in Counter(layer.kind for layer in layers).items())


def _listed(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 12 else [*names[:6], "..", *names[-3:]])


def _attending(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the innermost modules that form attention maps, by name, in module order."""
    found = [(name, module) for name, module in model.named_modules() if attends(type(module))]
    outer = {name[:i] for name, _ in found for i, letter in enumerate(name) if letter == "."}
    outer |= {""} if any(name for name, _ in found) else set()
    return [(name, module) for name, module in found if name not in outer]


def _is_pooling(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    kinds = [type(model.get_submodule(".".join(parts[: i + 1]))).__name__ for i in range(len(parts))]
    return any(kind.startswith("AttentionPool") or "PoolingHead" in kind for kind in kinds)


@cache
def attends(kind: type[nn.Module]) -> bool:
    """Return whether the forward pass of a class calls fused attention, or a softmax and a matrix product."""
    words = _words(kind)
    return kind.__name__ not in _NO_ATTENTION and bool(
        words & _FUSED or ("softmax" in words and words & _PRODUCTS) or kind.__name__ in REFUSED
    )


@cache
def _words(kind: type[nn.Module]) -> frozenset[str]:
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
