"""Slots that the hooks of a forward pass fill, and the sequence that reads them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

T = TypeVar("T")
Moments = tuple[Tensor, Tensor]  # mean and biased variance per channel
Version = tuple[str, int]  # the graph that is traced ("" in eager mode), and the writes counted there


class Captured(Sequence[T], Generic[T]):
    """Values captured in the latest forward pass, in the requested order: by position, by module name, by iteration.

    Each forward pass inside the `with` replaces the values of the one before (for a module that runs twice, the last
    run counts); the recomputation of activation checkpointing replaces nothing. Read it inside the `with` or after it:
    it holds the values, and the graph of their gradients, until it is dropped or cleared.

    names: the modules' names.

    Raises:
        RuntimeError: read before a forward pass, for a module that did not run, or after the captured value was
            overwritten in place.
        KeyError, IndexError: nothing captured under that name or position.
    """

    def __init__(self, slots: "list[Slot]", order: list[int], finish: "Callable[[Slot], T]") -> None:
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
        """Let go of the captured tensors now."""
        for slot in self._slots:
            slot.reset()
            slot.is_cleared = True

    def _read(self, slot: "Slot") -> T:
        if slot.problem:
            raise RuntimeError(slot.problem)
        if slot.is_cleared:
            raise RuntimeError(f"what {slot.name!r} gave was let go of by clear()")
        if slot.value is None:
            raise RuntimeError(slot.why_empty())
        if slot.result is None:
            if any(is_written(x, seen) for x, seen in slot.held):
                raise RuntimeError(
                    f"what {slot.name!r} gave was overwritten in place later in the forward pass; "
                    "capture the module that overwrites it, or one before an in-place operation"
                    if isinstance(slot.value, Tensor)
                    else f"an operand of the attention in {slot.name!r} was overwritten in place before its record was "
                    "read; read the record before, right after the forward pass if an optimizer overwrote a bias"
                )
            slot.result = self._finish(slot)
        return slot.result


@dataclass
class ReplacedForward:
    """A module whose forward pass is replaced until `remove`."""

    module: nn.Module
    forward: Callable[..., Tensor]

    def __post_init__(self) -> None:
        # Not by assignment, which would first search the module's parameters, buffers and modules.
        self._before = self.module.__dict__.get("forward")
        self.module.__dict__["forward"] = self.forward

    def remove(self) -> None:
        del self.module.__dict__["forward"]
        if self._before is not None:
            self.module.__dict__["forward"] = self._before


class Stoppable(Protocol):
    """Something that watches a forward pass and must not outlive it."""

    def stop(self) -> None: ...


class State:
    """State shared by the hooks of one `with`."""

    def __init__(self) -> None:
        self.grad = False  # inside a forward pass of the model that records gradients ..
        self.input_grad = False  # .. and whose input wants one
        self.watches: list[Stoppable] = []
        self.passes = 0  # of the model inside the `with` ..
        self.calls = 0  # .. and calls of what wraps it

    def leave(self) -> None:
        self.grad = False
        for watch in self.watches:
            watch.stop()  # stays set after an exception


class Slot:
    """Value of one module in the latest forward pass. Plain attributes, so torch.compile replays assignments."""

    def __init__(self, name: str, module: nn.Module, hint: str = "") -> None:
        self.name = name
        self.module = module
        self.hint = hint
        self.why_empty: Callable[[], str] = str
        self.has_fired = False
        self.problem = ""
        self.is_cleared = False
        self.value: Any = None
        self.held: tuple[tuple[Tensor, Version], ...] = ()  # what the value is made of, with the versions of then
        self.result: Any = None

    def put(self, value: Any, state: State, held: tuple[tuple[Tensor, Version], ...] = ()) -> None:
        if state.grad and not torch.is_grad_enabled() and (state.input_grad or _is_trained(self.module)):
            raise RuntimeError(
                f"{self.name!r} runs without gradients inside a pass that records them, so a loss on it would train "
                "nothing; use non-reentrant activation checkpointing (use_reentrant=False)"
            )
        self.reset()
        self.value = value
        self.has_fired = True
        if not torch.compiler.is_compiling():
            self.held = ((value, version(value)),) if isinstance(value, Tensor) else held

    def refuse(self, problem: str) -> None:
        """Put the reason why the module's latest run gave nothing."""
        self.reset()
        self.has_fired = True
        self.problem = problem

    def reset(self) -> None:
        self.problem = ""
        self.is_cleared = False
        self.value = None
        self.result = None
        self.held = ()


