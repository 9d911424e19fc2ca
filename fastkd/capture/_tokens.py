"""Capture tokens (B, N, D), whatever the layout of the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from fastkd.capture._hooks import Captured, Slot, State, after_only, hooked
from fastkd.capture._modules import feature_channels, has_heads, module_order, nearest, resolve, unwrap

_CLASS_TOKENS = ("cls_token", "dist_token", "class_token", "class_embedding")
_HF_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


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
        layout: layout of the outputs. "auto": NLC for 3 dimensions; for 4, the layout given by the model's `output_fmt`
            (Swin: NHWC) or by the channels in `feature_info`, and NCHW if it has neither and no attention.

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
    root = unwrap(model)
    names = resolve(root, blocks)
    # Hiera keeps the tokens of a mask unit together.
    rerolled = [f"blocks.{i}" for i in range(len(getattr(root, "blocks", ())))] if hasattr(root, "reroll") else []
    if any(hasattr(m, "reroll") for m in root.modules()) and not set(names) <= set(rerolled):
        raise ValueError(
            f"{type(root).__name__} keeps its tokens unrolled, not row-major: "
            + (f"its blocks alone can be put in order ({rerolled[0]} ..)" if rerolled else "use its `reroll` instead")
        )

    def attach(slot: Slot, state: State) -> list[RemovableHandle]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            slot.put(output, state)

        return [slot.module.register_forward_hook(after_only(slot.module, after))]

    def finish(slot: Slot) -> Tensor:
        return _as_tokens(root, slot.name, slot.module, slot.value, prefix, layout)

    slots = [Slot(name, root.get_submodule(name)) for name in dict.fromkeys(names)]
    with hooked(model, root, slots, attach):
        yield Captured(slots, module_order(slots, names), finish)


def _as_tokens(root: Any, name: str, module: nn.Module, output: Any, prefix: str | int, layout: str) -> Tensor:
    x = output
    if isinstance(output, (tuple, list)):
        tensors = [item for item in output if isinstance(item, Tensor)]
        x = tensors[0] if len(tensors) == 1 else None
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(output).__name__
        raise ValueError(f"{name!r} gives {got}; tokens need one tensor: (B,N,D), (B,D,H,W) or (B,H,W,D)")
    if hasattr(root, "reroll"):
        return root.reroll(x, int(name.removeprefix("blocks."))).flatten(1, 2)
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
    told = nearest(root, name, "output_fmt")
    told = getattr(told, "value", told)  # timm's enum or a string
    if told in ("NCHW", "NHWC"):
        return str(told)
    channels = feature_channels(root).get(name)
    if x.shape[1] != x.shape[3] and channels in (x.shape[1], x.shape[3]):
        return "NCHW" if channels == x.shape[1] else "NHWC"
    if has_heads(module):
        raise ValueError(
            f"{name!r} gives shape {tuple(x.shape)} and nothing tells which are its channels; pass layout="
        )
    return "NCHW"


def _prefix_tokens(root: Any, name: str) -> int:
    if "patch_embed" in name.split(".") or _is_before_class_token(root, name):
        return 0
    count = nearest(root, name, "num_prefix_tokens")
    home = _transformers_model(root, name)
    if count is None and home is not None:
        # Its embeddings put these in front of the patches.
        leading = (p for n, p in home.named_parameters() if n.rsplit(".", 1)[-1] in _HF_TOKENS)
        return sum(p.shape[-2] if p.dim() > 1 else 1 for p in leading)
    if count is None and any(n.rsplit(".", 1)[-1].startswith(_CLASS_TOKENS) for n, _ in root.named_parameters()):
        raise ValueError(
            f"{type(root).__name__} has a class token but does not tell num_prefix_tokens; "
            "pass prefix='keep' or the number to drop"
        )
    return int(count or 0)


def _transformers_model(root: nn.Module, name: str) -> nn.Module | None:
    """Return the outermost module of transformers around `name`: the model, or one inside the user's own."""
    parts = name.split(".")
    around = (root.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1))
    return next((module for module in around if type(module).__module__.startswith("transformers.")), None)


def _is_before_class_token(root: Any, name: str) -> bool:
    """Return whether a block runs without the class token, regardless of num_prefix_tokens."""
    kind = type(root).__name__
    stem, _, rest = name.partition(".")
    if stem != "blocks" or kind not in ("Cait", "Xcit", "ConVit"):
        return False
    last = int(rest.split(".")[0]) if rest else len(root.blocks) - 1
    return kind != "ConVit" or last < root.local_up_to_layer
