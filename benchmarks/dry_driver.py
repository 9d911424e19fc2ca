"""A stand-in for Triton's GPU driver: public functions run on CPU tensors, and what they would launch is recorded.

    with recorded("sm_90") as launches:
        fastkd.relation_loss(student, teacher, backend="triton").backward()
    compiled = launches[0].kernel.compile()

Triton's own binder specialises the arguments (their types, alignment, values of 1, None and tuples) as on a GPU.
Nothing is executed: outputs are uninitialised memory. Nothing is compiled until `Specialisation.compile` is called.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

import fastkd_kernels
from fastkd._precision import matrix_gain
from fastkd.ops import _dispatch, _schemas, attention, relation

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The row of the kernels' configuration tables that a target reads.
ARCHITECTURES = {"sm_80": "8.x", "sm_90": "9.0", "sm_100": "10.x", "gfx942": "cdna"}
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


@dataclass(frozen=True)
class Specialisation:
    """A kernel as Triton's binder specialises it for the arguments of a call.

    signature: types by argument name; a tuple of arguments has a tuple of types. constants: values of constexpr
    arguments, and of those that are 1 or None, by position. attrs: divisibility by position. options: num_warps, ...
    """

    function: JITFunction
    target: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: Any = field(compare=False)

    @property
    def name(self) -> str:
        return self.function.fn.__name__

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for equal machine code."""
        parts = (self.target, self.name, self.signature, self.constants, self.attrs, self.options.__dict__)
        return tuple(map(str, parts))

    @property
    def constexprs(self) -> dict[str, Any]:
        """The values of the arguments that are compile-time constants, those of value 1 or None among them."""
        names = self.function.arg_names
        return {names[path[0]]: value for path, value in self.constants.items() if len(path) == 1}

    def types(self, pattern: str = ".*") -> list[str]:
        """Return the element types of the pointers among the arguments whose names match."""
        found: set[str] = set()
        for name, types in self.signature.items():
            if re.fullmatch(pattern, name):
                found |= {t[1:] for t in (types if isinstance(types, tuple) else (types,)) if str(t).startswith("*")}
        return sorted(found)

    def __str__(self) -> str:
        return "-".join([self.target, self.name, *self.types(), *(f"{k}={v}" for k, v in self.constexprs.items())])

    def compile(self) -> CompiledKernel:
        source = ASTSource(self.function, self.signature, self.constants, self.attrs)
        return triton.compile(source, target=TARGETS[self.target], options=self.options.__dict__)


@dataclass(frozen=True)
class Launch:
    """A kernel that a call would launch on so many blocks."""

    kernel: Specialisation
    grid: tuple[int, ...]


class _Driver:
    """The part of a Triton driver that binding reads. One device per target, so that their caches stay apart."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return 100 + list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


def _launcher(op: str) -> Callable[..., Any]:
    """Return an operator's function in kernels/, with its arguments in the order of the schema."""
    launcher = getattr(importlib.import_module(f"fastkd_kernels.{_schemas.STEMS[op]}"), op)
    names = [argument.name for argument in getattr(torch.ops.fastkd, op).default._schema.arguments]
    return lambda *args: launcher(**dict(zip(names, args, strict=True)))


def _gain(of: Callable[..., int], _: torch.device, *tensors: Tensor) -> int:
    return of(torch.device("cuda"), *tensors)


def _patches(target: str, multiprocessors: int) -> Iterator[Any]:
    """Yield what makes the library launch its kernels on CPU tensors as on that card."""
    known: dict[str, Callable[[torch.device], Any]] = {
        "architecture": lambda device: ARCHITECTURES[target],
        "multiprocessors": lambda device: multiprocessors,
    }
    for part in pkgutil.iter_modules(fastkd_kernels.__path__):
        module = importlib.import_module(f"fastkd_kernels.{part.name}")
        for name, answer in known.items():
            if hasattr(module, name):
                yield mock.patch.object(module, name, answer)
    for user in (attention, relation):  # they ask whether the tensors are on a GPU
        yield mock.patch.object(user, "matrix_gain", partial(_gain, matrix_gain))
    yield mock.patch.object(_dispatch, "INTERPRETED", True)  # "triton" takes CPU tensors
    yield mock.patch.object(torch.version, "hip", "6.4" if target.startswith("gfx") else None)


@contextmanager
def recorded(target: str, multiprocessors: int | None = None) -> Iterator[list[Launch]]:
    """Give the list of launches that calls inside the block append to.

    Args:
        target: a key of TARGETS.
        multiprocessors: number of the card's multiprocessors; that of the largest card by default.
    """
    launches: list[Launch] = []
    bind = JITFunction.run
    operators = torch.library.Library("fastkd", "IMPL")
    for op in _schemas.STEMS:
        operators.impl(f"{op}_triton", _launcher(op), "CPU")

    def specialise(
        function: JITFunction,
        key: Any,
        signature: Any,
        device: int,
        constants: Any,
        options: Any,
        attrs: Any,
        warmup: bool,
    ) -> Specialisation:
        kernel = Specialisation(function, target, signature, constants, attrs, options)
        function.device_caches[device][0][key] = kernel
        return kernel

    def run(function: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Specialisation:
        kernel = bind(function, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(kernel, tuple(grid)))
        return kernel

    with ExitStack() as patches:
        patches.callback(operators._destroy)
        for patch in _patches(target, MULTIPROCESSORS[target] if multiprocessors is None else multiprocessors):
            patches.enter_context(patch)
        patches.enter_context(mock.patch.object(JITFunction, "run", run))
        patches.enter_context(mock.patch.object(JITFunction, "_do_compile", specialise))
        patches.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver(target)))
        yield launches
