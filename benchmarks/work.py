"""Counts the work that a benchmark case makes a GPU do, without one: python -m benchmarks aot prints it.

A case runs on tensors of device "cuda" that have shapes and no elements. Triton's launches are recorded
(`benchmarks.dry_driver`) and their programs counted (`benchmarks.ttir`). An operator of PyTorch counts as one launch
that reads its inputs and writes its outputs. These are counts, not times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.case import Case, Inputs, as_tuple, incoming
from benchmarks.dry_driver import Launch, extent, launcher, noted, recorded
from benchmarks.products import products
from benchmarks.ttir import Counts, Program
from fastkd.ops import _dispatch

aten = torch.ops.aten
_EXPONENTIALS = {aten.exp, aten.exp2, aten._softmax, aten._log_softmax, aten._log_softmax_backward_data}
_ALLOCATIONS = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}


@dataclass
class Work:
    """The work that a call makes a GPU do.

    kernels, operators: launches of own kernels and of PyTorch's operators. read, written: bytes of memory; a launch
    moves each element that it touches once. requested: bytes that programs load and store, caches included.
    flops: operations of matrix products as they are executed, padding and repetition included, by unit: "8-bit",
    "16-bit", "tf32", "float64", and "float32", which has no matrix unit. exponentials: of padding too.
    """

    kernels: int = 0
    operators: int = 0
    read: int = 0
    written: int = 0
    requested: int = 0
    flops: Counter[str] = field(default_factory=Counter)
    exponentials: int = 0

    @property
    def launches(self) -> int:
        return self.kernels + self.operators

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def add(self, launch: Launch) -> None:
        """Add a launch of a Triton kernel."""
        counts, repeats = _counted(launch)
        self.kernels += 1
        self.read += sum(min(n, launch.arguments[name]) for name, n in counts.read.items())
        self.written += sum(min(n, launch.arguments[name]) for name, n in counts.written.items())
        self.requested += sum(counts.read.values()) + sum(counts.written.values())
        for (unit, shape), n in counts.flops.items():
            self.flops[unit] += n * repeats.get(shape, 1)
        self.exponentials += counts.exponentials


_programs: dict[tuple[str, ...], tuple[Program, dict[str, int]]] = {}
_counts: dict[tuple[Any, ...], Counts] = {}


def _counted(launch: Launch) -> tuple[Counts, dict[str, int]]:
    """Return what the programs of a launch do, and how often each product is repeated by other warps."""
    key = launch.kernel.key
    if key not in _programs:
        ttir, ttgir = launch.kernel.lowered()
        _programs[key] = Program(ttir, launch.kernel.arguments), products(ttgir).repeats
    program, repeats = _programs[key]
    numbers = {name: launch.arguments[name] for name, kind in program.arguments if "ptr" not in kind}
    call = (key, launch.grid, *numbers.items())
    if call not in _counts:
        _counts[call] = program.count(numbers, launch.grid)
    return _counts[call], repeats


def unit(x: Tensor) -> str:
    """Return the unit that multiplies matrices of this type."""
    if x.dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"
    return "float64" if x.dtype == torch.float64 else "16-bit"


class _Operators(TorchDispatchMode):
    """Counts PyTorch's operators and runs the launchers of fastkd's, in which it counts on."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastkd":
            op, _, backend = func._schema.name.removeprefix("fastkd::").rpartition("_")
            with self:
                return noted(launcher(op, {"triton": "fastkd_kernels", "eager": "fastkd.eager"}[backend]), *args)
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        is_view = not func._schema.is_mutable and any(r.alias_info is not None for r in func._schema.returns)
        packet = func.overloadpacket
        if packet in _ALLOCATIONS or is_view or not any(x.device.type == "cuda" for x in results):
            return out
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.work.operators += 1
        self.work.read += sum(map(extent, inputs))
        self.work.written += sum(map(extent, results))
        product = flop_registry.get(getattr(aten, packet.__name__.rstrip("_"), packet))
        if product is not None:
            self.work.flops[unit(inputs[-1])] += product(*args, **kwargs, out_val=out)
        if packet in _EXPONENTIALS:
            self.work.exponentials += inputs[0].numel()
        return out