@contextmanager
def hooked(
    model: nn.Module,
    root: nn.Module,
    slots: list[Slot],
    attach: Callable[[Slot, State], Sequence[RemovableHandle | ReplacedForward]],
) -> Iterator[None]:
    """Attach hooks for the slots to `root`, which `model` is or wraps, until the `with` ends."""
    state = State()

    def called(module: nn.Module, args: Any) -> None:
        state.calls += 1

    def before(module: nn.Module, args: Any) -> None:
        state.leave()
        state.passes += 1
        state.grad = torch.is_grad_enabled()
        state.input_grad = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        for slot in slots:
            slot.reset()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        state.leave()

    # No always_call and no with_kwargs: torch.compile guards the ids of such hooks, which are new at each entry.
    handles: list[RemovableHandle | ReplacedForward] = [
        root.register_forward_pre_hook(before_only(root, before)),
        root.register_forward_hook(after_only(root, after)),
    ]
    if model is not root:
        handles.append(model.register_forward_pre_hook(called))
    for slot in slots:
        slot.why_empty = partial(_why_silent, [slot.name], model, root, state, slots)
    try:
        for slot in slots:
            handles += attach(slot, state)
        yield
        _check_all_ran(model, root, state, slots)
    finally:
        state.leave()
        state.watches.clear()
        for slot in slots:  # a cycle would keep what was captured alive
            slot.why_empty = partial(str, slot.why_empty() if slot.value is None else "")
        for handle in handles:
            handle.remove()


def _check_all_ran(model: nn.Module, root: nn.Module, state: State, slots: list[Slot]) -> None:
    silent = [slot.name for slot in slots if not slot.has_fired]
    if silent:
        raise RuntimeError(_why_silent(silent, model, root, state, slots))
    for slot in slots:
        if slot.problem:
            raise RuntimeError(slot.problem)


def _why_silent(names: list[str], model: nn.Module, root: nn.Module, state: State, slots: list[Slot]) -> str:
    """Return why modules gave nothing: the one reason that applies, as far as it can be seen from outside."""
    kind = type(root).__name__
    listed = ", ".join(name or kind for name in names)
    late = (
        "was compiled and called before the `with` (PyTorch ignores later hooks): enter before the first compiled call"
    )
    is_compiled = any(hasattr(m, "_orig_mod") for m in model.modules()) or any(_is_compiled(root, n) for n in names)
    # A model that was compiled without hooks fires none of them.
    if is_compiled and not any(slot.has_fired for slot in slots):
        if state.passes or state.calls:
            return f"{listed} did not fire: {kind} {late}"
        return f"{listed} did not fire: no forward pass of {kind} inside the `with`, or {kind} {late}"
    if state.passes or any(slot.has_fired for slot in slots):
        return f"{listed} did not run in the forward pass of {kind}, which took another branch{slots[0].hint}"
    return (
        f"{listed} did not run: no forward pass of {kind} inside the `with` "
        "(if a compiled function calls it, enter before the function's first call)"
    )


def _is_compiled(root: Any, name: str) -> bool:
    """Return whether a module or one around it was compiled in place."""
    parts = name.split(".")
    around = [root] + [root.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))]
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in around)


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def before_only(module: nn.Module, hook: Callable[[nn.Module, Any], None]) -> Callable[..., None]:
    """Return the pre-hook for the module's own runs, without recomputation of checkpointing and without deep copies.

    A deep copy of a module carries the very functions that are registered on it.
    """

    def before(called: nn.Module, args: Any) -> None:
        if called is module and not is_recomputing():
            hook(called, args)

    return before


def after_only(module: nn.Module, hook: Callable[[nn.Module, Any, Any], None]) -> Callable[..., None]:
    """Return the hook for the module's own runs, as before_only. torch.compile wants a function for each signature."""

    def after(called: nn.Module, args: Any, output: Any) -> None:
        if called is module and not is_recomputing():
            hook(called, args, output)

    return after


def is_recomputing() -> bool:
    # Checkpointing runs modules again from within backward, where the autograd engine has a task id.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def version(x: Tensor) -> Version:
    """Return how often the memory of x was written; inference mode does not count."""
    if torch.compiler.is_dynamo_compiling():
        from fastkd.capture import _traced

        return _traced.version(x)
    return "", 0 if x.is_inference() else x._version


def is_written(x: Tensor, seen: Version) -> bool:
    """Return whether the memory of x was written since its version was seen, if that was in the same graph."""
    now = version(x)
    return now[0] == seen[0] and now[1] != seen[1]
