"""Triton's interpreter, closer to a card: `install()` changes it in this process.

 - The programs of a launch run in an order drawn by `seed`; on a card no order is promised.
 - A load or store goes to no address outside the tensors of the launch, each taken from its first to its last element.
 - What a masked load leaves undefined is NaN or a large integer, not 0.
 - A sum or product of 32-bit integers that wraps is an error: offsets of large tensors do. So is a matrix product's.
 - bfloat16 is computed in float32 and rounded to nearest, ties to even; the interpreter's own truncates.
 - Matrix products, exponentials and logarithms of float32 numbers are computed in float64 and rounded, because NumPy's
   digits depend on the CPU, and those of an element of a product on its place in the tile, which on a card they do not.
 - Grids are within the limits of CUDA.

It also takes a fraction of the time: triton.language is patched once, not in every launch and call of a function.
"""

import contextlib
import functools
import importlib
import inspect
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

GRID = (2**31 - 1, 65535, 65535)
WRAPPED = "a 32-bit integer wraps"
OF_FLOAT64 = (np.exp, np.exp2, np.log, np.log2)


class Order:
    """The orders of programs: a new one for every launch."""

    random = random.Random(0)


def seed(number: int) -> None:
    Order.random = random.Random(number)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of float32 numbers rounded to nearest, ties to even, as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16  # NaN may carry into the sign
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _wide(handle: TensorHandle) -> np.ndarray:
    return from_bfloat16(handle.data) if _is_bfloat16(handle) else handle.data


def _undefined(dtype: np.dtype, is_bfloat16: bool) -> Any:
    if is_bfloat16:
        return 0x7FC0
    return np.nan if dtype.kind == "f" else True if dtype.kind == "b" else np.iinfo(dtype).max // 2


