"""The attention layers of a model in the order in which they run, and those that have no queries and keys."""

from collections import Counter
from collections.abc import Sequence

from torch import nn

from fastkd.capture._code import NO_QUERIES, attending, kind_of, vocabulary
from fastkd.capture._modules import block_names, check_blocks, check_number, unknown_block

_KERNELS = {"flash_attn_func", "flash_attn_varlen_func", "flex_attention", "memory_efficient_attention"}

_MIXES_HEADS = "mixes heads around the softmax, so q and k do not make its maps"
_MIXERS = ("proj_l", "talking_head1")  # their layers, in CaiT and EfficientFormerV2


class Layer:
    """An attention layer: its module, the module's name, and the name of its block where it is the only one in it."""

    def __init__(self, module: nn.Module, name: str, alias: str) -> None:
        self.module = module
        self.name = name
        self.alias = alias
        self.kind = type(module).__name__

    @property
    def reason(self) -> str | None:
        return _MIXES_HEADS if any(hasattr(self.module, name) for name in _MIXERS) else NO_QUERIES.get(self.kind)


def attention_layers(model: nn.Module) -> list[Layer]:
    """Return the attention layers of a model, in module order, which is the order in which they run.

    A layer is a module whose own code calls scaled_dot_product_attention, or a softmax and a matrix product. The
    pooling of a classifier (`attn_pool`, SigLIP's head) is not counted.
    """
    found = [(name, module) for name, module in attending(model) if not _is_pooling(model, name)]
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
    everywhere = attending(root)
    if not everywhere:
        raise ValueError(_none(root, modules))
    found = []
    for block in blocks:
        if isinstance(block, int):
            check_number(
                block, layers,
                lambda: f"attention layers of {type(root).__name__} ({_kinds(layers)}): "
                f"{_listed([layer.alias for layer in layers])}",
            )  # fmt: skip
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
    if any(vocabulary(kind_of(module)) & _KERNELS for module in modules.values()):
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


def _is_pooling(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    kinds = [type(model.get_submodule(".".join(parts[: i + 1]))).__name__ for i in range(len(parts))]
    return any(kind.startswith("AttentionPool") or "PoolingHead" in kind for kind in kinds)
