"""A stand-in for Triton's GPU driver: public functions run on CPU tensors, and what they would launch is recorded.

    with recorded("sm_90") as launches:
        fastkd.relation_loss(student, teacher, backend="triton").backward()
    compiled = launches[0].kernel.compile()

Triton's own binder specialises the arguments (their types, alignment, values of 1, None and tuples) as on a GPU.
Nothing is executed: outputs are uninitialised memory. Nothing is compiled until `Specialisation.compile` is called.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import pkgutil
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler.compiler import make_backend
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
_RUN = JITFunction.run
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

    @property
    def arguments(self) -> list[str]:
        """The names of the arguments that the machine code takes, in its order; a tuple's parts are numbered."""
        parts = (part for name, types in self.signature.items() for part in _flat(name, types))
        return [name for name, type_ in parts if type_ != "constexpr"]

    def types(self, pattern: str = ".*") -> list[str]:
        """Return the element types of the pointers among the arguments whose names match."""
        found: set[str] = set()
        for name, types in self.signature.items():
            if re.fullmatch(pattern, name):
                found |= {t[1:] for t in (types if isinstance(types, tuple) else (types,)) if str(t).startswith("*")}
        return sorted(found)

    def __str__(self) -> str:
        return "-".join([self.target, self.name, *self.types(), *(f"{k}={v}" for k, v in self.constexprs.items())])

    @property
    def source(self) -> ASTSource:
        return ASTSource(self.function, self.signature, self.constants, self.attrs)

    def lowered(self) -> tuple[str, str]:
        """Return the kernel in Triton's two forms before LLVM, TTIR and TTGIR: a small part of a compilation."""
        target = TARGETS[self.target]
        backend = make_backend(target)
        options = backend.parse_options(dict(self.options.__dict__))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(options)
        module = self.source.make_ir(target, options, functions, backend.get_module_map(), context)
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options, self.source.language)
        about: dict[str, Any] = {"hash": "", "target": target, **options.__dict__}
        ttir = str(module := stages["ttir"](module, about))
        return ttir, str(stages["ttgir"](module, about))

    def compile(self) -> CompiledKernel:
        return triton.compile(self.source, target=TARGETS[self.target], options=self.options.__dict__)


@dataclass(frozen=True)
class _Shape:
    """A tensor without elements."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype)


@dataclass(frozen=True, eq=False)
class Call:
    """A call of the function in kernels/ that launches an operator's kernels. Its tensors are shapes."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def again(self) -> Callable[[], Any]:
        """Return the call as a function without arguments, on tensors that nothing has written."""
        arguments = tree_map_only(_Shape, _Shape.tensor, self.arguments)
        return lambda: self.function(*arguments)


_CALLS: list[Call] = []  # that are under way, one in another


def noted(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of kernels/, to which the launches that it makes belong."""
    _CALLS.append(Call(function, tree_map_only(Tensor, lambda x: _Shape(x.shape, x.stride(), x.dtype), args)))
    try:
        return function(*args)
    finally:
        _CALLS.pop()


@dataclass(frozen=True)
class Launch:
    """A kernel that a call would launch on so many blocks.

    arguments: numbers by the names that the compiled kernel gives them; of a tensor, its bytes.
    """

    kernel: Specialisation
    grid: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict, compare=False)
    call: Call | None = field(default=None, compare=False)


class _Pointer:
    """The part of a tensor that binding reads; a fake tensor has no address to be asked for."""

    def __init__(self, x: Tensor) -> None:
        self.dtype = x.dtype
        self._at = int(x.storage_offset()) * x.itemsize if isinstance(x, FakeTensor) else x.data_ptr()

    def data_ptr(self) -> int:
        return self._at


def _like(argument: tuple[Any, ...], parts: Iterable[Any]) -> tuple[Any, ...]:
    """Return parts as a tuple of the argument's type, whose fields a kernel may name."""
    return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)


def _pointers(argument: Any) -> Any:
    """Return an argument without tensors, so that a launch holds no memory."""
    if isinstance(argument, tuple):
        return _like(argument, map(_pointers, argument))
    return _Pointer(argument) if isinstance(argument, Tensor) else argument