class Builder(InterpreterBuilder):
    """What the operations of a kernel compute."""

    def __init__(self) -> None:
        super().__init__()
        # Its own check computes what it needs, then asks an option that is off.
        self.options = interpreter.InterpreterOptions(sanitize_overflow=False)
        self.extents: list[tuple[int, int]] = []

    def check(self, ptrs: TensorHandle, mask: np.ndarray) -> None:
        """Raise IndexError if an address is outside every tensor, or some are in one and some in another."""
        size = ptrs.get_element_ty().primitive_bitwidth // 8 or 1
        addresses = ptrs.data if mask.all() else ptrs.data[mask]
        if addresses.size == 0:
            return
        first, last = int(addresses.min()), int(addresses.max()) + size
        if not any(begin <= first and last <= end for begin, end in self.extents):
            below, above = min((max(b - first, last - e), (b - first, last - e)) for b, e in self.extents)[1]
            raise IndexError(f"{max(below, 0)} bytes before or {max(above, 0)} past the tensor that lies nearest")

    def create_masked_load(self, ptrs: TensorHandle, mask: TensorHandle, other: Any, *options: Any) -> TensorHandle:
        dtype = ptrs.get_element_ty()
        if other is None:
            numpy = interpreter._get_np_dtype(dtype)
            value = _undefined(numpy, dtype == tl.bfloat16)
            other = TensorHandle(np.full(ptrs.data.shape, value, numpy), dtype)
        self.check(ptrs, mask.data)
        return super().create_masked_load(ptrs, mask, other, *options)

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *options: Any) -> Any:
        self.check(ptrs, mask.data)
        return super().create_masked_store(ptrs, value, mask, *options)

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        dst = dst_type.scalar
        if src.dtype.scalar == dst or tl.bfloat16 not in (src.dtype.scalar, dst):
            return super().cast_impl(src, dst_type)
        data = _wide(src)
        if dst == tl.bfloat16:
            return TensorHandle(to_bfloat16(data), dst)
        return TensorHandle(data.astype(interpreter._get_np_dtype(dst)), dst)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            if rounding_mode not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
                raise NotImplementedError(f"bfloat16 rounded as {rounding_mode}")
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def _rounded(self, data: np.ndarray, like: TensorHandle) -> TensorHandle:
        return TensorHandle(data if data.dtype == np.bool_ else to_bfloat16(data), like.dtype.scalar)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if _is_bfloat16(lhs) or _is_bfloat16(rhs):
            return self._rounded(op(_wide(lhs), _wide(rhs)), lhs)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg: TensorHandle, op: Any) -> TensorHandle:
        if _is_bfloat16(arg):
            return self._rounded(op(_wide(arg)), arg)
        if arg.data.dtype == np.float32 and op in OF_FLOAT64:
            return TensorHandle(op(arg.data, dtype=np.float64).astype(np.float32), arg.dtype.scalar)
        return super().unary_op(arg, op)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if _is_bfloat16(z):
            return self._rounded(_wide(x) * _wide(y) + _wide(z), z)
        return super().create_fma(x, y, z)

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
        if a.data.dtype == np.int8:  # sums of whole numbers are exact in float64
            exact = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
            if not exact.size or np.abs(exact).max() < 2**31:
                return TensorHandle(exact.astype(np.int32), d.dtype.scalar)
            raise OverflowError(WRAPPED)
        product = _wide(a).astype(np.float64) @ _wide(b).astype(np.float64)
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    def _checked(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if lhs.data.dtype != np.int32 or rhs.data.dtype != np.int32:
            return self.binary_op(lhs, rhs, op)
        exact = op(lhs.data, rhs.data, dtype=np.int64)
        data = exact.astype(np.int32)
        if not np.array_equal(data, exact):
            raise OverflowError(WRAPPED)
        return TensorHandle(data, lhs.dtype.scalar)

    def create_add(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self._checked(lhs, rhs, np.add)

    def create_sub(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self._checked(lhs, rhs, np.subtract)

    def create_mul(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self._checked(lhs, rhs, np.multiply)


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, Tensor):
            yield argument


def _extent(x: Tensor) -> tuple[int, int]:
    """Addresses from the first element of x to past its last."""
    elements = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + elements * x.element_size()


class Launch(interpreter.GridExecutor):
    """kernel[grid] of an interpreted kernel."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        named = {name: value for name, value in kwargs.items() if name in self.arg_names}
        bound = inspect.getcallargs(self.fn, *args, **named)
        tensors = list(_tensors(bound.values()))
        assert all(x.device.type == "cpu" for x in tensors)
        inputs = {
            name: value if name in self.constexprs else interpreter._implicit_cvt(value)
            for name, value in bound.items()
        }
        grid = (*self.grid, *(1,) * (3 - len(self.grid)))
        if not all(0 < n <= most for n, most in zip(grid, GRID, strict=True)):
            raise ValueError(f"no card runs a grid of {grid}")
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(*grid)
        builder.extents = [_extent(x) for x in tensors]
        programs = list(np.ndindex(grid))
        Order.random.shuffle(programs)
        for program in programs:
            builder.set_grid_idx(*program)
            self.fn(**inputs)


def _called(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)


def _numpy_dtype(of_scalar: Any, dtype: Any) -> np.dtype:
    """As the interpreter's own function, which makes a table of all types in every call."""
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)


def install() -> None:
    builder = Builder()
    interpreter.interpreter_builder = builder
    interpreter.interpreter_semantic = interpreter.TritonSemantic(builder)
    interpreter._get_np_dtype = functools.partial(_numpy_dtype, functools.cache(interpreter._get_np_dtype))
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter.GridExecutor = Launch
    interpreter.InterpretedFunction.__call__ = _called


@contextlib.contextmanager
def card(architecture: str, multiprocessors: int) -> Iterator[None]:
    """Let launches be those of a card: of which table the tiles are, and how many programs fill it."""
    with contextlib.ExitStack() as stack:
        for name in ("attention", "moments", "prior", "relation"):
            module = importlib.import_module(f"fastkd_kernels.{name}")
            for function, value in (("multiprocessors", multiprocessors), ("architecture", architecture)):
                if hasattr(module, function):
                    stack.enter_context(mock.patch.object(module, function, return_value=value))
        yield