@torch.no_grad()
def _backward(results: Sequence[Tensor], gradients: Iterable[Tensor]) -> None:
    """Run backward node by node: PyTorch's engine would ask for the GPU that is not there."""
    order: list[Any] = []  # a node after all that follow it
    seen: set[Any] = set()

    def visit(node: Any) -> None:
        if node is not None and node not in seen:
            seen.add(node)
            for following, _ in node.next_functions:
                visit(following)
            order.append(node)

    waiting: dict[Any, dict[int, Tensor]] = {}

    def hand(node: Any, slot: int, gradient: Tensor) -> None:
        slots = waiting.setdefault(node, {})
        slots[slot] = slots[slot] + gradient if slot in slots else gradient

    for result, gradient in zip(results, gradients, strict=True):
        visit(result.grad_fn)
        hand(result.grad_fn, result.output_nr, gradient)
    for node in reversed(order):
        if node not in waiting or node.name() == "torch::autograd::AccumulateGrad":
            continue
        slots = waiting.pop(node)
        outputs = node._input_metadata
        given: list[Tensor | None] = [slots.get(i) for i in range(len(outputs))]
        followers = node.next_functions
        if isinstance(node, BackwardCFunction):  # one gradient for each argument, tensor or not
            if getattr(node, "fills_gradients", True):  # as the engine does
                given = [
                    torch.zeros(about.shape, dtype=about.dtype, device="cuda") if x is None else x
                    for x, about in zip(given, outputs, strict=True)
                ]
            found = as_tuple(node.apply(*given))
            found = tuple(g for g, needed in zip(found, node.needs_input_grad, strict=True) if needed)
            followers = [f for f in followers if f[0] is not None]
        else:
            found = as_tuple(node(*given))
        for (following, slot), gradient in zip(followers, found, strict=True):
            if following is not None and gradient is not None:
                hand(following, slot, gradient)


def _set_materialize_grads(ctx: Any, value: bool) -> None:
    """Set it, and note it where `_backward` can read it."""
    ctx.materialize_grads = ctx.fills_gradients = value


def hollow(case: Case) -> Inputs:
    """Return inputs of a case's shapes and strides on a GPU; call it in a FakeTensorMode."""
    inputs = case.inputs("cpu", case.dtype)

    def there(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    return Inputs(tuple(map(there, inputs.leaves)), tuple(map(there, inputs.constants)))


def record(case: Case, target: str, provider: str = "fastkd", precision: str = "highest") -> tuple[Work, list[Launch]]:
    """Return the work of a case's operators, forward and backward, and its launches of kernels, which are not counted.

    precision: that of float32 products, as torch.set_float32_matmul_precision takes it.
    """
    work = Work()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    on_gpu = mock.patch.object(_dispatch, "INTERPRETED", False)
    noting = mock.patch.object(FunctionCtx, "set_materialize_grads", _set_materialize_grads)
    try:
        with FakeTensorMode(), recorded(target) as launches, on_gpu, noting, torch.set_grad_enabled(case.backward):
            inputs = hollow(case)
            leaves = [x.requires_grad_(case.backward) for x in inputs.leaves]
            with _Operators(work):
                results = as_tuple(case.providers[provider].call(*leaves, *inputs.constants))  # type: ignore[arg-type]
            gradients = incoming(results) if case.backward else []
            with _Operators(work):
                _backward(results if case.backward else (), gradients)
    finally:
        torch.set_float32_matmul_precision(before)
    return work, launches


def count(case: Case, target: str, provider: str = "fastkd", precision: str = "highest") -> tuple[Work, list[Launch]]:
    """Return the work of a case, forward and backward, on the largest card of a target, and its launches."""
    work, launches = record(case, target, provider, precision)
    for launch in launches:
        work.add(launch)
    return work, launches