def extent(x: Tensor) -> int:
    """Return the bytes of a tensor's elements, each once where strides of 0 repeat it."""
    return int(x.itemsize * prod(int(n) for n, stride in zip(x.shape, x.stride(), strict=True) if stride))


def _flat(name: str, argument: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(argument, tuple):
        for i, part in enumerate(argument):
            yield from _flat(f"{name}.{i}", part)
    else:
        yield name, extent(argument) if isinstance(argument, Tensor) else argument


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


def launcher(op: str, package: str = "fastkd_kernels") -> Callable[..., Any]:
    """Return an operator's function in kernels/ or eager/, with its arguments in the order of the schema."""
    function = getattr(importlib.import_module(f"{package}.{_schemas.STEMS[op]}"), op)
    names = [argument.name for argument in getattr(torch.ops.fastkd, op).default._schema.arguments]
    if names == list(inspect.signature(function).parameters):
        return function
    return lambda *args: function(**dict(zip(names, args, strict=True)))


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
    capability = divmod(int(target[3:]), 10) if target.startswith("sm") else (9, 4)
    yield mock.patch.object(torch.cuda, "get_device_capability", return_value=capability)
    yield mock.patch.object(torch.version, "hip", "6.4" if target.startswith("gfx") else None)


@contextmanager
def recorded(target: str, multiprocessors: int | None = None) -> Iterator[list[Launch]]:
    """Give the list of launches that calls inside the block append to.

    Args:
        target: a key of TARGETS.
        multiprocessors: number of the card's multiprocessors; that of the largest card by default.
    """
    launches: list[Launch] = []
    operators = torch.library.Library("fastkd", "IMPL")
    for op in _schemas.STEMS:
        operators.impl(f"{op}_triton", partial(noted, launcher(op)), "CPU")

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
        named = dict(zip(function.arg_names, args, strict=False)) | kwargs
        args, kwargs = tuple(map(_pointers, args)), {key: _pointers(value) for key, value in kwargs.items()}
        kernel = _RUN(function, *args, grid=grid, warmup=True, **kwargs)
        flat = dict(x for item in named.items() for x in _flat(*item))
        launches.append(Launch(kernel, tuple(grid), flat, _CALLS[-1] if _CALLS else None))
        return kernel

    with ExitStack() as patches:
        patches.callback(operators._destroy)
        for patch in _patches(target, MULTIPROCESSORS[target] if multiprocessors is None else multiprocessors):
            patches.enter_context(patch)
        patches.enter_context(mock.patch.object(JITFunction, "run", run))
        patches.enter_context(mock.patch.object(JITFunction, "_do_compile", specialise))
        patches.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver(target)))
        yield launches


@contextmanager
def bound(target: str, after: Callable[[], None]) -> Iterator[None]:
    """Let launches inside the block bind their arguments and do nothing else; after: called when that is done."""

    def run(function: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        _RUN(function, *args, grid=grid, warmup=True, **kwargs)
        after()

    with recorded(target), mock.patch.object(JITFunction, "run", run):
        yield


def _keep_freed_memory() -> None:
    """Let malloc hand out memory that was freed, as PyTorch's allocator does on a GPU: it would map large tensors anew,
    which takes longer than all else that a launch needs."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def host_seconds(launches: Sequence[Launch], rounds: int = 50) -> list[float]:
    """Return, of each launch of some calls, the time on this CPU since the one before it, or since its call began: to
    derive and to bind its arguments, and for PyTorch to provide tensors. The least of several rounds."""
    _keep_freed_memory()
    least: dict[Call, list[float]] = {}
    marks: list[float] = []
    for launch in launches:
        if launch.call is None or launch.call in least:
            continue
        call = launch.call.again()
        with bound(launch.kernel.target, lambda: marks.append(time.perf_counter())):
            for _ in range(rounds):
                marks[:] = [time.perf_counter()]
                call()
                steps = [b - a for a, b in pairwise(marks)]
                least[launch.call] = [min(pair) for pair in zip(least.get(launch.call, steps), steps, strict=True)]
    each = {call: iter(seconds) for call, seconds in least.items()}
    return [next(each[launch.call]) for launch in launches if launch.call is not None]
