"""Which modules a caller means: by name, by number, or by kind."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fastkd.capture._code import attending
from fastkd.capture._hooks import Slot


def unwrap(model: nn.Module) -> Any:
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


def check_blocks(blocks: Sequence[int | str]) -> None:
    if isinstance(blocks, str) or not isinstance(blocks, Sequence):
        raise TypeError(f"blocks must be a list of block indices or module names, got {blocks!r}")
    if not blocks:
        raise ValueError("blocks is empty: name at least one")
    for block in blocks:
        if isinstance(block, bool) or not isinstance(block, (int, str)):
            raise TypeError(f"blocks must hold ints or strings, got {block!r}")


def unknown_block(root: nn.Module, block: str, numbered: list[str]) -> ValueError:
    """Return the error for a name that no module has."""
    close = difflib.get_close_matches(block, [name for name, _ in root.named_modules()], n=8, cutoff=0.5)
    other = [name for name, _ in root.named_children() if name not in numbered]
    return ValueError(
        f"block {block!r} is not in {type(root).__name__}. Blocks: {', '.join(numbered)}. "
        f"Other modules: {', '.join(other)}" + (f". Did you mean {', '.join(close)}?" if close else "")
    )


def check_number(number: int, items: Sequence[Any], words: Callable[[], str]) -> None:
    """Check that a number, counted from the end if negative, is that of one of the items."""
    if not -len(items) <= number < len(items):
        raise ValueError(f"block {number} is not among the {len(items)} {words()}")


def resolve(root: Any, blocks: Sequence[int | str]) -> list[str]:
    """Return the names of blocks given by name, or by number among `block_names`."""
    check_blocks(blocks)
    modules = dict(root.named_modules())
    numbered = block_names(root)
    names = []
    for block in blocks:
        if isinstance(block, int):
            check_number(block, numbered, lambda: f"blocks of {type(root).__name__}: {', '.join(numbered)}")
            block = numbered[block]
        elif block not in modules or not block:
            raise unknown_block(root, block, numbered)
        names.append(block)
    return names


def block_names(model: nn.Module) -> list[str]:
    """Return the module names of the model's blocks, in the order in which integers number them in tokens and qkv."""
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
        if names and all(has_heads(modules[name]) for name in names):
            return names
    features = [name for name in feature_channels(root) if name in modules]
    names = [n for f in features for n in (inside(f) if isinstance(modules[f], nn.ModuleList) else [f])]
    return names or _attention_blocks(root, modules) or [name for name, _ in root.named_children()]


def _attention_blocks(root: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Return the members of lists that hold attention (Hugging Face's layers); none if some attention is in no list."""
    found: dict[str, None] = {}
    for name, _ in attending(root):
        parts = name.split(".")
        prefixes = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
        homes = [p for p in prefixes if isinstance(modules[p.rpartition(".")[0]], (nn.ModuleList, nn.Sequential))]
        if homes:
            found[homes[0]] = None
    return list(found)


def feature_channels(root: Any) -> dict[str, int]:
    info = getattr(root, "feature_info", None)
    entries = [entry for entry in info if isinstance(entry, dict)] if isinstance(info, list) else []
    return {entry["module"]: entry["num_chs"] for entry in entries if entry.get("module") and "num_chs" in entry}


def module_order(slots: list[Slot], names: list[str]) -> list[int]:
    position = {slot.name: i for i, slot in enumerate(slots)}
    return [position[name] for name in names]


def nearest(root: Any, name: str, attribute: str) -> Any:
    """Return `attribute` of the module `name`, or of the closest enclosing module that has it, or None."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        value = getattr(root.get_submodule(".".join(parts[:end])), attribute, None)
        if value is not None:
            return value
    return None


def has_heads(module: nn.Module) -> bool:
    return any(hasattr(m, "num_heads") for m in module.modules())
