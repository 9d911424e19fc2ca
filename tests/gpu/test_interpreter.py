"""Kernels with faults that a card may forgive or show as noise: tests/_support/interpreter.py finds each of them."""

import os

import pytest
import torch

if os.getenv("TRITON_INTERPRET") != "1":
    pytest.skip("needs the interpreter, which has a process of its own", allow_module_level=True)


import triton
import triton.language as tl

from tests._support import interpreter

pytestmark = pytest.mark.triton


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, offset, size, BLOCK: tl.constexpr, IS_DEFINED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset + i, mask=i < n, other=0 if IS_DEFINED else None)
    tl.store(y_ptr + i, x, mask=i < size)


@triton.jit
def _last_kernel(y_ptr):
    tl.store(y_ptr, tl.program_id(0))


@triton.jit
def _product_kernel(y_ptr, a, b):
    tl.store(y_ptr, a * b)


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(y_ptr + i, a + b)
    tl.store(y_ptr + n + i, a * b)
    tl.store(y_ptr + 2 * n + i, -a)
    tl.store(y_ptr + 3 * n + i, tl.where(a < b, a, b))
    tl.store(y_ptr + 4 * n + i, (a.to(tl.float32) / 3).to(tl.bfloat16))


@triton.jit
def _functions_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.exp(-x))
    tl.store(y_ptr + BLOCK + i, tl.exp2(-x))
    tl.store(y_ptr + 2 * BLOCK + i, tl.log(x))
    tl.store(y_ptr + 3 * BLOCK + i, tl.log2(x))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def copied(x: torch.Tensor, n: int, offset: int = 0, is_defined: bool = True) -> torch.Tensor:
    y = x.new_empty(20)
    _copy_kernel[(2,)](x, y, n, offset, 20, BLOCK=16, IS_DEFINED=is_defined)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_reads_stay_within_the_tensors(dtype: torch.dtype) -> None:
    x = torch.arange(100).to(dtype)
    part = x[40:47]  # of a larger storage
    assert torch.equal(copied(part, 7)[:7], part) and (copied(part, 7)[7:] == 0).all()
    for n, offset in ((8, 0), (7, 1), (1, -1)):
        with pytest.raises(IndexError, match=f"{dtype.itemsize} (bytes before|past)"):
            copied(part, n, offset)
    with pytest.raises(IndexError, match=f"{dtype.itemsize} past"):  # a store
        _copy_kernel[(2,)](part, x[:19], 7, 0, 20, BLOCK=16, IS_DEFINED=True)


def test_a_block_lies_in_one_tensor() -> None:
    x = torch.arange(32.0)
    with pytest.raises(IndexError):
        _copy_kernel[(1,)](x[:8], x[8:], 16, 0, 16, BLOCK=16, IS_DEFINED=True)


def test_what_a_load_leaves_out_is_undefined() -> None:
    assert copied(torch.ones(7), 7, is_defined=False)[7:].isnan().all()
    assert copied(torch.ones(7, dtype=torch.bfloat16), 7, is_defined=False)[7:].isnan().all()
    assert (copied(torch.ones(7, dtype=torch.int32), 7, is_defined=False)[7:] > 2**29).all()


def test_offsets_that_wrap() -> None:
    y = torch.zeros(1, dtype=torch.int64)
    for a, b in ((2**16, 2**14), (-(2**16), 2**15), (2**31, 2**31 - 1)):  # the last is of 64 bits
        _product_kernel[(1,)](y, a, b)
        assert y == a * b
    with pytest.raises(OverflowError, match="wraps"):
        _product_kernel[(1,)](y, 2**16, 2**15)


def test_programs_run_in_an_order_of_the_seed() -> None:
    def last(seed: int) -> list[int]:
        interpreter.seed(seed)
        y = torch.zeros(4, dtype=torch.int32)
        for i in range(4):
            _last_kernel[(30,)](y[i:])
        return y.tolist()

    assert last(1) == last(1) != last(2)
    assert last(1) != [29] * 4


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), (0,)], ids=str)
def test_grids_that_no_card_runs(grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no card"):
        _last_kernel[grid](torch.zeros(1, dtype=torch.int32))


def test_bfloat16_is_rounded_as_pytorch_rounds_it() -> None:
    every = torch.arange(2**16, dtype=torch.int32)
    halves = torch.stack([every << 16 | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)
    ours = torch.from_numpy(interpreter.to_bfloat16(halves.numpy())).view(torch.bfloat16)
    expected = halves.to(torch.bfloat16)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours[~ours.isnan()], expected[~ours.isnan()])
    wide = torch.from_numpy(interpreter.from_bfloat16(ours.view(torch.uint16).numpy()))
    assert torch.equal(wide.nan_to_num(7.0), ours.float().nan_to_num(7.0))


def test_bfloat16_arithmetic() -> None:
    a, b = torch.randn(2, 256).to(torch.bfloat16)
    y = a.new_empty(5, 256)
    _arithmetic_kernel[(1,)](a, b, y, 256, BLOCK=256)
    assert torch.equal(y, torch.stack([a + b, a * b, -a, torch.minimum(a, b), (a.float() / 3).to(torch.bfloat16)]))
    a, b = torch.randn(2, 16, 16).to(torch.bfloat16)
    y = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, y, BLOCK=16)
    torch.testing.assert_close(y, a.float() @ b.float())


def test_digits_of_a_product_do_not_depend_on_the_place() -> None:
    row, column = torch.randn(2, 64)
    product = (row.double() @ column.double()).float()
    a, b = row.expand(64, 64).contiguous(), column[:, None].expand(64, 64).contiguous()
    y = torch.empty(64, 64)
    _dot_kernel[(1,)](a, b, y, BLOCK=64)
    assert (y == product).all()


def test_exponentials_and_logarithms_are_rounded_once() -> None:
    x = torch.rand(256) * 80 + 1
    y = torch.empty(4, 256)
    _functions_kernel[(1,)](x, y, BLOCK=256)
    wide = x.double()
    assert torch.equal(y, torch.stack([(-wide).exp(), (-wide).exp2(), wide.log(), wide.log2()]).float())
