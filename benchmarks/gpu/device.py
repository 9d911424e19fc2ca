"""The device of a step: a GPU, or a CPU that stands in for it in a rehearsal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.case import Case

SMALL = 12  # the largest dimension of a rehearsal


class Cuda:
    """A GPU."""

    name = "cuda"

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def is_broken(self) -> bool:
        """Return whether an error of a kernel has left the process without its GPU."""
        try:
            torch.cuda.synchronize()
        except Exception:
            return True
        return False

    def graphed(self, call: Callable[[], object]) -> Callable[[], object]:
        """Return the replay of a call as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def profiled(self, call: Callable[[], object]) -> None:
        """Run a call as the part of a program that ncu looks at."""
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()

    def sized(self, case: Case) -> Case:
        return replace(case, device="cuda")


class Cpu:
    """A CPU in its place: the same calls on shrunk tensors; a graph is the call itself."""

    name = "cpu"

    def synchronize(self) -> None:
        pass

    def is_broken(self) -> bool:
        return False

    def graphed(self, call: Callable[[], object]) -> Callable[[], object]:
        return call

    def profiled(self, call: Callable[[], object]) -> None:
        call()

    def sized(self, case: Case) -> Case:
        """Return the case in float32, with the first argument of its inputs, a shape or several, made small."""
        inputs: Any = case.inputs
        shapes, *rest = inputs.args
        small = partial(inputs.func, shrunk(shapes), *rest)
        return replace(case, device="cpu", dtype=torch.float32, inputs=small, reduced=SMALL**3)


def shrunk(shapes: Any) -> Any:
    """Return a shape, or the first eight of several, whose dimensions are at most SMALL."""
    if isinstance(shapes[0], int):
        return tuple(min(size, SMALL) for size in shapes)
    return [shrunk(shape) for shape in shapes[:8]]


def host_seconds(device: Cuda | Cpu, call: Callable[[], object], calls: int = 5) -> float:
    """Return the seconds that the host takes to issue a call, while the device is behind."""
    device.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    taken = time.perf_counter() - begin
    device.synchronize()
    return taken / calls
