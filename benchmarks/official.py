"""Counts the work of a case's official form under torch.compile on a GPU, as the compiler's own scheduler plans it.

The form is traced on shapes, forward and backward as one graph, and PyTorch's Inductor lowers and fuses it for an H100
that is not there; nothing is generated or run. In use, the compiler cuts that graph between forward and backward and
stores what both need, so that these counts are a lower bound.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import compile_fx, scheduler
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from benchmarks.case import Case, as_tuple, incoming
from benchmarks.work import Work, hollow, unit

_LIMITS: dict[str, Any] = {
    "multi_processor_count": 132,
    "major": 9,
    "regs_per_multiprocessor": 65_536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}
_OTHERS = {"name": "H100", "minor": 0, "total_memory": 80 << 30, "shared_memory_per_block_optin": 232_448}


def _graph(case: Case, provider: str) -> torch.fx.GraphModule:
    """Return forward and backward of a form as one graph of operators, traced on the CPU."""
    with FakeTensorMode():
        inputs = case.inputs("cpu", case.dtype)

        def both(*tensors: Tensor) -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_(case.backward) for x in tensors[: len(inputs.leaves)]]
            results = as_tuple(case.providers[provider].call(*leaves, *tensors[len(leaves) :]))  # type: ignore[arg-type]
            gradients = torch.autograd.grad(results, leaves, incoming(results)) if case.backward else ()
            return (*results, *gradients)

        graph = make_fx(both, decomposition_table=select_decomp_table())(*inputs.leaves, *inputs.constants)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _card() -> ExitStack:
    """Let Inductor find the GPU that it asks for."""
    properties = DeviceProperties(type="cuda", index=0, cc=90, **_LIMITS)
    answers: list[tuple[Any, str, Any]] = [
        (DeviceProperties, "create", classmethod(lambda cls, device: properties)),
        (torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(**_LIMITS, **_OTHERS)),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (scheduler, "has_triton", lambda *device: True),
    ]
    stack = ExitStack()
    for owner, name, answer in answers:
        stack.enter_context(mock.patch.object(owner, name, answer))
    return stack


def compiled(case: Case, provider: str = "eager") -> Work:
    """Return the work of a form as torch.compile would run it."""
    graph = _graph(case, provider)
    work = Work()
    with FakeTensorMode() as mode, _card():
        inputs = [*hollow(case).leaves, *hollow(case).constants]
        FakeTensorProp(graph, mode=mode).propagate(*inputs)
        for node in graph.graph.nodes:
            if node.target in (torch.ops.aten.exp.default, torch.ops.aten.exp2.default):
                work.exponentials += node.meta["val"].numel()
        with V.set_fake_mode(mode):
            compile_fx._recursive_post_grad_passes(graph, is_inference=False)
        lowered = GraphLowering(graph)
        with V.set_graph_handler(lowered), V.set_real_inputs(inputs), V.set_debug_handler(mock.MagicMock()):
            lowered.run(*inputs)
            for node in scheduler.Scheduler(lowered.operations).nodes:
                moved = node.get_read_write_buffers_sizes()
                work.operators += moved > 0
                work.read += moved
                if operations := node.estimate_flops():
                    work.flops[unit(inputs[0])] += operations
    return work
